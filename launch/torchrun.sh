#!/usr/bin/env bash
# Training on all GPUs of one machine, or of several:
#
#   launch/torchrun.sh params/paper.yaml ggsm 0
#   NODES=8 MASTER_ADDR=first-machine launch/torchrun.sh params/paper.yaml ggsm 0    # the same on each of eight
#
# PROCESSES=2 sets the processes of a machine (default: its GPUs). A worker that dies takes the others with it;
# all start again, up to three times, from the last checkpoint. runs/ must be one folder for all machines.
# GGSM_RENDEZVOUS_SECONDS sets how long machines wait for each other (default: 60 for the first, 600 for all).
# PYTHON names another Python than that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
  --nnodes "${NODES:-1}" \
  --nproc_per_node "${PROCESSES:-gpu}" \
  --rdzv_backend c10d \
  --rdzv_id "${JOB:-ggsm}" \
  --rdzv_endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" \
  --rdzv_conf "read_timeout=${GGSM_RENDEZVOUS_SECONDS:-60},join_timeout=${GGSM_RENDEZVOUS_SECONDS:-600}" \
  --max_restarts 3 \
  -m ggsm_core.training --profile "${1:?profile, such as params/paper.yaml}" --recipe "${2:?recipe}" --seed "${3:-0}"
