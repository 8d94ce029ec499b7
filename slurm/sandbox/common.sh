# Functions of start.sh, stop.sh, node.sh and controller.sh. Sourced, never run.
# shellcheck shell=bash

DEFAULT_BASE="${TMPDIR:-/tmp}/slurm_sandbox_$(id -un)"

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# Prints the start of a process in clock ticks since boot, which identifies it together with the pid.
# Empty if there is no such process, or it is a zombie.
born() {
  local line
  { line=$(<"/proc/$1/stat"); } 2>/dev/null || return 0
  line=${line##*) } # the name before it may hold spaces and brackets
  read -r -a fields <<<"$line"
  [ "${fields[0]}" = Z ] || echo "${fields[19]}"
}

# daemon_runs NAME: whether the process that start_daemon recorded still runs; its pid may have been reused.
daemon_runs() {
  local pid time
  [ -r "$BASE/run/$1.pid" ] || return 1
  read -r pid time <"$BASE/run/$1.pid" || return 1
  [ -n "$time" ] && [ "$(born "$pid")" = "$time" ]
}

# start_daemon NAME COMMAND...: in its own session, so that Ctrl-C in the caller's terminal does not reach it.
start_daemon() {
  local name=$1
  shift
  SANDBOX_BASE="$BASE" SANDBOX_DAEMON="$name" setsid "$@" </dev/null >>"$BASE/log/$name.out" 2>&1 9>&- &
  echo "$! $(born $!)" >"$BASE/run/$name.pid"
  disown $! # bash would report its end
}

# kill_daemon NAME SIGNAL SECONDS: sends the signal, and KILL if it still runs after that many seconds.
kill_daemon() {
  local pid deadline=$((SECONDS + $3 + 1))
  if daemon_runs "$1"; then
    read -r pid _ <"$BASE/run/$1.pid"
    kill "-$2" "$pid" 2>/dev/null || true
    while daemon_runs "$1"; do
      [ "$SECONDS" -lt "$deadline" ] || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.05
    done
  fi
  rm -f "$BASE/run/$1.pid"
}

# Starts slurmd of one node. As root it runs in its own mount namespace, where /etc/hosts has the nodes' names (its
# steps inherit that); the machine's file does not change.
start_slurmd() {
  local node=$1
  mkdir -p "$BASE/spool/$node"
  if [ -e "$BASE/etc/hosts" ]; then
    # shellcheck disable=SC2016
    start_daemon "slurmd.$node" unshare -m --propagation private -- \
      bash -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$BASE/etc/hosts" slurmd -D -N "$node" -f "$SLURM_CONF"
  else
    start_daemon "slurmd.$node" slurmd -D -N "$node" -f "$SLURM_CONF"
  fi
}

start_slurmctld() {
  start_daemon slurmctld slurmctld -D -i -f "$SLURM_CONF"
}

# Prints the ids of slurmstepd and of tasks: of the whole sandbox, or of one node. They have the sandbox's SLURM_CONF in
# their environment. So does a user's shell that has sourced env.sh, but that has no job id. A task that has cleared its
# environment is found as a child of its slurmstepd.
# steps [NODE]
steps() {
  local node=${1:-} file pid parent mine=" " todo
  declare -A parents=()
  for file in $(grep -lzxsF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ); do
    pid=${file//[^0-9]/}
    if [ -z "$node" ]; then
      grep -qs '^slurmstepd' "/proc/$pid/comm" || grep -qzs '^SLURM_JOB_ID=' "$file" || continue
    else
      grep -qzxsF "SLURMD_NODENAME=$node" "$file" && grep -qzs '^SLURM_JOB_ID=' "$file" || continue
      parent=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$pid/status" 2>/dev/null) || continue
      if grep -qs '^slurmstepd' "/proc/$parent/comm"; then mine+="$parent "; fi
    fi
    mine+="$pid "
  done
  while read -r pid parent; do parents[$pid]=$parent; done < <(
    awk -F'\t' '/^Pid:/ {pid = $2} /^PPid:/ {print pid, $2}' /proc/[0-9]*/status 2>/dev/null || true
  )
  todo=1
  while [ -n "$todo" ]; do
    todo=""
    for pid in "${!parents[@]}"; do
      if [[ $mine == *" ${parents[$pid]} "* && $mine != *" $pid "* ]]; then mine+="$pid " todo=1; fi
    done
  done
  for pid in $mine; do
    # no zombies, and not this script, which a job may run
    [ "$pid" = $$ ] || [ "$pid" = "$BASHPID" ] || [ -z "$(born "$pid")" ] || echo "$pid"
  done
}

# Ends what steps lists: with KILL, since a task may ignore other signals, and slurmstepd before its tasks, since it
# would report their failure to the controller.
kill_steps() {
  local ids pid
  for _ in $(seq 50); do
    ids=$(steps "${1:-}")
    [ -n "$ids" ] || return 0
    for pid in $ids; do
      ! grep -qs '^slurmstepd' "/proc/$pid/comm" || kill -KILL "$pid" 2>/dev/null || true
    done
    # shellcheck disable=SC2086
    kill -KILL $ids 2>/dev/null || true
    sleep 0.05
  done
  fail "these processes of jobs do not end: $(echo "$ids" | tr '\n' ' ')"
}

# Ends all processes of this sandbox: first those that could start others, munged and the database last. With KILL, since
# no state is needed again.
stop_all() {
  local file pid name
  for file in "$BASE"/run/slurmd.*.pid "$BASE/run/slurmctld.pid"; do
    [ ! -e "$file" ] || kill_daemon "$(basename "$file" .pid)" KILL 5
  done
  kill_steps
  for name in slurmdbd mariadbd munged; do kill_daemon "$name" KILL 5; done
  # children of the daemons: slurmscriptd
  for file in $(grep -lzxsF "SANDBOX_BASE=$BASE" /proc/[0-9]*/environ); do
    pid=${file//[^0-9]/}
    [ "$pid" = $$ ] || [ "$pid" = "$BASHPID" ] || kill -KILL "$pid" 2>/dev/null || true
  done
}

# Opens the sandbox of --base; exits if there is none.
open_base() {
  BASE=$(realpath -m -- "$BASE")
  [ -e "$BASE/.slurm_sandbox" ] || fail "no sandbox in $BASE: start one with start.sh --base"
  export SLURM_CONF="$BASE/etc/slurm.conf"
}
