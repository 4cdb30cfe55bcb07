#!/bin/bash
# Train on all hosts of a TPU slice, each of which finds the others by the metadata of its VM.
#
#   tools/launch/tpu_vm.sh NAME ZONE experiments/gpt3.py:xl --data.path gs://corpus --run-dir /mnt/runs/xl
#
# Beforehand, with the accelerator that `gptjax plan` was asked about; --run-dir is a folder that all
# hosts see:
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5p-64 --version v2-alpha-tpuv5
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all --command "pip install 'gptjax[tpu]'"
set -eu
name=$1 zone=$2
shift 2
printf -v arguments '%q ' "$@"

# Every host starts its process again when it ends: one that is lost or stuck ends all of them, and
# they go on together from what is saved. 2 to 7 are errors that would come again.
read -r -d '' loop << END || true
for attempt in {1..100}; do
  gptjax train $arguments
  code=\$?
  ((code == 0 || code == 75 || 2 <= code && code <= 7)) && exit \$code
  sleep 5
done
exit \$code
END
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "bash -c $(printf %q "$loop")"
