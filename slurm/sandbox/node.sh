#!/usr/bin/env bash
# node.sh [--base DIR] kill|start|power-off NODE
#   kill       kill -9 the node's slurmd; its steps and tasks continue, as when only the daemon dies
#   power-off  kill -9 the node's slurmd, steps and tasks, as in a power failure
#   start      start its slurmd again
set -euo pipefail
# shellcheck source=slurm/sandbox/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BASE=$DEFAULT_BASE
if [ "${1:-}" = --base ] && [ $# -ge 2 ]; then
  BASE=$2
  shift 2
fi
[ $# = 2 ] || fail "usage: node.sh [--base DIR] kill|start|power-off NODE"
open_base
PATH="$PATH:/usr/sbin:/sbin"
NODE=$2
grep -q "^NodeName=${NODE//./\\.} " "$SLURM_CONF" || fail "no node $NODE: $(sed -n 's/^NodeName=\([^ ]*\) .*/\1/p' "$SLURM_CONF" | xargs)"
case $1 in
  kill) kill_daemon "slurmd.$NODE" KILL 5 ;;
  power-off)
    kill_daemon "slurmd.$NODE" KILL 5
    kill_steps "$NODE"
    ;;
  start)
    ! daemon_runs "slurmd.$NODE" || fail "slurmd of $NODE runs already"
    unset "${!SLURM_JOB@}" "${!SBATCH@}" || true
    start_slurmd "$NODE"
    ;;
  *) fail "usage: node.sh [--base DIR] kill|start|power-off NODE" ;;
esac
