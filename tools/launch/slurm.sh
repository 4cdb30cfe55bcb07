#!/bin/bash
# Train under SLURM, one task for each GPU; the job goes on by itself until the run is done.
#
#   sbatch tools/launch/slurm.sh experiments/gpt3.py:xl --data.path corpus.txt --run-dir runs/xl
#
# Where one task has all GPUs of its node, say so: export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7
#SBATCH --job-name=gptjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# The tasks hear SIGTERM 300 seconds before the time is over: they save the step in hand and exit
# with 75. A preempted job is requeued by SLURM itself.

# Each task finds the others by SLURM's variables, and has a log of its own. A failed task is no
# reason for srun to kill the rest: they end within seconds, once they have logged why.
srun --kill-on-bad-exit=0 --open-mode=append --output=%x-%j-%t.log gptjax train "$@"
code=$?

# 1 to 7 are errors that would come again, 75 is a run that was stopped, and the others (42 to 44,
# 137) are of processes that were lost or stuck: they go on from what is saved.
if ((code > 7)) && ((${SLURM_RESTART_COUNT:-0} < 100)); then
  echo "exit code $code: requeued"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # for SLURM to end this script, so that the job does not count as done
fi
exit $code
