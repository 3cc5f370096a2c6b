#!/usr/bin/env bash
# Build Horovod's wheel from its source archive on PyPI. Needs cmake, make and a C++ compiler, and takes three to six
# minutes on two cores.
#
#   ci/horovod_wheel.sh PYTHON FOLDER
#
# PYTHON is the python of the environment that the wheel is for; torch and the build requirements are installed there
# (ci/requirements/horovod.txt). FOLDER receives the complete wheel, FOLDER.log the log.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -eq 2 ] || { usage >&2 && exit 2; }
PYTHON="$1" FOLDER="$2"
VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# torch's headers need a newer C++ standard than the archive's build files set.
CXX_STANDARD=20
LOG="$FOLDER.log"
WORK="$FOLDER.work"

for tool in cmake make c++; do
    command -v "$tool" >/dev/null || die "$tool is missing; Horovod is built from source (Debian: cmake, make, g++)"
done

# run_logged LABEL COMMAND...: run the command with its output in the log, and print a line every 30 s.
run_logged() {
    local label="$1" begin="$SECONDS" pid status=0
    shift
    "$@" >>"$LOG" 2>&1 &
    pid=$!
    while sleep 1 && kill -0 "$pid" 2>/dev/null; do
        [ $(((SECONDS - begin) % 30)) -ne 29 ] || say "$label: running for $((SECONDS - begin + 1)) s"
    done
    wait "$pid" || status=$?
    [ "$status" -eq 0 ] || {
        tail -n 30 "$LOG" >&2
        die "$label failed (exit code $status); the end of $LOG is above"
    }
    say "$label: done in $((SECONDS - begin)) s"
}

pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }

rm -rf "$WORK" "$LOG"
mkdir -p "$WORK"
run_logged "Horovod's source archive" pip download --no-binary :all: --no-deps --no-build-isolation \
    --dest "$WORK" "horovod==$VERSION"
ARCHIVE="$WORK/horovod-$VERSION.tar.gz"
printf '%s  %s\n' "$SHA256" "$ARCHIVE" | sha256sum --check --quiet - || die "the checksum of $ARCHIVE differs from the pinned one"
tar -xzf "$ARCHIVE" -C "$WORK"
SOURCE="$WORK/horovod-$VERSION"
for file in "$SOURCE/CMakeLists.txt" "$SOURCE/horovod/torch/CMakeLists.txt"; do
    grep -q 'set(CMAKE_CXX_STANDARD 14)' "$file" || die "$file does not set C++ standard 14, so this script must be adapted"
    sed -i "s/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD $CXX_STANDARD)/" "$file"
done
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1
export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
PATH="$(dirname "$PYTHON"):$PATH" run_logged "Horovod's wheel" pip wheel --no-build-isolation --no-deps \
    --wheel-dir "$WORK/wheel" "$SOURCE"
rm -rf "$FOLDER"
mv "$WORK/wheel" "$FOLDER" # atomic: if FOLDER exists, its wheel is complete
rm -rf "$WORK"
