#!/usr/bin/env bash
# See it survive: train on two ranks, kill one in the middle of a save, resume, compare with a run left alone. Then
# break the loss of one rank, tell one rank to stop, kill one that torchrun starts again, and go on on three ranks. At last
# the same with sharded state: two ranks, then four, then a plain script that opens the file.
#
#   bash launch/demo.sh
#
# Needs nothing prepared: the first call makes an environment of its own (minutes), later ones find it and take
# about two minutes. Works with and without a terminal; exit code 0 says that everything below "OK" is true.
# From the environment:
#
#   DEMO_DIR   where checkpoints and logs go (a new temporary directory)
#   PYTHON     an environment's python to use as it is, instead of making one
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
setup=$here/../ci/setup.sh
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$(bash "$setup" --print-python base)
fi
exec "$PYTHON" "$here/demo.py"
