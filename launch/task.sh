#!/usr/bin/env bash
# One process of a job: SLURM's numbers under the names that torchrun gives them.
set -euo pipefail

export RANK=${SLURM_PROCID:?not started by srun}
export WORLD_SIZE=${SLURM_NTASKS:?not started by srun}
export LOCAL_RANK=${SLURM_LOCALID:?not started by srun}
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:?give srun --ntasks-per-node}

# In place of this shell: SLURM signals every process of a step, and a shell would die of SIGUSR1.
exec "$@"
