#!/bin/bash
# launch/tpu_vm/run.sh NAME ZONE configs/qwen3-8b.yaml data.responses=... train.output=...
# Trains on all hosts of a TPU VM slice. Each needs this checkout in ~/llm2vec_gen_jax with its environment installed.
set -euo pipefail
name=$1 zone=$2
shift 2
printf -v words '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command "cd llm2vec_gen_jax && python -m launch.train $words"
