#!/usr/bin/env bash
# stop.sh [--base DIR]: end a sandbox and all processes of its jobs, and nothing else. A second call does nothing.
set -euo pipefail
# shellcheck source=slurm/sandbox/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BASE=$DEFAULT_BASE
if [ $# -gt 0 ]; then
  [ $# = 2 ] && [ "$1" = --base ] || fail "usage: stop.sh [--base DIR]"
  BASE=$2
fi
open_base
stop_all
