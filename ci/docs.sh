#!/usr/bin/env bash
# Build the documentation site into build/site. A warning fails the build.
#
#   ci/docs.sh               build
#   ci/docs.sh --serve       build, serve on a port of this machine, and build again on each change
set -euo pipefail
exec </dev/null

# shellcheck source=ci/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

COMMAND=(build --strict --quiet)
case "${1:-}" in
    "") ;;
    --serve) COMMAND=(serve) ;;
    -h | --help) usage && exit 0 ;;
    *) die "unknown option '$1'; see --help" ;;
esac
PYTHON="$(ci/setup.sh --print-python docs)"
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs "${COMMAND[@]}" --config-file ci/mkdocs.yml
