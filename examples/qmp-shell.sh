# Functions for the examples that use qmp-shell; SOCKET and DEVICE are set by them.

# ask COMMAND: the answers of one qmp-shell session that is given the command
ask() {
    printf '%s\n' "$1" | qmp-shell "$SOCKET"
}

# run COMMAND: as ask; ends the script when the daemon refuses
run() {
    answer=$(ask "$1")
    printf '%s\n' "$answer"
    case $answer in *'"error"'*) exit 1 ;; esac
}

# wait_for_job: until the job of the device has concluded; leaves what query-jobs said in $jobs
wait_for_job() {
    while true; do
        jobs=$(ask query-jobs)
        case $jobs in *'"concluded"'*) return ;; esac
        sleep 0.2
    done
}
