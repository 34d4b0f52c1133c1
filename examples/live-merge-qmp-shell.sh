#!/bin/sh
# Live merge with qmp-shell (of the Python package qemu.qmp).
# Usage: live-merge-qmp-shell.sh SOCKET DEVICE [BASE]
set -eu
SOCKET=$1 DEVICE=$2 base=${3-}
. "$(dirname "$0")/qmp-shell.sh"

# The job stays until it is dismissed, so that its outcome can be asked for.
run "block-stream device=$DEVICE job-id=$DEVICE ${base:+base=$base} auto-dismiss=false"
wait_for_job
run "job-dismiss id=$DEVICE"
case $jobs in *'"error": "'*) exit 1 ;; esac
ask query-block
