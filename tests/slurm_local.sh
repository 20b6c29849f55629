#!/usr/bin/env bash
# A real SLURM on this machine: munged, slurmctld and some slurmd, each node in a process namespace of its own, so that a
# node that fails takes everything on it along, as a machine without power does. For tests; needs root and
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#
#   slurm_local.sh up DIR [NODES=2] [PORT=17817]   starts it and waits until every node is idle; prints what to export
#   slurm_local.sh fail DIR NODE                   kills a node (n1, n2, ...) and all that runs on it
#   slurm_local.sh restore DIR NODE                starts it again
#   slurm_local.sh down DIR                        ends the jobs and the daemons; the folder stays, with its logs
#
# Everything lies in DIR, whose path must be short (it holds unix sockets). Partition `main` is preempted by `urgent`:
# its jobs get SIGTERM, no user signal, and are requeued GRACE seconds later (20).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "slurm_local.sh: $*" >&2; exit 1; }
[ $# -ge 2 ] || { sed -n '2,13p' "$0" >&2; exit 2; }
command=$1 dir=$2
export SLURM_CONF=$dir/slurm.conf

# started NAME COMMAND...: runs it in the background, apart from this shell, and notes who it is: pid and start time,
# so that a later process of the same number is never taken for it.
started() {
  local name=$1 pid
  shift
  setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 &
  pid=$!
  echo "$pid $(born "$pid")" >"$dir/pids/$name"
}
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
running() { # NAME: prints its pid if it is alive
  local pid since
  read -r pid since 2>/dev/null <"$dir/pids/$1" || return 1
  [ -n "$since" ] && [ "$(born "$pid")" = "$since" ] && echo "$pid"
}
stopped() { # NAME SIGNAL: sends it and waits; what has not ended after 10 s is killed
  local pid
  pid=$(running "$1") || return 0
  kill "-$2" "$pid" 2>/dev/null || true
  for _ in $(seq 100); do running "$1" >/dev/null || break; sleep 0.1; done
  ! running "$1" >/dev/null || kill -KILL "$pid" 2>/dev/null || true
  rm -f "$dir/pids/$1"
}

configure() { # NODES PORT
  local host family='' number
  host=$(hostname -s)
  # With no address but 127.0.0.1, the resolver refuses IPv4 unless both families are asked for.
  getent ahostsv4 127.0.0.1 >/dev/null || family='CommunicationParameters=EnableIPv6'
  cat >"$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$2
$family
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start: 120 s by default, 5 at least
AuthInfo=socket=$dir/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmdPidFile=$dir/spool/%n/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MinJobAge=86400
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
KillWait=${KILL_WAIT:-20}
UnkillableStepTimeout=300
END
  for number in $(seq "$1"); do
    mkdir -p "$dir/spool/n$number"
    echo "NodeName=n$number NodeHostname=localhost NodeAddr=127.0.0.1 Port=$(($2 + number)) CPUs=2 RealMemory=4000"
  done >>"$SLURM_CONF"
  cat >>"$SLURM_CONF" <<END
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-20}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

node() { # NAME: the shell is the first process of its namespace and reaps what slurmd leaves behind
  running "$1" >/dev/null && return
  # shellcheck disable=SC2016 # expanded inside the namespace
  started "$1" unshare --pid --fork --mount-proc --kill-child bash -c 'slurmd -D -N "$1" & while :; do wait; sleep 1; done' node "$1"
}
names() { sed -n 's/^NodeName=\([^ ]*\) .*/\1/p' "$SLURM_CONF"; }

ready() { # waits until every node takes jobs
  local nodes
  nodes=$(names | wc -l)
  for _ in $(seq 300); do
    [ "$(timeout 5 sinfo -h -N -p main -o %t 2>/dev/null | grep -cE '^(idle|alloc|mix|comp)$')" -ne "$nodes" ] || return 0
    sleep 0.2
  done
  fail "the nodes are not ready after 60 s: see $dir/log"
}

case $command in
  up)
    [ "$(id -u)" = 0 ] || fail "needs root"
    for program in munged slurmctld slurmd sbatch; do
      command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurmctld slurmd slurm-client munge"
    done
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd -P)
    [ ${#dir} -le 60 ] || fail "$dir is too long for the unix sockets in it"
    export SLURM_CONF=$dir/slurm.conf
    mkdir -p "$dir"/{log,state,spool,pids}
    configure "${3:-2}" "${4:-17817}"
    [ -s "$dir/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
    running munged >/dev/null || started munged munged --foreground --force --num-threads=2 --key-file="$dir/munge.key" \
      --socket="$dir/munge.sock" --pid-file="$dir/state/munged.pid" --log-file="$dir/log/munged.log" \
      --seed-file="$dir/state/munge.seed"
    for _ in $(seq 100); do [ ! -S "$dir/munge.sock" ] || break; sleep 0.1; done
    running slurmctld >/dev/null || started slurmctld slurmctld -D -i
    for name in $(names); do node "$name"; done
    ready
    echo "export SLURM_CONF=$SLURM_CONF"
    ;;
  fail)
    # The kernel kills a namespace with its first process, and unshare takes that one along.
    stopped "${3:?which node}" KILL
    ;;
  restore)
    node "${3:?which node}"
    ready
    ;;
  down)
    [ -f "$SLURM_CONF" ] || exit 0
    if running slurmctld >/dev/null; then
      timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel --full --signal=KILL 2>/dev/null || true
      timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null || true
    fi
    for name in $(names); do stopped "$name" KILL; done
    stopped slurmctld TERM
    stopped munged TERM
    ;;
  *) fail "unknown command $command: up, fail, restore or down" ;;
esac
