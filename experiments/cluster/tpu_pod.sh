#!/usr/bin/env bash
# `radiance train` or `radiance sample` on all hosts of a TPU pod slice.
#
#     experiments/cluster/tpu_pod.sh NAME ZONE train experiments/finetune.py init=gs-mount/x0.safetensors mesh.fsdp=-1
#     experiments/cluster/tpu_pod.sh NAME ZONE sample runs/finetune --prompts prompts.txt --mesh fsdp=4 --out images
#
# Every host needs this checkout in ~/radiance, installed once with
#     gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker all --command 'cd radiance && pip install -e ".[tpu,text]"'
# and a disk that all hosts see for the run directory (output=) and the data. The same command resumes a stopped run.
set -euo pipefail

name=${1:?the name of the TPU} zone=${2:?its zone} command=${3:?train or sample}
shift 3
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all \
    --command "cd radiance && radiance $command $(printf '%q ' "$@") --hosts auto"
