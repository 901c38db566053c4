#!/usr/bin/env bash
# One process of a SLURM step: tells it in torch's words which one it is. From the repository's root:
#     srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm_task.sh \
#       python bench/throughput.py --config vit_h
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_STEP_NODELIST") # rank 0 is on the first
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# exec, since SLURM signals a step's own processes and not their children.
exec "$@"
