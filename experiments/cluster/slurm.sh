#!/usr/bin/env bash
# `radiance train` or `radiance sample` on a SLURM cluster of GPUs: one process a node, which drives all of its GPUs.
#
#     sbatch --nodes=4 experiments/cluster/slurm.sh train experiments/finetune.py init=x0.safetensors data.path=/data/pictures mesh.fsdp=-1
#     sbatch --nodes=2 experiments/cluster/slurm.sh sample runs/finetune --prompts prompts.txt --seeds 0-3 --mesh fsdp=8 --out /scratch/pictures
#
# SLURM tells each process where it is. The run directory (output=) and the data must lie where every node sees them. The same
# command goes on where a job stopped; SLURM's SIGTERM, sent two minutes before the time is up, saves first.
#SBATCH --job-name=radiance
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

verb=${1:?train or sample}
shift
exec srun --kill-on-bad-exit=1 radiance "$verb" "$@" --hosts auto
