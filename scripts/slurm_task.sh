#!/usr/bin/env bash
# One process of a SLURM step: tells it in torch's words which one it is. From the repository's root:
#     srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm_task.sh \
#       python bench/throughput.py --config vit_h
set -euo pipefail

export CJEPA_SLURM_TASK=1 # SLURM's own variables are in every shell of a job
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
nodes=${SLURM_STEP_NUM_NODES:-$SLURM_JOB_NUM_NODES}
export LOCAL_WORLD_SIZE=$(((SLURM_NTASKS + nodes - 1) / nodes)) # on the fullest node
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_STEP_NODELIST") # rank 0 is on the first
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# exec, since SLURM signals a step's own processes and not their children.
exec "$@"
