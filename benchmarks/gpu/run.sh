#!/bin/sh
# The GPU benchmark from a source tree, nothing installed: benchmarks/gpu/README.md.
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd) || exit 1
# Asked for by the environment, these would change what is measured.
unset TRITON_INTERPRET UMAMBA_SCAN
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 \
    exec "${PYTHON:-python3}" -P -m benchmarks.gpu.run "$@"
