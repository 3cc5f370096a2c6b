#!/usr/bin/env bash
# Run what needs an NVIDIA GPU, in at most 6 minutes on one GPU. All stages run even if an earlier one fails.
#
#   ci/accel.sh                run all stages
#   ci/accel.sh --list         print the stages and their commands, and run nothing; needs no GPU
#   ci/accel.sh --only NAME    run one stage; may be repeated
#
# Stages:
#   contracts  the contract of a backend on NCCL: one rank, two where there are two GPUs (NCCL refuses ranks that share one)
#   tests      tests/accel: staging from the device with the overlapped copy, and that the file is exact; votes that
#              synchronize nothing; FSDP2 with one rank on NCCL, and two on Gloo that share the GPU
#   train      launch/train_fsdp.py on the GPU, resumed, and its checkpoint opened by launch/accuracy.py
#   save       ci/bench_save.py with the state on the GPU: stall, step dilation, time until durable, beside DCP's async_save
#              with pinned memory
#   sharded    the same with the state of FSDP2
#
# Exit code 0: all stages passed. 1: one failed. 2: wrong arguments. 3: there is no GPU, and nothing was run.
#
# PYTHON       an environment with a CUDA build of torch, and the groups `test` and `launch` of pyproject.toml
#              (what ci/setup.sh --print-python newest prints; making it takes minutes more)
# ACCEL_MIB    MiB of the state in the benchmarks (512)
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

ALL=(contracts tests train save sharded)
ONLY=() LISTS=0
while [ $# -gt 0 ]; do
    case "$1" in
        --list) LISTS=1 ;;
        --only)
            [[ " ${ALL[*]} " == *" ${2:-} "* && -n "${2:-}" ]] ||
                { say "--only takes one of: ${ALL[*]}; given '${2:-}'" && exit 2; }
            ONLY+=("$2")
            shift
            ;;
        -h | --help) usage && exit 0 ;;
        *) say "unknown option '$1'; see --help" && exit 2 ;;
    esac
    shift
done
[ "${#ONLY[@]}" -gt 0 ] || ONLY=("${ALL[@]}")

# no_gpu WHY: say that nothing was run, and exit.
no_gpu() {
    echo "accel.sh: nothing was run: $1"
    exit 3
}

RESULTS=RESULTS
if [ "$LISTS" -eq 1 ]; then
    PYTHON="${PYTHON:-python}"
else
    if [ -z "${PYTHON:-}" ]; then # without a GPU no environment is made
        nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU' || no_gpu "nvidia-smi finds no NVIDIA GPU here"
        PYTHON="$(ci/setup.sh --print-python newest)"
    fi
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        no_gpu "torch of $PYTHON finds no CUDA device"
    "$PYTHON" ci/build_native.py || say "WARNING: distckpt runs without its C extension, see above"
    mkdir -p "$CACHE"
    RESULTS="$(mktemp -d -p "$CACHE")"
    trap 'rm -rf "$RESULTS"' EXIT
fi
SECONDS=0 # of the stages, not of the set-up
export PYTHON PYTHONPATH="$ROOT" PYTHONUNBUFFERED=1
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider) # nothing is written into the tree
BENCH=("$PYTHON" ci/bench_save.py --device cuda --ranks 1 --rounds 2 --no-touch --folder "$RESULTS")
BENCH+=(--mib "${ACCEL_MIB:-512}" --only distckpt "distckpt background" "DCP save" "DCP async_save" "DCP async_save, pinned")

# run NAME LIMIT_S COMMAND...: run a stage, or print it.
run() {
    [[ " ${ONLY[*]} " == *" $1 "* ]] || return 0
    if [ "$LISTS" -eq 1 ]; then
        printf '%-10s %3d s  %s\n' "$1" "$2" "${*:3}"
    else
        stage "$@"
    fi
}

# Train, resume, and open the file.
train_and_open() {
    local here=("$ROOT/launch/torchrun.sh" --epochs)
    export SCRIPT="$ROOT/launch/train_fsdp.py" NPROC_PER_NODE=1
    bash "${here[@]}" 3 --output-dir "$RESULTS/train" && bash "${here[@]}" 5 --output-dir "$RESULTS/train" --resume &&
        "$PYTHON" launch/accuracy.py "$RESULTS/train/latest_checkpoint_5.pt"
}
export -f train_and_open
export ROOT RESULTS

# The limits add up to 6 minutes.
run contracts 70 "${PYTEST[@]}" tests/contracts -k nccl
run tests 80 "${PYTEST[@]}" tests/accel
run train 50 bash -c train_and_open
run save 80 "${BENCH[@]}"
run sharded 80 "${BENCH[@]}" --sharded

[ "$LISTS" -eq 0 ] || exit 0
summarize
[ "$FAILED" -eq 0 ]
