#!/usr/bin/env bash
# Set up, check, test and measure distckpt, on a fresh clone and a fresh machine. Every stage runs, whatever
# fails before it; a summary closes the output and the exit code says whether all is well.
#
#   ci/test.sh                       everything
#   ci/test.sh --checks              linters, types, layers, the wheel
#   ci/test.sh --tests               pytest only
#   ci/test.sh --fast                no crash tests, no benchmarks
#   ci/test.sh [...] -- -k retention     what follows goes to pytest
#
# DISTCKPT_WORKERS     pytest processes (2); each has a pool of ranks of its own
# DISTCKPT_LIMIT_S     limit for the tests, in seconds (2700)
# See ci/setup.sh for the environment's.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

CHECKS=1 TESTS=1 BENCHMARKS=1 FAST=0
while [ $# -gt 0 ]; do
    case "$1" in
        --checks) TESTS=0 BENCHMARKS=0 ;;
        --tests) CHECKS=0 BENCHMARKS=0 ;;
        --fast) FAST=1 BENCHMARKS=0 ;;
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
PYTHON="$(ci/setup.sh --print-python base)" || die "set-up failed, nothing was checked"
SUMMARY+=("$(printf '%-20s %5d s  %s' set-up "$SECONDS" ok)")
BIN="$(dirname "$PYTHON")"
# Tests start programs of the environment (torchrun) by name.
export PATH="$BIN:$PATH" PYTHONUNBUFFERED=1 PYTHONPATH="$ROOT"

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
fi
if [ "$TESTS" -eq 1 ]; then
    SELECTION=()
    [ "$FAST" -eq 0 ] || SELECTION=(-m "not crash")
    stage "pytest" "${DISTCKPT_LIMIT_S:-2700}" "$PYTHON" -m pytest -n "${DISTCKPT_WORKERS:-2}" --dist worksteal \
        --durations=10 "${SELECTION[@]}" "$@"
fi
if [ "$BENCHMARKS" -eq 1 ]; then
    for benchmark in ci/bench_*.py; do
        [ -e "$benchmark" ] || continue
        stage "$(basename "$benchmark" .py)" 900 env PYTHONPATH="$ROOT" "$PYTHON" "$benchmark" --quick
    done
fi

summarize
[ "$FAILED" -eq 0 ]
