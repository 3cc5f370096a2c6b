#!/usr/bin/env bash
# Train on several ranks with torchrun. Every argument goes to train_digits.py (--help lists them).
#
#   bash launch/torchrun.sh                                     one node, a rank for each GPU, two without GPUs
#   NPROC_PER_NODE=4 bash launch/torchrun.sh --epochs 20        one node, four ranks
#   bash launch/torchrun.sh --output-dir runs/a --resume        go on where runs/a was left
#
# Several nodes: the same command on each, at about the same time, with an --output-dir they share:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 LOCAL_ADDR=10.0.0.1 IFNAME=eth0 bash launch/torchrun.sh --output-dir D
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 LOCAL_ADDR=10.0.0.2 IFNAME=eth0 bash launch/torchrun.sh --output-dir D
#
# The environment overrides everything; the defaults:
#
#   NPROC_PER_NODE   the number of GPUs, else 2
#   NNODES           1
#   NODE_RANK        0; under SLURM, SLURM_NODEID
#   MASTER_ADDR      several nodes: address of node 0, needed
#   MASTER_PORT      several nodes: 29400. One node takes a free port from the system
#   LOCAL_ADDR       this node's address, as the others reach it; under SLURM, SLURMD_NODENAME (torchrun guesses)
#   IFNAME           network interface of that address, for Gloo and NCCL (both guess)
#   RDZV_ID          several nodes: name of the job, if several share MASTER_ADDR and MASTER_PORT
#   MAX_RESTARTS     0: a failed job ends. N: its ranks are started again up to N times, and train_digits.py goes on
#                    from its newest checkpoint: a killed rank costs the steps since then, and nothing else
#   SHUTDOWN_S       30: seconds between SIGTERM, which torchrun passes on to its ranks, and SIGKILL
#   OMP_NUM_THREADS  1, which is what several ranks on one node's cores want
#   PYTHON           python
#   SCRIPT           train_digits.py beside this file
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
SCRIPT=${SCRIPT:-$here/train_digits.py}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
MAX_RESTARTS=${MAX_RESTARTS:-0}
SHUTDOWN_S=${SHUTDOWN_S:-30}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # this clone's distckpt, installed or not

if [ -z "${NPROC_PER_NODE:-}" ]; then
  NPROC_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  [ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=2
fi

options=(--nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" --shutdown-timeout "$SHUTDOWN_S")
if [ "$NNODES" = 1 ]; then
  # All on this machine: the loopback needs neither a name that resolves nor an open port.
  options+=(--standalone --local-addr "${LOCAL_ADDR:-127.0.0.1}")
  loopback=lo
  [ "$(uname -s)" != Darwin ] || loopback=lo0
  IFNAME=${IFNAME:-$loopback}
else
  is_host=false
  [ "$NODE_RANK" != 0 ] || is_host=true
  LOCAL_ADDR=${LOCAL_ADDR:-${SLURMD_NODENAME:-}}
  options+=(
    --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --rdzv-backend c10d --rdzv-id "${RDZV_ID:-digits}"
    --rdzv-endpoint "${MASTER_ADDR:?address of node 0, needed with NNODES=$NNODES}:${MASTER_PORT:-29400}"
    --rdzv-conf "is_host=$is_host" # said, not guessed: a node may not know its own address by that name
  )
  [ -z "$LOCAL_ADDR" ] || options+=(--local-addr "$LOCAL_ADDR")
fi
if [ -n "${IFNAME:-}" ]; then
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFNAME} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$IFNAME}
fi

exec "$PYTHON" -m torch.distributed.run "${options[@]}" "$SCRIPT" "$@"
