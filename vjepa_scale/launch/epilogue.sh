#!/usr/bin/env bash
# The end of our batch scripts: queues the job again, or lets it end.
#
#     bash epilogue.sh STATUS COMMAND...
#
# STATUS is srun's exit status: 0 the work is done, 75 saved and stopped after a signal. After any other status,
# COMMAND (for stages vjepa_scale.launch.requeue) decides: its status 75 means again. This script's exit status is the
# job's, which Slurm's afterok dependencies read.
set -u
trap : TERM USR2 # Slurm signals the batch shell too, and this script must run to its end
again=75
status=$1
srun_status=$1
shift
job_id=$SLURM_JOB_ID
# The plain id of an array's last task is that of the whole array.
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
[ "$status" -ne 0 ] || exit 0

# Exits if Slurm itself has started this job again. Then this script must do nothing more.
leave_if_succeeded() {
  local restarts=${1#* Restarts=}
  restarts=${restarts%% *}
  if [ "$restarts" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
    echo "Slurm itself has queued job $job_id again"
    exit "$again"
  fi
}

if [ "$status" -ne "$again" ]; then
  job=$(scontrol --oneliner show job "$job_id") && leave_if_succeeded "$job"
  for _ in 1 2 3; do
    "$@" --status "$srun_status"
    status=$?
    [ "$status" -gt 128 ] || break # a signal to all of the job's processes ended it before it could ignore it
  done
fi
[ "$status" -eq "$again" ] || exit "$status"

# Repeats, because the controller may be busy or restarting.
for pause in 1 5 15 30 60 0; do
  if job=$(scontrol --oneliner show job "$job_id"); then
    leave_if_succeeded "$job"
    case $job in
    *" JobState=COMPLETING Reason=TimeLimit "*) ;; # saved just before the time limit
    *" JobState=CANCELLED "* | *" JobState=COMPLETING "*)
      # Slurm is ending the job for good: a scancel, after which there is still time to save
      echo "job $job_id was cancelled: not queued again"
      exit 1
      ;;
    *" Requeue=0 "*)
      echo "error: this job may not be queued again (requeue: false); the same command goes on" >&2
      break
      ;;
    esac
    if scontrol requeue "$job_id"; then
      sleep 600 & # Slurm ends this script now
      wait $!
      exit "$again"
    fi
  fi
  sleep "$pause"
done
echo "error: job $job_id was not queued again; the same command goes on" >&2
"$@" --refused
exit 1
