#!/usr/bin/env bash
# Starts a real Slurm cluster on this machine: see README.md. If anything fails, ends what it has started.
set -euo pipefail
# shellcheck source=slurm/sandbox/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# Variables of a caller inside a job or another cluster must not reach the daemons.
unset "${!SLURM@}" "${!SBATCH@}" "${!SRUN@}" "${!SALLOC@}" "${!MUNGE@}" || true

usage() {
  cat <<USAGE
usage: start.sh [options]
  --base DIR            all files of the sandbox ($DEFAULT_BASE)
  --nodes N             virtual nodes (2)
  --cpus N              CPUs per node, as Slurm counts them (4)
  --accounting KIND     none, or slurmdbd: with a database, so that sacct answers (none)
  --slurmd-timeout S    seconds without an answer after which a node is down and its jobs are requeued (30)
  --kill-wait S         seconds between TERM and KILL at a time limit or scancel (5)
  --grace S             seconds that a preempted job of partition main has left (20)
  --requeue-delay S     seconds before a requeued job may start again (5)
  --port PORT           first of 100 ports (chosen among the free ones)
  --ready-timeout S     give up when the nodes are not idle after that many seconds (60)
USAGE
}

BASE=$DEFAULT_BASE NODES=2 CPUS=4 ACCOUNTING=none SLURMD_TIMEOUT=30 KILL_WAIT=5 GRACE=20 REQUEUE_DELAY=5
PORT="" READY_TIMEOUT=60

number() { [[ $2 =~ ^[0-9]+$ ]] && [ "$2" -ge "$3" ] || fail "$1 $2: a whole number from $3 up is needed"; }
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --*) [ $# -ge 2 ] || fail "$1 needs a value (start.sh --help)" ;;&
    --base) BASE=$2 ;;
    --nodes) number "$1" "$2" 1 && NODES=$2 ;;
    --cpus) number "$1" "$2" 1 && CPUS=$2 ;;
    --accounting) ACCOUNTING=$2 ;;
    --slurmd-timeout) number "$1" "$2" 2 && SLURMD_TIMEOUT=$2 ;;
    --kill-wait) number "$1" "$2" 1 && KILL_WAIT=$2 ;;
    --grace) number "$1" "$2" 0 && GRACE=$2 ;;
    --requeue-delay) number "$1" "$2" 1 && REQUEUE_DELAY=$2 ;;
    --port) number "$1" "$2" 1024 && PORT=$2 ;;
    --ready-timeout) number "$1" "$2" 1 && READY_TIMEOUT=$2 ;;
    *) fail "no option $1 (start.sh --help)" ;;
  esac
  shift 2
done
[ "$NODES" -le 80 ] || fail "--nodes $NODES: at most 80"
case $ACCOUNTING in none | slurmdbd) ;; *) fail "--accounting $ACCOUNTING: none or slurmdbd" ;; esac

# --- programs ---
PATH="$PATH:/usr/sbin:/sbin" # the folders of the daemons, which a plain user's PATH often lacks
need() { command -v "$1" >/dev/null || fail "$1 is missing: apt-get install -y --no-install-recommends $2"; }
need munged munge
need slurmctld slurmctld
need slurmd slurmd
need sinfo slurm-client
if [ "$ACCOUNTING" = slurmdbd ]; then
  need slurmdbd slurmdbd
  need mariadbd mariadb-server-core
fi

# --- the folder ---
BASE=$(realpath -m -- "$BASE")
# A Unix socket's path holds 107 bytes; the longest here is spool/NODE/NODE_JOBID.STEPID of slurmstepd.
[ "$(printf %s "$BASE" | wc -c)" -le 60 ] || fail "--base $BASE: sockets need a path of at most 60 bytes"
[[ $BASE != *[\"\'\\\#,=%]* ]] || fail "--base $BASE: slurm.conf has no way to write quotes, \\, #, comma, = or % in a path"
if [ -e "$BASE/.slurm_sandbox" ]; then
  for file in "$BASE"/run/*.pid; do
    [ -e "$file" ] || continue
    daemon_runs "$(basename "$file" .pid)" && fail "a sandbox runs in $BASE already: stop.sh --base $BASE"
  done
elif [ -e "$BASE" ] && [ -n "$(ls -A "$BASE")" ]; then
  fail "--base $BASE: not empty and no sandbox of ours; name another folder"
fi
export SLURM_CONF="$BASE/etc/slurm.conf"
rm -rf "$BASE"
mkdir -p "$BASE"
chmod 0755 "$BASE"
touch "$BASE/.slurm_sandbox"
mkdir -m 0755 "$BASE"/{etc,run,log,state,spool,munge}

give_up() {
  local status=$?
  trap - EXIT INT TERM
  [ "$status" = 0 ] && return
  tail -n 5 "$BASE"/log/* >&2 2>/dev/null || true
  stop_all || true
  exit "$status"
}
trap give_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ME=$(id -un)
HOST=$(uname -n)
HOST=${HOST%%.*}

# --- ports: a lock until the daemons listen, so that two starts do not choose the same ports ---
exec 9>>"/tmp/.slurm_sandbox_ports_$(id -u)"
flock -w 120 9 || fail "another start.sh has held the lock of the ports for two minutes"
used() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
block_free() {
  local port
  for port in $(seq "$1" $(($1 + NODES))) $(($1 + 90)) $(($1 + 91)); do
    if used "$port"; then return 1; fi
  done
}
if [ -n "$PORT" ]; then
  block_free "$PORT" || fail "--port $PORT: something listens there already"
else
  for _ in $(seq 50); do
    PORT=$((12000 + 100 * (RANDOM % 180))) # below the kernel's ephemeral ports
    if block_free "$PORT"; then break; fi
    PORT=""
  done
  [ -n "$PORT" ] || fail "no 100 free ports found between 12000 and 30000"
fi

# --- the nodes' names: they must resolve inside a job, since tasks connect to the first node by its name ---
hosts_can_be_private() {
  [ "$(id -u)" = 0 ] && unshare -m --propagation private mount --bind /etc/hosts /etc/hosts 2>/dev/null
}
NAMES=()
if hosts_can_be_private; then
  for i in $(seq "$NODES"); do NAMES+=("n$i"); done
  { cat /etc/hosts && printf '127.0.0.1 %s\n' "${NAMES[@]}"; } >"$BASE/etc/hosts"
else
  for i in $(seq "$NODES"); do NAMES+=("127.0.0.$i"); done
fi

# --- munge: its own key and socket ---
(umask 077 && head -c 128 /dev/urandom >"$BASE/munge/munge.key")
SOCKET="$BASE/munge/munge.sock"
# --force: a folder that only this user can enter is fine here
start_daemon munged munged --foreground --force --key-file="$BASE/munge/munge.key" --socket="$SOCKET" --num-threads=4 \
  --pid-file="$BASE/munge/munged.pid" --log-file="$BASE/log/munged.log" --seed-file="$BASE/munge/munged.seed"

# wait_until SECONDS WHAT DAEMON COMMAND...: waits until COMMAND succeeds; fails at once if the daemon has ended.
wait_until() {
  local deadline=$((SECONDS + $1)) what=$2 daemon=$3
  shift 3
  until "$@" >/dev/null 2>&1; do
    daemon_runs "$daemon" || fail "$daemon has ended while starting: see $BASE/log"
    [ "$SECONDS" -lt "$deadline" ] || fail "$what after $READY_TIMEOUT s: see $BASE/log"
    sleep 0.1
  done
}
munge_answers() { munge -S "$SOCKET" -n | unmunge -S "$SOCKET"; }
wait_until "$READY_TIMEOUT" "munge does not answer" munged munge_answers

# --- accounting ---
ACCOUNTING_CONF="AccountingStorageType=accounting_storage/none"
if [ "$ACCOUNTING" = slurmdbd ]; then
  DATABASE_PORT=$((PORT + 90)) SLURMDBD_PORT=$((PORT + 91))
  mkdir -p "$BASE/db/data"
  MARIADBD=(mariadbd --no-defaults --user="$ME" --datadir="$BASE/db/data" --innodb-buffer-pool-size=64M
    --innodb-log-file-size=32M --innodb-lock-wait-timeout=900)
  # The steps of mariadb-install-db, which would need the larger package mariadb-client.
  {
    # (--bootstrap wants one statement a line)
    printf '%s;\n' "create database mysql" "use mysql" "set @auth_root_socket=NULL" "set @skip_auth_anonymous=1" \
      "set @current_hostname='localhost'"
    cat /usr/share/mysql/mysql_{system_tables,performance_tables,system_tables_data}.sql
  } | "${MARIADBD[@]}" --bootstrap >"$BASE/log/mariadbd_bootstrap.out" 2>&1
  start_daemon mariadbd "${MARIADBD[@]}" --socket="$BASE/db/my.sock" --pid-file="$BASE/db/my.pid" \
    --bind-address=127.0.0.1 --port="$DATABASE_PORT" --skip-name-resolve
  wait_until "$READY_TIMEOUT" "mariadbd does not listen" mariadbd used "$DATABASE_PORT"
  (umask 077 && cat >"$BASE/etc/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo="socket=$SOCKET"
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$SLURMDBD_PORT
SlurmUser=$ME
LogFile="$BASE/log/slurmdbd.log"
PidFile="$BASE/run/slurmdbd.self"
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DATABASE_PORT
StorageUser=root
StorageLoc=slurm_acct_db
CONF
  ACCOUNTING_CONF="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$SLURMDBD_PORT
AccountingStoragePass=\"$SOCKET\""
fi

# --- slurm.conf ---
# FirstJobId: a new sandbox has new ids, so that a job does not find the logs of an earlier one.
# cred_expire: the delay of a requeue. MinJobAge: jobs stay in scontrol for an hour after their end.
cat >"$SLURM_CONF" <<CONF
ClusterName=sandbox
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=$ME
SlurmdUser=$ME
SlurmctldPort=$PORT
AuthType=auth/munge
AuthInfo="socket=$SOCKET,cred_expire=$REQUEUE_DELAY"
CredType=cred/munge
StateSaveLocation="$BASE/state"
SlurmdSpoolDir="$BASE/spool/%n"
SlurmctldPidFile="$BASE/run/slurmctld.self"
SlurmdPidFile="$BASE/run/slurmd.%n.self"
SlurmctldLogFile="$BASE/log/slurmctld.log"
SlurmdLogFile="$BASE/log/slurmd.%n.log"
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
$ACCOUNTING_CONF
FirstJobId=$(($(date +%s) / 4 % 60000000 + 1))
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=$KILL_WAIT
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=$SLURMD_TIMEOUT
MessageTimeout=5
InactiveLimit=0
JobRequeue=1
PropagateResourceLimits=NONE
UnkillableStepTimeout=30
$(for i in $(seq "$NODES"); do
  echo "NodeName=${NAMES[i - 1]} NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + i)) CPUs=$CPUS RealMemory=64000"
done)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=$GRACE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" >"$BASE/env.sh"

# --- the daemons ---
if [ "$ACCOUNTING" = slurmdbd ]; then
  start_daemon slurmdbd slurmdbd -D # finds slurmdbd.conf next to SLURM_CONF
  wait_until "$READY_TIMEOUT" "slurmdbd does not answer" slurmdbd timeout 5 sacctmgr -n show cluster
  timeout 20 sacctmgr -i add cluster sandbox >"$BASE/log/sacctmgr.out" 2>&1 || fail "sacctmgr: see $BASE/log/sacctmgr.out"
fi
start_slurmctld
for node in "${NAMES[@]}"; do start_slurmd "$node"; done
nodes_idle() { [ "$(timeout 10 sinfo -h -N -p main -o '%T' | grep -c '^idle$')" = "$NODES" ]; }
wait_until "$READY_TIMEOUT" "the nodes are not idle" slurmctld nodes_idle
for node in "${NAMES[@]}"; do daemon_runs "slurmd.$node" || fail "slurmd of $node has ended: see $BASE/log"; done
trap - EXIT INT TERM
echo "$NODES nodes × $CPUS CPUs are idle (${NAMES[*]}).   . $(printf %q "$BASE/env.sh")"
