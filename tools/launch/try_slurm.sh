#!/bin/bash
# Whether slurm.sh does what it says: losses of two processes are those of one, and a job of which a
# process is killed goes on by itself. In a folder with an experiment run.py of 150 or more steps:
#
#   tools/launch/slurm_here.sh tools/launch/try_slurm.sh
#
# On 2026-11-25 with SLURM 22.05.8 on two cores, 2 processes of 2 CPU devices each, float32: losses
# of 20 steps within 2.2e-7 of one device; all processes out 18 s after `kill -9` of one, with
# "peer lost: process 1" in the log of the other; the job, requeued, at its end 188 s after it began,
# of which SLURM waits 120 before it starts a requeued job again.
set -eu
here=$(dirname "$(readlink -f "$0")")
tasks=(--nodes 1 --ntasks-per-node 2 --cpus-per-task 1 --gpus-per-node 0)
exact=(--model.compute-dtype float32 --save-every 5)
flag=--xla_force_host_platform_device_count

XLA_FLAGS="$flag=1" gptjax train run.py --run-dir one --steps 20 "${exact[@]}" 2> one.log
export XLA_FLAGS="$flag=2"
sbatch --wait "${tasks[@]}" "$here/slurm.sh" run.py --run-dir two --steps 20 "${exact[@]}"
python3 - << END
import json
one, two = ([json.loads(line)["train/loss"] for line in open(f"{run}/metrics.jsonl")]
            for run in ("one", "two"))
worst = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
print(f"losses of {len(one)} steps differ by {worst:.1e} at most")
assert worst < 5e-5
END

job=$(sbatch --parsable "${tasks[@]}" "$here/slurm.sh" run.py --run-dir killed --steps 150 "${exact[@]}")
until grep -q '"step": 12,' killed/metrics.jsonl 2> /dev/null; do sleep 0.1; done
for process in $(pgrep -f "run-dir killed"); do
  grep -qsz '^SLURM_PROCID=1$' "/proc/$process/environ" && [ "$(ps -o comm= "$process")" != srun ] &&
    kill -9 "$process" && break
done
began=$SECONDS
while pgrep -f "run-dir killed" > /dev/null; do sleep 0.1; done
echo "all out after $((SECONDS - began)) s; the log of process 0 says:"
tail -n 1 "gptjax-$job-0.log"
until grep -q '"step": 150,' killed/metrics.jsonl; do sleep 1; done
while squeue --noheader --jobs "$job" 2> /dev/null | grep -q .; do sleep 1; done
echo "done after $SECONDS s"
scontrol show job "$job" | grep -E "JobState|Restarts"
cat "gptjax-$job.log"
