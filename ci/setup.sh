#!/usr/bin/env bash
# Make the environment that checks and tests run in, from nothing. Safe to repeat, and to start twice at once.
#
#   ci/setup.sh [base]                   make it, if it is not there yet
#   ci/setup.sh --print-python [base]    the same, then print the path of its python on standard output
#
# The environment is kept outside the tree, under a name made of its pins and the Python version:
# ${DISTCKPT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distckpt}/env-base-<hash>. Packages come from where
# pip is configured to look. DISTCKPT_PYTHON names another Python to make it with.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PRINT_PYTHON=0
NAME=base
for argument in "$@"; do
    case "$argument" in
        --print-python) PRINT_PYTHON=1 ;;
        -h | --help) usage && exit 0 ;;
        base) NAME="$argument" ;;
        *) die "unknown environment or option '$argument'; there is: base" ;;
    esac
done
PINS="$ROOT/ci/requirements/$NAME.txt"

# Tools that tests start, each with the Debian package it comes in.
TOOLS="strace:strace losetup:util-linux mkfs.ext4:e2fsprogs unzip:unzip cc:gcc ip:iproute2"

missing_packages() {
    local tool
    for tool in $TOOLS; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${tool%%:*}" >/dev/null || printf '%s\n' "${tool##*:}"
    done
}

install_system_tools() {
    local packages
    mapfile -t packages < <(missing_packages)
    [ "${#packages[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        say "system tools: installing ${packages[*]}"
        [[ " ${packages[*]} " != *" gcc "* ]] || packages+=(libc6-dev)
        local apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
        { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends \
            "${packages[@]}"; } >"$CACHE/apt.log" 2>&1 || say "system tools: apt-get failed, see $CACHE/apt.log"
    fi
    mapfile -t packages < <(missing_packages)
    [ "${#packages[@]}" -eq 0 ] ||
        say "WARNING: missing ${packages[*]} (install by hand); tests that need them cannot run"
}

pip_install() {
    "$ENVIRONMENT/bin/python" -m pip --disable-pip-version-check install \
        -qq --no-input --progress-bar off --no-deps "$@" # -qq: errors only
}

make_environment() {
    say "environment '$NAME': making $ENVIRONMENT"
    rm -rf "$ENVIRONMENT"
    "$PYTHON" -m venv "$ENVIRONMENT"
    # Torch on its own and first; --no-deps throughout, since the pins are complete: nothing can pull in
    # another torch, or the gigabytes of CUDA packages that a build for GPUs asks for.
    say "environment '$NAME': installing torch"
    pip_install "$(grep -E '^torch==' "$PINS")"
    say "environment '$NAME': installing $(grep -cE '^[A-Za-z0-9]' "$PINS") packages"
    pip_install --requirement "$PINS"
    "$ENVIRONMENT/bin/python" -c 'import torch' ||
        die "torch does not import; if pip chose a CUDA build, give it an index with CPU builds (PIP_INDEX_URL)"
    "$ENVIRONMENT/bin/python" -m pip --disable-pip-version-check check >"$CACHE/pip-check.log" ||
        die "the pins of $PINS do not fit together: $(cat "$CACHE/pip-check.log")"
    touch "$MARKER" # last: an environment without it is half made, and is made anew
}

PYTHON="$(find_python)"
VERSION="$("$PYTHON" -c 'import platform; print(platform.python_implementation(), platform.python_version())')"
HASH="$({ cat "$PINS" && echo "$VERSION"; } | sha256sum | cut -c1-12)"
ENVIRONMENT="$CACHE/env-$NAME-$HASH"
MARKER="$ENVIRONMENT/.complete"

mkdir -p "$CACHE" || die "cannot write to $CACHE; name another folder in DISTCKPT_CACHE"
exec 9>"$CACHE/setup.lock"
flock --nonblock 9 || {
    say "waiting for another set-up to finish"
    flock --timeout 1800 9 || die "another set-up holds $CACHE/setup.lock for 30 minutes"
}
install_system_tools 9>&-
[ -e "$MARKER" ] || make_environment 9>&-

say "environment '$NAME' is ready ($VERSION): $ENVIRONMENT"
[ "$PRINT_PYTHON" -eq 0 ] || printf '%s\n' "$ENVIRONMENT/bin/python"
