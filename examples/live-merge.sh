#!/bin/sh
# Live merge with liveblockctl: copy what lies between the active image and BASE into the active
# image, which then has BASE as its backing file (none without BASE).
# Usage: live-merge.sh SOCKET DEVICE [BASE]
set -eu
socket=$1 device=$2 base=${3-}

liveblockctl -s "$socket" stream "$device" ${base:+--base "$base"} --wait
liveblockctl -s "$socket" drives
