#!/usr/bin/env bash
# Start a private Slurm of two nodes with two CPUs each on this machine, as root, without systemd; /etc is not read.
# usage: up.sh DIR   (absolute, at most 80 characters: it holds unix sockets)
set -euo pipefail
dir=${1:?absolute directory for the state}
host=$(hostname -s)
controller=${SLURM_TEST_PORT:-17817}
mkdir -p "$dir"/{state,log,munge,spool}
chmod 755 "$dir"
chmod 700 "$dir/munge"

(umask 077; head --bytes 128 /dev/urandom >"$dir/munge/key")
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
chmod 755 "$dir/munge"  # the socket is for everybody, the key is not

nodes=
for i in 1 2; do
    nodes+="NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((controller + i)) CPUs=2 RealMemory=16000"$'\n'
done
# cred_expire  a requeued job waits for that long, two minutes by default
# NoInAddrAny  nothing listens on the network
# OverTimeLimit  the warning comes up to a minute early, so a limit of a minute would leave no time at all
# GraceTime    of a preempted task: it gets SIGTERM, and is killed so many seconds later
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
KillWait=5
OverTimeLimit=1
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${nodes}PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${SLURM_TEST_GRACE:-20}
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF="$dir/slurm.conf"
slurmctld -i -f "$SLURM_CONF"
for i in 1 2; do
    mkdir -p "$dir/spool/n$i"
    slurmd -N "n$i" -f "$SLURM_CONF"
done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format=%T --partition=low 2>/dev/null | sort -u)" = idle ] && exit 0
    sleep 0.5
done
sinfo --Node --long
tail -n 20 "$dir"/log/*.log
exit 1
