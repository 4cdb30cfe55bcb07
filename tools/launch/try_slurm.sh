#!/bin/bash
# Whether slurm.sh does what it says: the losses of two and four processes are those of one, and a
# job goes on by itself after one of its processes was killed, and after its time was over. With
# `gptjax` on the path:
#
#   tools/launch/slurm_here.sh tools/launch/try_slurm.sh
#
# On 2026-11-28, with SLURM 22.05.8 and jax 0.10.2 on 2 cores of an AMD EPYC, two CPU devices in each
# process: losses of 20 steps of two and of four processes within 2.8e-7 of one device; all out 18 s
# after kill -9 of process 1 of two, "peer lost: process 1" in the log of the other, and the requeued
# job came to its end; stopped after step 639 as its time was over, went on from step 639.
set -eu
slurm=$(dirname "$(readlink -f "$0")")/slurm.sh
cd "$(mktemp -d)"
echo "in $PWD"
seq 20000 > text.txt
cat > run.py << END
from gptjax import *

def config():
    model = GPTConfig(
        context_size=32, num_layers=2, width=32, num_heads=4, compute_dtype="float32"
    )
    data = DataConfig(path=("text.txt",))
    return Config(model=model, data=data, batch_size=8, log_every=1, save_every=5)
END
submit() {
  sbatch --nodes 1 --ntasks-per-node "${processes:-2}" --cpus-per-task 1 --gpus-per-node 0 "$@"
}
flag=--xla_force_host_platform_device_count

# --- losses
XLA_FLAGS=$flag=1 gptjax train run.py --run-dir one --steps 20 2> one.log
export XLA_FLAGS=$flag=2 # of each process, from here on
for processes in 2 4; do
  submit --wait "$slurm" run.py --run-dir "of-$processes" --steps 20
  python3 - << END
import json
one, many = ([json.loads(line)["train/loss"] for line in open(f"{run}/metrics.jsonl")]
             for run in ("one", "of-$processes"))
worst = max(abs(a - b) / a for a, b in zip(one, many, strict=True))
print(f"losses of {len(one)} steps of $processes processes differ by {worst:.1e} at most")
assert worst < 5e-5
END
done
processes=2

# --- kill -9
job=$(submit --parsable "$slurm" run.py --run-dir killed --steps 150)
until grep -q '"step": 12,' killed/metrics.jsonl 2> /dev/null; do sleep 0.1; done
for process in $(pgrep -f "gptjax train .*killed"); do
  grep -qsz '^SLURM_PROCID=1$' "/proc/$process/environ" && kill -9 "$process" && break
done
began=$SECONDS
while pgrep -f "gptjax train .*killed" > /dev/null; do sleep 0.1; done
echo "all out $((SECONDS - began)) s after kill -9 of process 1; the log of process 0 says:"
tail -n 1 "gptjax-$job-0.log"
until grep -q '"step": 150,' killed/metrics.jsonl; do sleep 1; done
while squeue --noheader --jobs "$job" 2> /dev/null | grep -q .; do sleep 1; done
scontrol show job "$job" | grep -oE "(JobState|Restarts)=\w+"

# --- the time is over: SLURM sends the signal up to a minute earlier
job=$(submit --parsable --time 3 --signal TERM@60 "$slurm" run.py --run-dir late --steps 1000000)
until [ "$(grep -c '"event": "start"' late/events.jsonl 2> /dev/null)" = 2 ]; do sleep 1; done
tail -n 2 "gptjax-$job.log"
python3 - << END
import json
events = [json.loads(line) for line in open("late/events.jsonl")]
stopped, again = (next(e for e in events if e["event"] == name and e.get("attempt", 2) == 2)
                  for name in ("end", "start"))
print(f"stopped after step {stopped['step']}, went on from step {again['step']}")
assert stopped["outcome"] == "Interrupted" and stopped["step"] == again["step"] > 0
END
scancel "$job"
