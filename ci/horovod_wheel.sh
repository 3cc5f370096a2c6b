#!/usr/bin/env bash
# Build the wheel of Horovod, from its source archive on PyPI, for the environment that it is to be installed in. That
# one has to hold torch and the wheel's needs already: see ci/requirements/horovod.txt.
#
#   ci/horovod_wheel.sh PYTHON FOLDER     PYTHON: that environment's; FOLDER: where the wheel is put, once it is whole
#
# Three to six minutes on two cores. Needs cmake, make and a C++ compiler. The log is left beside FOLDER.
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -eq 2 ] || { usage >&2 && exit 2; }
PYTHON="$1" FOLDER="$2"
VERSION=0.28.1
SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# torch's headers ask for a newer C++ than the archive's build files do.
CXX_STANDARD=20
LOG="$FOLDER.log"
WORK="$FOLDER.work"

for tool in cmake make c++; do
    command -v "$tool" >/dev/null || die "$tool is missing, and Horovod has to be built (Debian: cmake, make, g++)"
done

# while_it_runs LABEL COMMAND...: run it, its output in the log, and say every 30 s that it is still at work.
while_it_runs() {
    local label="$1" begin="$SECONDS" pid status=0
    shift
    "$@" >>"$LOG" 2>&1 &
    pid=$!
    while sleep 1 && kill -0 "$pid" 2>/dev/null; do
        [ $(((SECONDS - begin) % 30)) -ne 29 ] || say "$label: at work for $((SECONDS - begin + 1)) s"
    done
    wait "$pid" || status=$?
    [ "$status" -eq 0 ] || {
        tail -n 30 "$LOG" >&2
        die "$label failed (exit code $status); the end of $LOG stands above"
    }
    say "$label: done in $((SECONDS - begin)) s"
}

pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }

rm -rf "$WORK" "$LOG"
mkdir -p "$WORK"
while_it_runs "Horovod's source archive" pip download --no-binary :all: --no-deps --no-build-isolation \
    --dest "$WORK" "horovod==$VERSION"
ARCHIVE="$WORK/horovod-$VERSION.tar.gz"
printf '%s  %s\n' "$SHA256" "$ARCHIVE" | sha256sum --check --quiet - || die "$ARCHIVE is not the archive that was pinned"
tar -xzf "$ARCHIVE" -C "$WORK"
SOURCE="$WORK/horovod-$VERSION"
for file in "$SOURCE/CMakeLists.txt" "$SOURCE/horovod/torch/CMakeLists.txt"; do
    grep -q 'set(CMAKE_CXX_STANDARD 14)' "$file" || die "$file does not set the C++ standard as it did"
    sed -i "s/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD $CXX_STANDARD)/" "$file"
done
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1
export HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
PATH="$(dirname "$PYTHON"):$PATH" while_it_runs "Horovod's wheel" pip wheel --no-build-isolation --no-deps \
    --wheel-dir "$WORK/wheel" "$SOURCE"
rm -rf "$FOLDER"
mv "$WORK/wheel" "$FOLDER" # in one step: a folder of that name holds a whole wheel
rm -rf "$WORK"
