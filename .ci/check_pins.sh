#!/usr/bin/env bash
# Do the pins of requirements-dev.txt resolve where torch is its CUDA build? A machine without a GPU may have installed the
# CPU build, which asks for less (no triton, no nvidia-*). uv reads only metadata; settings and local folders that
# would bring a CPU wheel are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${1:-.venv/bin/uv}
resolved=$(mktemp)
trap 'rm -f "$resolved"' EXIT
env -u UV_FIND_LINKS -u UV_INDEX -u UV_EXTRA_INDEX_URL -u UV_TORCH_BACKEND \
  "$uv" pip compile --quiet --no-config --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  requirements-dev.txt --output-file "$resolved"
grep -q '^nvidia-cublas' "$resolved" || { echo "error: torch must resolve to its CUDA build, but nvidia-cublas is missing" >&2; exit 1; }
echo "the pins resolve with the CUDA build of torch: $(grep -c '^[a-z]' "$resolved") packages," \
  "$(grep -E '^(torch|triton)==' "$resolved" | tr '\n' ' ')"
