#!/usr/bin/env bash
# Train on every XLA device of one machine, with torch_xla. Every argument goes to train_digits.py (--help lists them).
#
#   bash launch/xla_spawn.sh                                      the TPU chips of this machine; without, two on its CPU
#   CPU_NUM_DEVICES=1 PJRT_DEVICE=CPU bash launch/xla_spawn.sh    one replica, on the CPU
#   bash launch/xla_spawn.sh --output-dir runs/a --resume         go on where runs/a was left
#
# The environment overrides everything; the defaults:
#
#   PJRT_DEVICE      TPU where there is one, else CPU
#   CPU_NUM_DEVICES  2: replicas on the CPU, as threads of one process
#   PYTHON           python; torch_xla has to be installed beside it
#   SCRIPT           train_digits.py beside this file
#
# A replica that is killed ends the job; the same command with --resume goes on from the newest checkpoint. Several
# machines (a TPU pod): tpu_pod.sh runs this file on each.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
SCRIPT=${SCRIPT:-$here/train_digits.py}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # this clone's distckpt, installed or not

if [ -z "${PJRT_DEVICE:-}" ]; then
  PJRT_DEVICE=CPU
  # /dev/accel*: TPU v4 and older; /dev/vfio/*: later ones
  for chip in /dev/accel* /dev/vfio/[0-9]*; do
    [ ! -e "$chip" ] || PJRT_DEVICE=TPU
  done
fi
export PJRT_DEVICE
if [ "$PJRT_DEVICE" = CPU ]; then
  export CPU_NUM_DEVICES=${CPU_NUM_DEVICES:-2}
  # A replica that waits for the others in a collective holds a thread, of which there would be one a core (torch_xla
  # 2.9): let each step be run by whoever asks for it, from a pool that is large enough.
  export PJRT_CPU_ASYNC_CLIENT=${PJRT_CPU_ASYNC_CLIENT:-0}
  export XLA_THREAD_POOL_SIZE=${XLA_THREAD_POOL_SIZE:-$((4 + 2 * CPU_NUM_DEVICES))}
fi

exec "$PYTHON" "$SCRIPT" --backend xla "$@"
