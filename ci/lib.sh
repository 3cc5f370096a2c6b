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
