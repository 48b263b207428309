# ruff: noqa: INP001 # a script, not a package
"""Write the images of a release into src/merge_gate/action/docker/released_image.py.

    python3 .ci/pin_images.py ghcr.io/acme/merge-gate@sha256:… ghcr.io/acme/merge-gate@sha256:…

In: the references of the CPU and the CUDA variant, pinned by digest. Out: the module, its text unchanged around them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MODULE = Path(__file__).resolve().parents[1] / "src" / "merge_gate" / "action" / "docker" / "released_image.py"
PINNED = re.compile(r"[a-z0-9.:-]+(/[a-z0-9._-]+)+@sha256:[0-9a-f]{64}")


def pin(text: str, cpu: str, cuda: str) -> str:
    """Return the module's text with the two references in it."""
    for image in (cpu, cuda):
        if not PINNED.fullmatch(image):
            raise SystemExit(f"got {image!r}, expected NAME@sha256:DIGEST")
    if cpu == cuda:
        raise SystemExit("the CPU and the CUDA variant have the same digest")
    for name, image in (("CPU", cpu), ("CUDA", cuda)):
        text, count = re.subn(rf'^{name} = ".*"$', f'{name} = "{image}"', text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{MODULE} has {count} lines for {name}, expected 1")
    return text


if __name__ == "__main__":
    MODULE.write_text(pin(MODULE.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
