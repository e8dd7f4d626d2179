#!/usr/bin/env bash
# Tries the README's two commands in a fresh clone of this checkout's HEAD, and times them.
# Usage: scripts/fresh_clone.sh [FOLDER]   (the folder must not exist; default: a temporary one)
set -euo pipefail
here=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
clone=${1:-$(mktemp -d)/umamba}
git clone --quiet "$here" "$clone"
cd "$clone"
for target in demo test; do
    started=$SECONDS
    make "$target"
    echo "make $target took $((SECONDS - started)) seconds"
done
