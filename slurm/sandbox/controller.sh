#!/usr/bin/env bash
# controller.sh [--base DIR] stop|start|forget
#   stop    end slurmctld: Slurm's commands fail, running jobs continue
#   start   start it again with its earlier state
#   forget  stop, delete its state, start: no earlier job is known, and new ids are higher
set -euo pipefail
# shellcheck source=slurm/sandbox/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BASE=$DEFAULT_BASE
if [ "${1:-}" = --base ] && [ $# -ge 2 ]; then
  BASE=$2
  shift 2
fi
[ $# = 1 ] || fail "usage: controller.sh [--base DIR] stop|start|forget"
open_base
PATH="$PATH:/usr/sbin:/sbin"
unset "${!SLURM_JOB@}" "${!SBATCH@}" || true
case $1 in
  stop) kill_daemon slurmctld TERM 10 ;;
  start) daemon_runs slurmctld || start_slurmctld ;;
  forget)
    kill_daemon slurmctld TERM 10
    kill_steps # jobs that the controller will not know
    # the last id is lost with the state: skip more ids than a sandbox uses
    first=$(sed -n 's/^FirstJobId=//p' "$SLURM_CONF")
    sed -i "s/^FirstJobId=.*/FirstJobId=$((first + 10000))/" "$SLURM_CONF"
    rm -rf "${BASE:?}"/state/*
    start_slurmctld
    ;;
  *) fail "usage: controller.sh [--base DIR] stop|start|forget" ;;
esac
