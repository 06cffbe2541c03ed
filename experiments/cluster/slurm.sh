#!/usr/bin/env bash
# `radiance train` or `radiance sample` on a SLURM cluster of GPUs: one process per node drives all of its GPUs.
#
#     sbatch --nodes=4 experiments/cluster/slurm.sh train experiments/finetune.py init=x0.safetensors data.path=/data/images mesh.fsdp=-1
#     sbatch --nodes=2 experiments/cluster/slurm.sh sample runs/finetune --prompts prompts.txt --seeds 0-3 --mesh fsdp=8 --out /scratch/images
#
# SLURM gives each process its rank. Every node must see the run directory (output=) and the data. The same command
# resumes a stopped job; SLURM's SIGTERM, sent two minutes before the time limit, saves a checkpoint first.
#SBATCH --job-name=radiance
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

command=${1:?train or sample}
shift
exec srun --kill-on-bad-exit=1 radiance "$command" "$@" --hosts auto
