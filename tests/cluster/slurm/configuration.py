"""Configuration of a Slurm that runs on one machine and is quick."""

# proctrack/linuxproc follows parents only, so it misses what has been re-parented to PID 1, as Ray's daemons are. The
# epilog finds that by its environment, logs it and ends it: a job that ends cleanly adds no line to leftovers.log.
EPILOG = """#!/bin/bash
for p in /proc/[0-9]*; do
  pid=${p#/proc/}
  [ "$pid" != $$ ] || continue
  marks=$(tr '\\0' '\\n' <$p/environ 2>/dev/null | grep -cxF -e "SLURM_JOB_ID=$SLURM_JOB_ID" -e "SLURM_CONF=@CONF@")
  [ "$marks" = 2 ] || continue
  args=$(tr '\\0' ' ' <$p/cmdline 2>/dev/null)
  case "$args" in *"$0"*|slurmstepd*|slurmd*|"") continue;; esac
  kill -9 "$pid" 2>/dev/null && echo "job $SLURM_JOB_ID node $SLURMD_NODENAME pid $pid ${args:0:160}" >>@LOG@
done
exit 0
"""

# SlurmdParameters=config_overrides: sizes are declared, not measured. The times make Slurm quick; its own are 300 s for
# a silent node, 30 s between TERM and KILL, and 120 s (cred_expire) before a requeued job starts again.
CONF = """ClusterName=sandbox
SlurmctldHost={host}({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire={requeue_wait}
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
StateSaveLocation={folder}/spool/ctld
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
Epilog={folder}/etc/epilog
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={memory_per_cpu}
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmdTimeout={node_timeout}
SlurmctldTimeout=30
KillWait={kill_wait}
MessageTimeout=10
BatchStartTimeout=10
CompleteWait=0
MinJobAge=3600
ReturnToService=2
JobRequeue=1
{gres}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""
CGROUP_CONF = """CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
"""
