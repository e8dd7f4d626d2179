#!/bin/sh
# The GPU benchmark from a source tree, nothing installed: benchmarks/gpu/README.md.
cd "$(dirname "$0")/../.." || exit 1
# Asked for by the environment, these would change what is measured.
unset TRITON_INTERPRET UMAMBA_SCAN
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 \
    exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
