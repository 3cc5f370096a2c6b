#!/usr/bin/env bash
# Set up, check, test and measure distckpt, on a fresh clone and a fresh machine. Every stage runs, whatever
# fails before it; a summary closes the output and the exit code says whether all is well.
#
#   ci/test.sh                       everything
#   ci/test.sh --checks              linters, types, layers, the wheel
#   ci/test.sh --tests               pytest only
#   ci/test.sh --fast                no crash tests, no benchmarks
#   ci/test.sh --crash               the crash tests only, and the whole of them: thousands of trials, most of an hour. All the
#                                    others run a quick selection. Either prints how many trials it was
#   ci/test.sh --only NAME           the tests of one environment: base, horovod or xla
#   ci/test.sh [...] -- -k retention     what follows goes to pytest, in each environment
#
# The tests of the ranks (contract, handlers, faults) run three times: on torch.distributed, on Horovod and on torch_xla,
# each in an environment of its own. After all three, a report shows every test of the contract x every backend.
#
# DISTCKPT_WORKERS     pytest processes (3); each has a pool of ranks of its own, and ranks wait most of the time
# DISTCKPT_LIMIT_S     limit for the tests of one environment, in seconds (2700; with --crash 7200)
# See ci/setup.sh for the environments'.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

CHECKS=1 TESTS=1 BENCHMARKS=1 FAST=0 SELECTION=() LIMIT_S=2700
RUNTIMES=(base horovod xla)
while [ $# -gt 0 ]; do
    case "$1" in
        --checks) TESTS=0 BENCHMARKS=0 ;;
        --tests) CHECKS=0 BENCHMARKS=0 ;;
        --fast) FAST=1 BENCHMARKS=0 ;;
        --crash)
            # A test of the whole takes minutes, and has limits of its own.
            SELECTION=(tests/crash -o faulthandler_timeout=0) LIMIT_S=7200 RUNTIMES=(base) CHECKS=0 BENCHMARKS=0
            export DISTCKPT_CRASH=whole
            ;;
        --only)
            [[ "${2:-}" =~ ^(base|horovod|xla)$ ]] || die "--only takes base, horovod or xla, but was given '${2:-}'"
            RUNTIMES=("$2") CHECKS=0 BENCHMARKS=0
            shift
            ;;
        -h | --help) usage && exit 0 ;;
        --) shift && break ;;
        *) die "unknown option '$1'; see --help. Arguments for pytest come after --" ;;
    esac
    shift
done

SUMMARY=()
FAILED=0

# stage NAME LIMIT_S COMMAND...: run it, time it, remember how it went.
stage() {
    local name="$1" limit_s="$2" begin="$SECONDS" status=0 verdict
    shift 2
    printf '\n=== %s\n' "$name"
    timeout --foreground --kill-after=20 "$limit_s" "$@" || status=$?
    case "$status" in
        0) verdict=ok ;;
        124 | 137) verdict="FAILED (over its limit of $limit_s s)" ;;
        *) verdict="FAILED (exit code $status)" ;;
    esac
    [ "$status" -eq 0 ] || FAILED=$((FAILED + 1))
    SUMMARY+=("$(printf '%-20s %5d s  %s' "$name" $((SECONDS - begin)) "$verdict")")
}

summarize() {
    printf '\n=== summary\n'
    printf '%s\n' "${SUMMARY[@]}"
    if [ "$FAILED" -eq 0 ]; then
        printf 'all %d stages passed in %d s\n' "${#SUMMARY[@]}" "$SECONDS"
    else
        printf '%d of %d stages FAILED, %d s\n' "$FAILED" "${#SUMMARY[@]}" "$SECONDS"
    fi
}

printf '=== set-up\n'
declare -A PYTHONS
ENVIRONMENTS=(base "${RUNTIMES[@]}")
[[ " ${RUNTIMES[*]} " != *" base "* ]] || ENVIRONMENTS+=(readme) # its tests run the README's examples there
for name in "${ENVIRONMENTS[@]}"; do
    [ -n "${PYTHONS[$name]:-}" ] && continue
    PYTHONS[$name]="$(ci/setup.sh --print-python "$name")" || die "the set-up of '$name' failed, nothing was checked"
done
SUMMARY+=("$(printf '%-20s %5d s  %s' set-up "$SECONDS" ok)")
PYTHON="${PYTHONS[base]}"
BIN="$(dirname "$PYTHON")"
export PATH="$BIN:$PATH" PYTHONUNBUFFERED=1 PYTHONPATH="$ROOT"
RESULTS="$(mktemp -d)"
trap 'rm -rf "$RESULTS"' EXIT

# tests_of NAME ARGUMENT...: run pytest in an environment. Tests start programs of it (torchrun) by name.
tests_of() {
    local name="$1" python="${PYTHONS[$1]}"
    shift
    stage "pytest, $name" "${DISTCKPT_LIMIT_S:-$LIMIT_S}" env PATH="$(dirname "$python"):$PATH" "$python" -m pytest \
        -n "${DISTCKPT_WORKERS:-3}" --dist worksteal --durations=10 --outcomes "$RESULTS/$name.json" "$@"
}

# The folders that hold Python: a clone may be ahead of, or behind, the list in pyproject.toml.
FOLDERS=()
for folder in distckpt tests launch ci; do
    [ -z "$(find "$folder" -name '*.py' -print -quit 2>/dev/null)" ] || FOLDERS+=("$folder")
done

if [ "$CHECKS" -eq 1 ]; then
    stage "ruff check" 120 "$BIN/ruff" check "${FOLDERS[@]}"
    stage "ruff format" 120 "$BIN/ruff" format --check "${FOLDERS[@]}"
    stage "mypy --strict" 900 "$BIN/mypy" "${FOLDERS[@]}"
    stage "import layers" 120 "$BIN/lint-imports" --no-logo
    stage "wheel" 300 "$PYTHON" ci/check_wheel.py
    stage "docs" 300 ci/docs.sh
fi
if [ "$TESTS" -eq 1 ]; then
    [ "$FAST" -eq 0 ] || SELECTION+=(-m "not crash")
    for name in "${RUNTIMES[@]}"; do
        case "$name" in
            base) tests_of base "${SELECTION[@]}" "$@" ;;
            horovod) DISTCKPT_TEST_RUNTIME="$name" tests_of "$name" tests/contracts tests/distributed "${SELECTION[@]}" "$@" ;;
            # torch_xla 2.9 with two replicas in one process crashes by itself about once in some thousand tests, in its
            # own operations (pytest prints which test was run again). Elsewhere such a crash would be ours.
            xla)
                DISTCKPT_TEST_RUNTIME="$name" tests_of "$name" tests/contracts tests/distributed -rR --reruns 1 \
                    --only-rerun "killed by signal 11" "${SELECTION[@]}" "$@"
                ;;
        esac
    done
    if [ "${#RUNTIMES[@]}" -eq 3 ]; then
        stage "checkpoint matrix" 600 env DISTCKPT_PYTHONS="$(
            printf '%s:' "${PYTHONS[base]}" "${PYTHONS[horovod]}" "${PYTHONS[xla]}"
        )" "$PYTHON" -m pytest tests/matrix
    fi
    if [ "${#RUNTIMES[@]}" -eq 3 ] && [ $# -eq 0 ]; then
        stage "contract report" 60 "$PYTHON" ci/contract_report.py "$RESULTS"/{base,horovod,xla}.json
    fi
fi
if [ "$BENCHMARKS" -eq 1 ]; then
    for benchmark in ci/bench_*.py; do
        [ -e "$benchmark" ] || continue
        stage "$(basename "$benchmark" .py)" 900 env PYTHONPATH="$ROOT" "$PYTHON" "$benchmark" --quick
    done
fi

summarize
[ "$FAILED" -eq 0 ]
