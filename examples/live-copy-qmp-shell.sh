#!/bin/sh
# Live copy with qmp-shell (of the Python package qemu.qmp).
# Usage: live-copy-qmp-shell.sh SOCKET DEVICE NEW-IMAGE
set -eu
SOCKET=$1 DEVICE=$2 image=$3
. "$(dirname "$0")/qmp-shell.sh"

run "blockdev-snapshot-sync device=$DEVICE snapshot-file=$image format=qcow2"
exec "$(dirname "$0")/live-merge-qmp-shell.sh" "$SOCKET" "$DEVICE"
