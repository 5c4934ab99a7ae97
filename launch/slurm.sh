#!/usr/bin/env bash
#SBATCH --job-name=ggsm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
# 64 GPUs under SLURM, from the project's folder on a file system that all machines share:
#
#   sbatch launch/slurm.sh params/paper.yaml ggsm 0
#
# A job that is requeued goes on from its last checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"

export NODES="$SLURM_NNODES" JOB="$SLURM_JOB_ID"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
exec srun --kill-on-bad-exit=1 launch/torchrun.sh "$@"
