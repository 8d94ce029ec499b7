#!/usr/bin/env bash
# controller.sh [--base DIR] stop|start|forget
#   stop    end slurmctld: Slurm's commands fail, running jobs run on
#   start   start it again with the state that it had
#   forget  stop, throw its state away, start: no earlier job is known, and ids go on from higher ones
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
    kill_steps # jobs that nobody knows any more
    # the ids that were given are lost with the state, so leave more room than a sandbox gives in its life
    first=$(sed -n 's/^FirstJobId=//p' "$SLURM_CONF")
    sed -i "s/^FirstJobId=.*/FirstJobId=$((first + 10000))/" "$SLURM_CONF"
    rm -rf "${BASE:?}"/state/*
    start_slurmctld
    ;;
  *) fail "usage: controller.sh [--base DIR] stop|start|forget" ;;
esac
