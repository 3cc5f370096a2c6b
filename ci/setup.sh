#!/usr/bin/env bash
# Make the environments that checks and tests run in, from nothing. Safe to repeat, and to start twice at once.
#
#   ci/setup.sh [NAME]                   make it, if it is not there yet
#   ci/setup.sh --print-python [NAME]    the same, then print the path of its python on standard output
#
# NAME is one of
#   base       torch 2.13 and the tools of the checks; what is taken without a name
#   horovod    torch 2.13 and Horovod 0.28, which is built from its source archive: some minutes, once
#   xla        torch 2.9 and torch_xla 2.9, with the CUDA packages that this torch asks for: about 7 GB
#   bench      torch 2.13 and torchsnapshot, for ci/bench_save.py
#   docs       what builds the documentation site (ci/docs.sh); no torch
#   readme     made by the install lines of the README and nothing else, at the versions of base
#   all        base, horovod and xla; with --print-python one path in each line, in this order
#
# An environment is kept outside the tree, under a name made of its pins and the Python version:
# ${DISTCKPT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distckpt}/env-NAME-<hash>; built wheels beside it, in wheels/.
# What distckpt has in C is compiled into the tree, where git ignores it (ci/build_native.py).
# Packages come from where pip is configured to look. DISTCKPT_PYTHON names another Python to make it with.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PRINT_PYTHON=0
NAMES=(base)
for argument in "$@"; do
    case "$argument" in
        --print-python) PRINT_PYTHON=1 ;;
        -h | --help) usage && exit 0 ;;
        base | horovod | xla | bench | docs | readme) NAMES=("$argument") ;;
        all) NAMES=(base horovod xla) ;;
        *) die "unknown environment or option '$argument'; there are: base, horovod, xla, bench, docs, readme, all" ;;
    esac
done

# Tools, each with the Debian package it comes in: those that tests start, and those that build Horovod.
# nbdkit's plugins are no commands.
TEST_TOOLS="strace:strace losetup:util-linux mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs unzip:unzip cc:gcc ip:iproute2
    nbdkit:nbdkit nbdfuse:libnbd-bin nbdkit-python-plugin.so:nbdkit-plugin-python"
BUILD_TOOLS="cmake:cmake make:make c++:g++"

# missing_packages TOOL:PACKAGE...
missing_packages() {
    local tool
    for tool in "$@"; do
        case "$tool" in
            *-plugin.so:*) compgen -G "/usr/lib/*/nbdkit/plugins/${tool%%:*}" || compgen -G "/usr/lib*/nbdkit/plugins/${tool%%:*}" ;;
            *) PATH="$PATH:/usr/sbin:/sbin" command -v "${tool%%:*}" ;;
        esac >/dev/null || printf '%s\n' "${tool##*:}"
    done
}

# install_system_tools TOOL:PACKAGE...
install_system_tools() {
    local packages
    mapfile -t packages < <(missing_packages "$@")
    [ "${#packages[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        say "system tools: installing ${packages[*]}"
        [[ " ${packages[*]} " != *" gcc "* ]] || packages+=(libc6-dev)
        local apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
        { "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends \
            "${packages[@]}"; } >"$CACHE/apt.log" 2>&1 || say "system tools: apt-get failed, see $CACHE/apt.log"
    fi
    mapfile -t packages < <(missing_packages "$@")
    [ "${#packages[@]}" -eq 0 ] ||
        say "WARNING: missing ${packages[*]} (install by hand); what needs them cannot run"
}

# From here on NAME, PINS and ENVIRONMENT are those of the environment that is being made.

in_environment() { PJRT_DEVICE=CPU "$ENVIRONMENT/bin/python" "$@"; }

pip_install() {
    in_environment -m pip --disable-pip-version-check install \
        -qq --no-input --progress-bar off --no-deps "$@" # -qq: errors only
}

# What an environment is made of, beside the Python: its name is made of it.
made_of() {
    cat "$PINS"
    [ "$1" != readme ] || { install_lines && sed -n '/^\[build-system\]/,/^\[dependency-groups\]/p' "$ROOT/pyproject.toml"; }
}

# What proves that an environment works.
proof_of() {
    case "$1" in
        base) printf '%s\n' 'import torch' ;;
        bench) printf '%s\n' 'import ignite, isal, torchsnapshot' ;;
        readme) printf '%s\n' 'import distckpt' ;;
        docs) printf '%s\n' 'import material, mkdocs, mkdocstrings' ;;
        horovod) printf '%s\n' 'import horovod.torch as hvd; hvd.init(); assert hvd.size() == 1; hvd.shutdown()' ;;
        xla) printf '%s\n' 'import torch, torch_xla; assert torch.ones(2, device=torch_xla.device()).sum().item() == 2' ;;
    esac
}

# The pins that Horovod is built with: another version of a test's tool is no reason to build it anew.
BUILD_PINS='^(torch|setuptools|wheel|cffi|cloudpickle|psutil|PyYAML|packaging)=='

install_horovod() {
    local wheels
    wheels="$({ grep -E "$BUILD_PINS" "$PINS" && cat "$ROOT/ci/horovod_wheel.sh" && echo "$VERSION"; } | sha256sum)"
    wheels="$CACHE/wheels/${wheels:0:12}"
    if [ ! -d "$wheels" ]; then
        say "environment '$NAME': building Horovod, which takes some minutes"
        # shellcheck disable=SC2086  # a list of words
        install_system_tools $BUILD_TOOLS
        mkdir -p "$CACHE/wheels"
        "$ROOT/ci/horovod_wheel.sh" "$ENVIRONMENT/bin/python" "$wheels"
    fi
    pip_install "$wheels"/horovod-*.whl
}

# The block of the README that installs.
install_lines() {
    awk '/^```/ { if (inside && block ~ /pip install/) printf "%s", block; inside = /^```sh$/; block = ""; next }
        inside { block = block $0 "\n" }' "$ROOT/README.md"
}

# Run it as it stands; the pins only say which versions it gets, so that nothing fetches another torch.
install_as_the_readme_says() {
    (
        cd "$ROOT"
        unset PYTHONPATH
        export PATH="$ENVIRONMENT/bin:$PATH" PIP_CONSTRAINT="$PINS" PIP_BUILD_CONSTRAINT="$PINS"
        export PIP_QUIET=2 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_DISABLE_PIP_VERSION_CHECK=1
        bash -euc "$(install_lines)" >&2
    )
}

install_pins() {
    # Torch on its own and first; --no-deps throughout, since the pins are complete: nothing can pull in
    # another torch, or gigabytes of CUDA packages that were not asked for.
    if grep -qE '^torch==' "$PINS"; then
        say "environment '$NAME': installing torch"
        pip_install "$(grep -E '^torch==' "$PINS")"
    fi
    say "environment '$NAME': installing $(grep -cE '^[A-Za-z0-9]' "$PINS") packages"
    pip_install --requirement "$PINS"
    [ "$NAME" != horovod ] || install_horovod
}

make_environment() {
    local log="$CACHE/proof-$NAME.log"
    say "environment '$NAME': making $ENVIRONMENT"
    rm -rf "$ENVIRONMENT"
    "$PYTHON" -m venv "$ENVIRONMENT"
    if [ "$NAME" = readme ]; then install_as_the_readme_says; else install_pins; fi
    # -I: what is installed counts, not what lies in the present directory.
    in_environment -I -c "$(proof_of "$NAME")" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        die "environment '$NAME' does not work: '$(proof_of "$NAME")' failed as shown above. If pip chose a CUDA build" \
            "of torch for '$NAME' where there was to be none, give it an index with CPU builds (PIP_INDEX_URL)"
    }
    in_environment -m pip --disable-pip-version-check check >"$CACHE/pip-check.log" ||
        die "the pins of $PINS do not fit together: $(cat "$CACHE/pip-check.log")"
    touch "$MARKER" # last: an environment without it is half made, and is made anew
}

PYTHON="$(find_python)"
VERSION="$("$PYTHON" -c 'import platform; print(platform.python_implementation(), platform.python_version())')"

mkdir -p "$CACHE" || die "cannot write to $CACHE; name another folder in DISTCKPT_CACHE"
exec 9>"$CACHE/setup.lock"
flock --nonblock 9 || {
    say "waiting for another set-up to finish"
    flock --timeout 1800 9 || die "another set-up holds $CACHE/setup.lock for 30 minutes"
}
# shellcheck disable=SC2086  # a list of words
[ "${NAMES[*]}" = readme ] || install_system_tools $TEST_TOOLS 9>&-
for NAME in "${NAMES[@]}"; do
    PINS="$ROOT/ci/requirements/$NAME.txt"
    [ "$NAME" != readme ] || PINS="$ROOT/ci/requirements/base.txt"
    ENVIRONMENT="$CACHE/env-$NAME-$({ made_of "$NAME" && echo "$VERSION"; } | sha256sum | cut -c1-12)"
    MARKER="$ENVIRONMENT/.complete"
    [ -e "$MARKER" ] || make_environment 9>&-
    # For programs that import distckpt from this checkout; they run without it too, more slowly.
    in_environment "$ROOT/ci/build_native.py" 9>&- || say "WARNING: distckpt runs without its code in C, see above"
    say "environment '$NAME' is ready ($VERSION): $ENVIRONMENT"
    [ "$PRINT_PYTHON" -eq 0 ] || printf '%s\n' "$ENVIRONMENT/bin/python"
done
[ "${#NAMES[@]}" -eq 1 ] || say "all ${#NAMES[@]} environments are ready, in $SECONDS s"
