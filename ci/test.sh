#!/usr/bin/env bash
# Set up, check, test and benchmark distckpt; works on a fresh clone. All stages run even if an earlier one fails. A summary
# ends the output, and the exit code is 0 if every stage passed.
#
#   ci/test.sh                       every stage, on a selection of the tests' cases (aim: 12 minutes on two cores)
#   ci/test.sh --full                every stage, on all cases and crash trials, and on the newest torch: some hours
#   ci/test.sh --checks              linters, types, layers, the wheel, the documentation
#   ci/test.sh --tests               pytest only
#   ci/test.sh --fast                no crash tests, no benchmarks
#   ci/test.sh --crash               all trials of the crash tests, and nothing else: most of an hour
#   ci/test.sh --only NAME           the tests of one environment: base, horovod, xla or newest
#   ci/test.sh [...] -- -k retention     pass the rest to pytest, in each environment
#
# The tests in tests/contracts and tests/distributed run on torch.distributed, on Horovod and on torch_xla, each in its own
# environment. A report then shows every contract test x every backend. docs/harness.md describes the harness.
#
# DISTCKPT_WORKERS     pytest processes (3); each has its own pool of ranks, which wait most of the time
# DISTCKPT_LIMIT_S     limit for the tests of one environment, in seconds (2700; with --full or --crash 14400)
# ci/setup.sh lists the variables that decide where environments are.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

CHECKS=1 TESTS=1 BENCHMARKS=1 FAST=0 IS_FULL=0 SELECTION=() LIMIT_S=2700
RUNTIMES=(base horovod xla)
while [ $# -gt 0 ]; do
    case "$1" in
        --checks) TESTS=0 BENCHMARKS=0 ;;
        --tests) CHECKS=0 BENCHMARKS=0 ;;
        --fast) FAST=1 BENCHMARKS=0 ;;
        --full) IS_FULL=1 ;;
        --crash)
            SELECTION=(tests/crash) IS_FULL=1 RUNTIMES=(base) CHECKS=0 BENCHMARKS=0
            ;;
        --only)
            [[ "${2:-}" =~ ^(base|horovod|xla|newest)$ ]] ||
                die "--only takes base, horovod, xla or newest, but was given '${2:-}'"
            RUNTIMES=("$2") CHECKS=0 BENCHMARKS=0
            shift
            ;;
        -h | --help) usage && exit 0 ;;
        --) shift && break ;;
        *) die "unknown option '$1'; see --help. Arguments for pytest come after --" ;;
    esac
    shift
done
if [ "$IS_FULL" -eq 1 ]; then
    # No limit for a single test: some take many minutes, and have time limits of their own.
    SELECTION+=(--full -o faulthandler_timeout=0) LIMIT_S=14400
    [ "${#RUNTIMES[@]}" -lt 3 ] || RUNTIMES+=(newest)
fi

printf '=== set-up\n'
declare -A PYTHONS
ENVIRONMENTS=(base "${RUNTIMES[@]}")
[[ " ${RUNTIMES[*]} " != *" base "* ]] || ENVIRONMENTS+=(readme) # for the tests of the README's examples
for name in "${ENVIRONMENTS[@]}"; do
    [ -n "${PYTHONS[$name]:-}" ] && continue
    PYTHONS[$name]="$(ci/setup.sh --print-python "$name")" || die "the set-up of '$name' failed; nothing was checked"
done
SUMMARY+=("$(printf '%-20s %5d s  %s' set-up "$SECONDS" ok)")
PYTHON="${PYTHONS[base]}"
BIN="$(dirname "$PYTHON")"
RESULTS="$(mktemp -d)"
# Byte code is kept, in the usual __pycache__ folders: hundreds of processes import torch and distckpt, and each would
# compile what it imports. In a second run pytest finds the tests compiled, too.
unset PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX
export PATH="$BIN:$PATH" PYTHONUNBUFFERED=1 PYTHONPATH="$ROOT"
export MYPY_CACHE_DIR="${MYPY_CACHE_DIR:-$(dirname "$(dirname "$BIN")")/mypy}" # beside the environments: a fresh clone has none
trap 'end_stages; rm -rf "$RESULTS"' EXIT

# run_pytest STAGE NAME ARGUMENT...: run pytest in an environment, whose programs (torchrun) are on PATH. STAGE is stage or
# stage_beside.
run_pytest() {
    local run="$1" name="$2" python="${PYTHONS[$2]}"
    shift 2
    "$run" "pytest, $name" "${DISTCKPT_LIMIT_S:-$LIMIT_S}" env PATH="$(dirname "$python"):$PATH" "$python" -m pytest \
        -n "${DISTCKPT_WORKERS:-3}" --dist worksteal --durations=10 --outcomes "$RESULTS/$name.json" "$@"
}

# The folders that contain Python files.
FOLDERS=()
for folder in distckpt tests launch ci; do
    [ -z "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ] || FOLDERS+=("$folder")
done

if [ "$CHECKS" -eq 1 ]; then
    stage_beside "ruff check" 120 "$BIN/ruff" check "${FOLDERS[@]}"
    stage_beside "ruff format" 120 "$BIN/ruff" format --check "${FOLDERS[@]}"
    stage_beside "mypy --strict" 900 "$BIN/mypy" "${FOLDERS[@]}"
    stage_beside "import layers" 120 "$BIN/lint-imports" --no-logo
    stage_beside "wheel" 600 "$PYTHON" ci/check_wheel.py
    stage_beside "docs" 600 ci/docs.sh
    finish_stages
fi
if [ "$TESTS" -eq 1 ]; then
    [ "$FAST" -eq 0 ] || SELECTION+=(-m "not crash")
    for name in "${RUNTIMES[@]}"; do
        case "$name" in
            base) run_pytest stage base "${SELECTION[@]}" "$@" ;;
            newest) run_pytest stage newest -m "not crash" "${SELECTION[@]}" "$@" ;;
            # The ranks of these wait for each other most of the time.
            horovod)
                DISTCKPT_TEST_RUNTIME="$name" run_pytest stage_beside "$name" tests/contracts tests/distributed \
                    "${SELECTION[@]}" "$@"
                ;;
            # torch_xla 2.9 with two replicas in one process crashes in its own operations about once in a thousand tests.
            # pytest prints which tests it ran again. On other runtimes a crash is a failure.
            xla)
                DISTCKPT_TEST_RUNTIME="$name" run_pytest stage_beside "$name" tests/contracts tests/distributed -rR --reruns 1 \
                    --only-rerun "killed by signal 11" "${SELECTION[@]}" "$@"
                ;;
        esac
    done
    if [ "${#RUNTIMES[@]}" -ge 3 ]; then
        stage_beside "checkpoint matrix" 1800 env DISTCKPT_PYTHONS="$(
            printf '%s:' "${PYTHONS[base]}" "${PYTHONS[horovod]}" "${PYTHONS[xla]}"
        )" "$PYTHON" -m pytest tests/matrix
    fi
    finish_stages
    if [ "${#RUNTIMES[@]}" -ge 3 ] && [ $# -eq 0 ]; then
        stage "contract report" 60 "$PYTHON" ci/contract_report.py "$RESULTS"/{base,horovod,xla}.json
    fi
fi
if [ "$BENCHMARKS" -eq 1 ]; then
    # With --quick these only show that they work, so they need no machine of their own: the others hold ratios of times.
    BESIDE=(bench_integrations bench_save)
    for name in "${BESIDE[@]}"; do
        stage_beside "$name" 900 env PYTHONPATH="$ROOT" "$PYTHON" "ci/$name.py" --quick
    done
    stage_beside "bench_save, sharded" 900 env PYTHONPATH="$ROOT" "$PYTHON" ci/bench_save.py --sharded --quick
    finish_stages
    for benchmark in ci/bench_*.py; do
        name="$(basename "$benchmark" .py)"
        [[ " ${BESIDE[*]} " == *" $name "* ]] ||
            stage "$name" 900 env PYTHONPATH="$ROOT" "$PYTHON" "$benchmark" --quick
    done
fi

summarize
[ "$FAILED" -eq 0 ]
