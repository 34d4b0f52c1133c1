#!/bin/sh
# Live copy with liveblockctl: from now on the device writes to NEW-IMAGE, and all that the old
# images hold is copied there; when that is done, nothing depends on the old images.
# Usage: live-copy.sh SOCKET DEVICE NEW-IMAGE
set -eu
socket=$1 device=$2 image=$3

liveblockctl -s "$socket" snapshot "$device" "$image" --format qcow2
liveblockctl -s "$socket" stream "$device" --wait
liveblockctl -s "$socket" drives
