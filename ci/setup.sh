#!/usr/bin/env bash
# Make the environments that checks and tests run in. Safe to repeat, and safe to start twice at once.
#
#   ci/setup.sh [NAME]                   make the environment unless it exists
#   ci/setup.sh --print-python [NAME]    the same, then print the path of its python on standard output
#
# NAME is one of
#   base       torch 2.13 and the linters and test tools; the default
#   horovod    torch 2.13 and Horovod 0.28, built from source: some minutes, once
#   xla        torch 2.9 and torch_xla 2.9, with the CUDA packages that this torch needs: about 7 GB
#   newest     torch 2.14.1 and otherwise as base, with the CUDA packages that this torch needs: about 6 GB
#   bench      torch 2.13, torchsnapshot and torch_checkpointing, for ci/bench_save.py
#   docs       mkdocs and its plugins, for ci/docs.sh; no torch
#   readme     what the README's install lines install, at base's versions
#   all        base, horovod, xla and newest; --print-python prints one path a line, in this order
#
# Environments live outside the tree, in ${DISTCKPT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distckpt}/env-NAME-HASH. The hash
# covers the pins and the Python version. Built wheels live beside them, in wheels/. The C extension is compiled into the
# tree (ci/build_native.py); git ignores it.
# pip's configuration decides where packages come from. DISTCKPT_PYTHON names the Python to build environments with.
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
        base | horovod | xla | newest | bench | docs | readme) NAMES=("$argument") ;;
        all) NAMES=(base horovod xla newest) ;;
        *) die "unknown environment or option '$argument'; environments: base, horovod, xla, newest, bench, docs, readme, all" ;;
    esac
done

# TOOL:PACKAGE pairs, the packages being Debian's. nbdkit's plugins are files, not commands.
TEST_TOOLS="strace:strace losetup:util-linux mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs unzip:unzip cc:gcc ip:iproute2
    nbdkit:nbdkit nbdfuse:libnbd-bin nbdkit-python-plugin.so:nbdkit-plugin-python"
BUILD_TOOLS="cmake:cmake make:make c++:g++"

# missing_packages TOOL:PACKAGE...: print the packages of the tools that are missing.
missing_packages() {
    local tool
    for tool in "$@"; do
        case "$tool" in
            *-plugin.so:*) compgen -G "/usr/lib/*/nbdkit/plugins/${tool%%:*}" || compgen -G "/usr/lib*/nbdkit/plugins/${tool%%:*}" ;;
            *) PATH="$PATH:/usr/sbin:/sbin" command -v "${tool%%:*}" ;;
        esac >/dev/null || printf '%s\n' "${tool##*:}"
    done
}

# install_system_tools TOOL:PACKAGE...: install the missing ones with apt-get where that is possible, else warn.
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
    [ "${#packages[@]}" -eq 0 ] || say "WARNING: missing ${packages[*]}: install them by hand, or tests that need them fail"
}

# The functions below work on the environment that NAME, PINS and ENVIRONMENT describe.

in_environment() { PJRT_DEVICE=CPU "$ENVIRONMENT/bin/python" "$@"; }

pip_install() {
    in_environment -m pip --disable-pip-version-check install \
        -qq --no-input --progress-bar off --no-deps "$@" # -qq: errors only
}

# contents_of NAME: print everything that decides what the environment contains, for its hash.
contents_of() {
    cat "$PINS"
    [ "$1" != readme ] || { install_lines && sed -n '/^\[build-system\]/,/^\[dependency-groups\]/p' "$ROOT/pyproject.toml"; }
}

# check_of NAME: print the program that checks that the environment works.
check_of() {
    case "$1" in
        base | newest) printf '%s\n' 'import torch, ignite, isal, accelerate, pytorch_lightning, transformers' ;;
        bench) printf '%s\n' 'import ignite, isal, torch_checkpointing, torchsnapshot' ;;
        readme) printf '%s\n' 'import distckpt' ;;
        docs) printf '%s\n' 'import material, mkdocs, mkdocstrings' ;;
        horovod) printf '%s\n' 'import horovod.torch as hvd; hvd.init(); assert hvd.size() == 1; hvd.shutdown()' ;;
        xla) printf '%s\n' 'import torch, torch_xla; assert torch.ones(2, device=torch_xla.device()).sum().item() == 2' ;;
    esac
}

# Horovod is built again only when one of these pins changes.
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

# Print the README's code block that installs distckpt.
install_lines() {
    awk '/^```/ { if (inside && block ~ /pip install/) printf "%s", block; inside = /^```sh$/; block = ""; next }
        inside { block = block $0 "\n" }' "$ROOT/README.md"
}

# Run the install lines unchanged. The pins are constraints only, so that pip does not fetch another torch.
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
    # --no-deps, because the pins are complete: no package can pull in another torch or unrequested CUDA packages.
    if grep -qE '^torch==' "$PINS"; then
        say "environment '$NAME': installing torch"
        pip_install "$(grep -E '^torch==' "$PINS")"
    fi
    say "environment '$NAME': installing $(grep -cE '^[A-Za-z0-9]' "$PINS") packages"
    pip_install --requirement "$PINS"
    [ "$NAME" != horovod ] || install_horovod
}

make_environment() {
    local log="$CACHE/check-$NAME.log"
    say "environment '$NAME': making $ENVIRONMENT"
    rm -rf "$ENVIRONMENT"
    "$PYTHON" -m venv "$ENVIRONMENT"
    if [ "$NAME" = readme ]; then install_as_the_readme_says; else install_pins; fi
    # -I: import the installed packages, not files of the current directory.
    in_environment -I -c "$(check_of "$NAME")" >"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        die "environment '$NAME' does not work: '$(check_of "$NAME")' failed as shown above. If pip chose a CUDA build" \
            "of torch for '$NAME' where none was wanted, set PIP_INDEX_URL to an index with CPU builds"
    }
    in_environment -m pip --disable-pip-version-check check >"$CACHE/pip-check.log" ||
        die "the pins of $PINS contradict each other: $(cat "$CACHE/pip-check.log")"
    touch "$MARKER" # last: an environment without the marker is incomplete, and is made again
}

PYTHON="$(find_python)"
VERSION="$("$PYTHON" -c 'import platform; print(platform.python_implementation(), platform.python_version())')"

mkdir -p "$CACHE" || die "cannot write to $CACHE; name another folder in DISTCKPT_CACHE"
exec 9>"$CACHE/setup.lock"
flock --nonblock 9 || {
    say "waiting for another set-up to finish"
    flock --timeout 1800 9 || die "another set-up has held $CACHE/setup.lock for 30 minutes"
}
# shellcheck disable=SC2086  # a list of words
[ "${NAMES[*]}" = readme ] || install_system_tools $TEST_TOOLS 9>&-
for NAME in "${NAMES[@]}"; do
    PINS="$ROOT/ci/requirements/$NAME.txt"
    [ "$NAME" != readme ] || PINS="$ROOT/ci/requirements/base.txt"
    ENVIRONMENT="$CACHE/env-$NAME-$({ contents_of "$NAME" && echo "$VERSION"; } | sha256sum | cut -c1-12)"
    MARKER="$ENVIRONMENT/.complete"
    [ -e "$MARKER" ] || make_environment 9>&-
    # For programs that import distckpt from this checkout; without the extension they are slower.
    in_environment "$ROOT/ci/build_native.py" 9>&- || say "WARNING: distckpt runs without its C extension, see above"
    say "environment '$NAME' is ready ($VERSION): $ENVIRONMENT"
    [ "$PRINT_PYTHON" -eq 0 ] || printf '%s\n' "$ENVIRONMENT/bin/python"
done
[ "${#NAMES[@]}" -eq 1 ] || say "all ${#NAMES[@]} environments are ready after $SECONDS s"
