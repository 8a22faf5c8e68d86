#!/bin/bash
# A real Slurm of one node on loopback: bash tests/slurm.sh FOLDER COMMAND [WORD ...] runs COMMAND with it, and ends it.
#
# FOLDER is made, and holds configuration, sockets, state and logs. Programs: Debian's slurm-wlm and munge. No root is needed. The
# node has two CPUs, whatever the machine has, and no GPU; a job that is put back starts again after five seconds, not 120.
set -eu
folder=$(realpath -m "$1")
shift
PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd sbatch srun scontrol python3; do
  command -v $program >/dev/null || { echo "no program $program: apt-get install slurm-wlm munge" >&2; exit 3; }
done

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

mkdir -p "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$(port)
SlurmdPort=$(port)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=2
NodeName=localhost NodeHostname=$(hostname) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=one Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

daemons=()
end() {
  scancel --quiet --user="$(id -un)" 2>/dev/null || true  # jobs outlive the daemons
  for _ in {1..60}; do [ -z "$(squeue --noheader 2>/dev/null)" ] && break || sleep 0.3; done
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do kill "${daemons[i]}" 2>/dev/null || true; done
  wait
}
trap end EXIT
trap 'exit 143' TERM INT
munged --force --foreground --num-threads=1 --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
  --pid-file="$folder/munged.pid" --seed-file="$folder/munge.seed" --log-file="$folder/munged.log" >/dev/null 2>&1 &
daemons+=($!)
until [ -S "$folder/munge.socket" ]; do kill -0 $! && sleep 0.1; done
slurmctld -D -c >/dev/null 2>&1 &
daemons+=($!)
slurmd -D -N localhost >/dev/null 2>&1 &
daemons+=($!)
until sinfo --noheader --format %T 2>/dev/null | grep -q idle; do kill -0 "${daemons[@]}" && sleep 0.2; done
"$@" &
daemons+=($!)
wait $!
