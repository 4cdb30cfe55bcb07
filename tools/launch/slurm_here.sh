#!/bin/bash
# A SLURM of this one machine, for as long as a command takes: to try a batch script before it waits
# in a queue. As root, with Debian's packages slurm-wlm and munge:
#
#   tools/launch/slurm_here.sh sbatch --wait --ntasks 2 script.sh
#
# Nothing outside of a temporary folder is written. KEEP=1 leaves that folder, with the logs of the
# daemons.
set -eu
(($#)) || { sed -n '2,7s/^# \?//p' "$0"; exit 2; }
for program in munged slurmctld slurmd scontrol; do
  type -P "$program" > /dev/null || { echo "$program is missing: apt-get install slurm-wlm munge"; exit 2; }
done

here=$(mktemp -d /tmp/slurm.XXXXXX)
host=$(hostname -s)
port=$((20000 + $$ % 10000 * 2))
mkdir "$here"/{state,spool}
chmod 755 "$here"
cat > "$here/slurm.conf" << END
ClusterName=here
SlurmctldHost=$host
SlurmctldPort=$port
SlurmUser=root
# A requeued job waits for as long as a credential lives.
AuthInfo=socket=$here/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host Port=$((port + 1)) CPUs=8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
END
export SLURM_CONF=$here/slurm.conf

daemons=()
end() {
  timeout 60 bash -c 'scancel --user root; while squeue --noheader | grep -q .; do sleep 0.2; done' || true
  kill "${daemons[@]}" 2> /dev/null || true
  wait
  ((${KEEP:-0})) || rm -rf "$here"
}
trap end EXIT

dd if=/dev/urandom of="$here/munge.key" bs=1024 count=1 status=none
chmod 600 "$here/munge.key"
munged --foreground --force --key-file="$here/munge.key" --socket="$here/munge.socket" \
  --pid-file="$here/munged.pid" --seed-file="$here/munge.seed" --log-file="$here/munge.log" \
  2> "$here/munged.err" & daemons+=($!)
until [ -S "$here/munge.socket" ]; do sleep 0.1; done
slurmctld -D > "$here/slurmctld.log" 2>&1 & daemons+=($!)
slurmd -D > "$here/slurmd.log" 2>&1 & daemons+=($!)
until [ "$(timeout 5 sinfo -h -o %t 2> /dev/null)" = idle ]; do
  kill -0 "${daemons[@]}" || { tail -n 3 "$here"/*.log; exit 1; }
  sleep 0.2
done
"$@"
