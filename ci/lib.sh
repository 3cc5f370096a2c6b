# Paths and functions shared by the scripts of ci/, which source this file.
# shellcheck shell=bash disable=SC2034  # its variables are for the scripts that source it

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CACHE="${DISTCKPT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distckpt}"

# say TEXT...: print progress on standard error; standard output is for a script's result.
say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# die TEXT...: print an error and exit.
die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# Print the usage text, which is the script's leading comment.
usage() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

# Print the command of a Python >= 3.11. The pins were tested with 3.11, so it comes first.
find_python() {
    local candidate
    for candidate in ${DISTCKPT_PYTHON:+"$DISTCKPT_PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    die "no Python 3.11 or newer with venv found; install one, or name it in DISTCKPT_PYTHON"
}

SUMMARY=()
FAILED=0

# stage NAME LIMIT_S COMMAND...: run and time the command, and record its result for `summarize`.
stage() {
    local name="$1" limit_s="$2" begin="$SECONDS" status=0
    shift 2
    printf '\n=== %s\n' "$name"
    timeout --foreground --kill-after=20 "$limit_s" "$@" || status=$?
    record_stage "$name" "$limit_s" $((SECONDS - begin)) "$status"
}

# record_stage NAME LIMIT_S SECONDS STATUS: record the result of a command for `summarize`.
record_stage() {
    local verdict
    case "$4" in
        0) verdict=ok ;;
        124 | 137) verdict="FAILED (over its limit of $2 s)" ;;
        *) verdict="FAILED (exit code $4)" ;;
    esac
    [ "$4" -eq 0 ] || FAILED=$((FAILED + 1))
    SUMMARY+=("$(printf '%-20s %5d s  %s' "$1" "$3" "$verdict")")
}

# The stages that run beside others, by process id. `end_stages` ends them; call it in an EXIT trap.
declare -A BESIDE_NAMES=() BESIDE_LIMITS=() BESIDE_OUTPUTS=()
BESIDE_PIDS=() BESIDE_BEGIN=0

# stage_beside NAME LIMIT_S COMMAND...: start the command; its output is printed by `finish_stages`, which has to follow.
stage_beside() {
    local name="$1" limit_s="$2" output
    shift 2
    [ "${#BESIDE_PIDS[@]}" -gt 0 ] || BESIDE_BEGIN="$(date +%s)"
    output="$(mktemp)"
    timeout --kill-after=20 "$limit_s" "$@" >"$output" 2>&1 &
    BESIDE_PIDS+=($!)
    BESIDE_NAMES[$!]="$name" BESIDE_LIMITS[$!]="$limit_s" BESIDE_OUTPUTS[$!]="$output"
}

# Wait for the stages that `stage_beside` has started, and print the output of each.
finish_stages() {
    local pid status ended
    while [ "${#BESIDE_PIDS[@]}" -gt 0 ]; do
        pid="${BESIDE_PIDS[0]}" status=0
        wait "$pid" || status=$?
        ended="$(date -r "${BESIDE_OUTPUTS[$pid]}" +%s)" # of its last output
        printf '\n=== %s\n' "${BESIDE_NAMES[$pid]}"
        cat "${BESIDE_OUTPUTS[$pid]}"
        rm -f "${BESIDE_OUTPUTS[$pid]}"
        record_stage "${BESIDE_NAMES[$pid]}" "${BESIDE_LIMITS[$pid]}" $((ended - BESIDE_BEGIN)) "$status"
        BESIDE_PIDS=("${BESIDE_PIDS[@]:1}")
    done
}

# End what `stage_beside` has started and `finish_stages` has not seen the end of.
end_stages() {
    local pid
    for pid in "${BESIDE_PIDS[@]}"; do
        kill "$pid" 2>/dev/null || true
        rm -f "${BESIDE_OUTPUTS[$pid]}"
    done
}

# Print the results of all stages.
summarize() {
    printf '\n=== summary\n'
    printf '%s\n' "${SUMMARY[@]}"
    if [ "$FAILED" -eq 0 ]; then
        printf 'all %d stages passed in %d s\n' "${#SUMMARY[@]}" "$SECONDS"
    else
        printf '%d of %d stages FAILED, %d s\n' "$FAILED" "${#SUMMARY[@]}" "$SECONDS"
    fi
}
