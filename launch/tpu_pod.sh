#!/usr/bin/env bash
# Train on a TPU pod slice: what runs on each of its machines ("workers"), and how it is started there.
#
#   TPU_NAME=my-pod ZONE=us-central2-b bash launch/tpu_pod.sh --output-dir /mnt/shared/digits
#   TPU_NAME=my-pod ZONE=us-central2-b bash launch/tpu_pod.sh --output-dir /mnt/shared/digits --resume
#   DRY_RUN=1 TPU_NAME=my-pod ZONE=us-central2-b bash launch/tpu_pod.sh           show the command, run nothing
#
# On each worker it runs launch/xla_spawn.sh in this clone's folder there, by `gcloud compute tpus tpu-vm ssh
# --worker=all`: torch_xla starts one process a chip (two replicas as threads of it on TPU v2 and v3), finds the other
# workers by the slice's metadata, and all of them are one job. Every argument goes to train_digits.py.
#
# Needed on every worker, at the same path: this clone, and an environment with torch and the torch_xla of the same
# version (pip install 'torch==2.9.*' 'torch_xla[tpu]==2.9.*'), ignite and scikit-learn. --output-dir has to be on a
# file system that all workers share (Filestore, a mounted bucket): rank 0 writes, and all of them read when they
# resume.
#
#   TPU_NAME   name of the slice, needed
#   ZONE       its zone, needed
#   PROJECT    gcloud's default project
#   FOLDER     distckpt, in the home folder there: where the clone lies
#   PYTHON     python: the environment's, there
#   DRY_RUN    1: print the command that would run
#
# When one worker's replicas are killed, the others hang in the next collective: XLA has no time limit. Their runtime
# gives up after minutes; end them by the same command with STOP=1, and start again with --resume.
#
# Our tests have no TPU: they run this file with DRY_RUN=1, and what it starts on each worker, xla_spawn.sh, with two
# replicas on the CPU.
set -euo pipefail

: "${TPU_NAME:?name of the TPU slice, needed}" "${ZONE:?its zone, needed}"
FOLDER=${FOLDER:-distckpt}
PYTHON=${PYTHON:-python}

if [ "${STOP:-0}" = 1 ]; then
  remote="pkill -f launch/train_digits.py || true"
else
  remote="cd $(printf '%q' "$FOLDER") && PJRT_DEVICE=TPU PYTHON=$(printf '%q' "$PYTHON") bash launch/xla_spawn.sh"
  for argument in "$@"; do
    remote+=" $(printf '%q' "$argument")"
  done
fi

command=(gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker all --command "$remote")
[ -z "${PROJECT:-}" ] || command+=(--project "$PROJECT")

if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%s\n' "${command[@]}"
  exit 0
fi
exec "${command[@]}"
