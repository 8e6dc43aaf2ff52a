#!/bin/bash
# launch/tpu_vm/run.sh NAME ZONE configs/qwen3-8b.yaml data.responses=... train.output=...
# Runs one command on every host of a TPU VM slice that has this checkout in ~/llm2vec_gen_jax and its environment.
set -euo pipefail
name=$1 zone=$2
shift 2
printf -v words '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd llm2vec_gen_jax && python -m launch.train $words"
