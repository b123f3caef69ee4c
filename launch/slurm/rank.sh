#!/usr/bin/env bash
# One rank, started by srun. It gives Slurm's numbers the names that torch and DeepSpeed read, and becomes the rank by exec, so
# that Slurm's signals reach the trainer and its exit code reaches srun.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_SIZE=${SLURM_NTASKS_PER_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
: "${MASTER_ADDR:?must be set by pretrain.sbatch}" "${MASTER_PORT:?must be set by pretrain.sbatch}"
exec "${PYTHON:-python}" -u launch/pretrain.py "$@"
