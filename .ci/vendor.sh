#!/usr/bin/env bash
# requirements/launcher.txt → vendor/*.whl: the Docker SDK that the action carries, as the package index has it, by hash.
#
# Pure Python wheels for the oldest Python that a runner may have; they are imported as they lie there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
rm -f vendor/*.whl
"$python" -m pip download --quiet --no-deps --require-hashes --only-binary :all: --dest vendor \
  --platform any --implementation py --abi none --python-version 3.9 --requirement requirements/launcher.txt
ls -l vendor
