#!/usr/bin/env bash
# The end of a stage's batch script: queue the job again, or let it end.
#
#     bash epilogue.sh STATUS COMMAND...
#
# STATUS is srun's exit status: 0 the stage is done, 75 a signal was obeyed and everything is saved. After any
# other, COMMAND (vjepa_scale.launch.afterwards) decides: its 75 means again. The exit status is the job's, which
# Slurm's afterok dependencies read.
set -u
trap : TERM USR2 # Slurm signals the batch shell too; what is begun here must be finished
again=75
status=$1
srun_status=$1
shift
[ "$status" -ne 0 ] || exit 0

# Exits where Slurm itself has started this job again: then nothing here counts any more.
leave_if_succeeded() {
  local restarts=${1#* Restarts=}
  restarts=${restarts%% *}
  if [ "$restarts" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
    echo "Slurm itself has queued job $SLURM_JOB_ID again"
    exit "$again"
  fi
}

if [ "$status" -ne "$again" ]; then
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID") && leave_if_succeeded "$job"
  for _ in 1 2 3; do
    "$@" --status "$srun_status"
    status=$?
    [ "$status" -gt 128 ] || break # a signal to all of the job's processes ended it before it could ignore it
  done
fi
[ "$status" -eq "$again" ] || exit "$status"

# The controller may be busy or being restarted: nobody is awake to try again.
for pause in 1 5 15 30 60 0; do
  if job=$(scontrol --oneliner show job "$SLURM_JOB_ID"); then
    leave_if_succeeded "$job"
    case $job in
    *" JobState=COMPLETING Reason=TimeLimit "*) ;; # saved in the last moment
    *" JobState=CANCELLED "* | *" JobState=COMPLETING "*)
      # Slurm is ending it, and not to start it again: somebody's scancel, which leaves us the time to save
      echo "job $SLURM_JOB_ID was cancelled: not queued again"
      exit 1
      ;;
    *" Requeue=0 "*)
      echo "error: this job may not be queued again (requeue: false); the launch command goes on" >&2
      break
      ;;
    esac
    if scontrol requeue "$SLURM_JOB_ID"; then
      sleep 600 & # Slurm ends this script now
      wait $!
      exit "$again"
    fi
  fi
  sleep "$pause"
done
echo "error: job $SLURM_JOB_ID was not queued again; the launch command goes on from the last checkpoint" >&2
"$@" --refused
exit 1
