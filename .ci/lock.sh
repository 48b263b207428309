#!/usr/bin/env bash
# requirements/*.in → requirements/*.txt, every file with its SHA-256. Needs uv.
#
#   TORCH_CPU='--find-links DIR' .ci/lock.sh    # DIR holds the CPU wheel of torch, or give an --extra-index-url
#
# The CPU build of torch has a version of its own (2.13.0+cpu) and is on the PyTorch project's wheel index only, so
# the image has two locks that differ in torch and in the CUDA libraries that its other build brings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../requirements"

torch_cpu=${TORCH_CPU:---extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match}
common=(--quiet --no-header --no-annotate --generate-hashes)
image=("${common[@]}" --python-version 3.11 --python-platform x86_64-manylinux_2_28 --only-binary :all:)

# shellcheck disable=SC2086 # options, to be split
sed 's/^\(torch==.*\)$/\1+cpu/' image.in | uv pip compile "${image[@]}" $torch_cpu --no-emit-find-links --no-emit-index-url -o image-cpu.txt -
uv pip compile "${image[@]}" -o image-cuda.txt image.in
uv pip compile "${common[@]}" --python-version 3.9 --python-platform linux -o launcher.txt launcher.in
uv pip compile "${common[@]}" --universal --python-version 3.11 -o build.txt build.in
uv pip compile "${common[@]}" --universal --python-version 3.11 --only-binary :all: -o audit.txt audit.in
uv pip compile "${common[@]}" --universal --python-version 3.11 --only-binary :all: -o e2e-tools.txt e2e-tools.in
