#!/usr/bin/env bash
# Train on several ranks with Horovod. Every argument goes to train_digits.py (--help lists them).
#
#   bash launch/horovodrun.sh                                     this machine, two ranks
#   NP=4 bash launch/horovodrun.sh --epochs 20                    this machine, four ranks
#   HOSTS=node1:4,node2:4 bash launch/horovodrun.sh               two machines with four ranks each; needs ssh without a
#                                                                 password from here to them, and this clone, the
#                                                                 environment and --output-dir at the same path there
#   bash launch/horovodrun.sh --output-dir runs/a --resume        go on where runs/a was left
#
# The environment overrides everything; the defaults:
#
#   NP               2, or the sum of HOSTS
#   HOSTS            localhost:NP
#   IFNAME           network interface between several machines, for Gloo (Horovod finds one)
#   OMP_NUM_THREADS  1, which is what several ranks on one machine's cores want
#   PYTHON           python; Horovod has to be installed beside it
#   SCRIPT           train_digits.py beside this file
#
# A rank that is killed ends the job: Horovod ends the others, and the same command with --resume goes on from the
# newest checkpoint. The ranks talk by Gloo; with GPUs and a Horovod that was built with NCCL, by that.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
SCRIPT=${SCRIPT:-$here/train_digits.py}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # this clone's distckpt, installed or not

if [ -n "${HOSTS:-}" ] && [ -z "${NP:-}" ]; then
  NP=$(tr ',' '\n' <<<"$HOSTS" | awk -F: '{ n += (NF > 1 ? $2 : 1) } END { print n }')
fi
NP=${NP:-2}
options=(--gloo -np "$NP" -H "${HOSTS:-localhost:$NP}")
[ -z "${IFNAME:-}" ] || options+=(--network-interfaces "$IFNAME")

exec "$PYTHON" -m horovod.runner.launch "${options[@]}" "$PYTHON" "$SCRIPT" --backend horovod "$@"
