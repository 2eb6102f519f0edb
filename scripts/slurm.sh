# What the sbatch scripts share; they source it from the project's root, where they are submitted.
# shellcheck shell=bash

python=${PYTHON:-$PWD/.venv/bin/python} # PYTHON=... chooses another
if [[ ! -x $python ]]; then
    printf 'error: %s is missing: submit from the project'"'"'s root after scripts/train was run, or set PYTHON\n' "$python" >&2
    exit 2
fi
# A job that is queued again keeps its number, and so finds its run.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# shellcheck disable=SC2034  # used by the scripts
run_dir=${RUN_DIR:-outputs/slurm/$job}

# Runs a command and ends with its status. Shortly before the job's time is up (--signal=B:USR1@N)
# the command is told, saves what it did, and the job is queued again to go on from there. After a
# preemption Slurm queues it again by itself.
requeued() { # COMMAND...
    local child status=0 time_is_up=''
    "$@" &
    child=$!
    trap 'time_is_up=yes; kill -TERM "$child" || true' USR1
    trap 'kill -TERM "$child" || true' TERM
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break # a signal ends wait, too
    done
    if [[ -n $time_is_up && $status != 0 ]]; then
        echo "the job's time is up: it is queued again and goes on from the last checkpoint" >&2
        scontrol requeue "$SLURM_JOB_ID" || true # a preemption has done it
    fi
    return "$status"
}
