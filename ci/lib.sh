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
