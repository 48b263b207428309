"""Gate an adapter in a Hugging Face Job on a CPU, wait for it, and end with the gate's result.

    HF_TOKEN=... python hf_job.py BASE ADAPTER [--flavor cpu-upgrade] [--timeout 1h]

Needs `pip install huggingface_hub` here, and a plan that includes Jobs. The job's only input is its command line; its
token reads BASE and ADAPTER, so give it one that may read and not write. The verdicts are in the job's log: the script
prints it, and the page of the job keeps it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

IMAGE = "ghcr.io/OWNER/merge-gate:1.0.0-cpu"  # by digest, as the release names it
WAIT_S = 10
ENDED = {"COMPLETED": 0, "ERROR": 1, "CANCELED": 3, "DELETED": 3}
"""The exit code for each stage in which a job has ended. A job keeps no exit code: its log says which error it was."""


def command(base: str, adapter: str) -> list[str]:
    """The command inside the image."""
    return [
        "/opt/merge-gate/bin/python", "-I", "/opt/merge-gate/entrypoint.py",
        "run", f"--base={base}", "--access=stream", "--output=/tmp/merge-gate-report", "--", adapter,
    ]  # fmt: skip


def gate(hub: Any, base: str, adapter: str, *, flavor: str, timeout: str, token: str) -> int:
    """Run the job, print its log, and return the exit code.

    Args:
        hub: the module huggingface_hub.
        base: a Hub id.
        adapter: a Hub id.
        flavor: a machine of Hugging Face.
        timeout: how long the job may take, such as `1h`.
        token: may read base and adapter. The job gets it as a secret, which its page does not show.
    """
    job = hub.run_job(
        image=IMAGE, command=command(base, adapter), flavor=flavor, timeout=timeout, secrets={"HF_TOKEN": token}
    )
    sys.stdout.write(f"{job.url}\n")
    for line in hub.fetch_job_logs(job_id=job.id, follow=True):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    while (stage := _stage(hub, job.id)) not in ENDED:
        time.sleep(WAIT_S)
    return ENDED[stage]


def _stage(hub: Any, job_id: str) -> str:
    stage = hub.inspect_job(job_id=job_id).status.stage
    return str(getattr(stage, "value", stage))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Gate an adapter in a Hugging Face Job.")
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--flavor", default="cpu-upgrade")
    parser.add_argument("--timeout", default="1h")
    given = parser.parse_args(words)
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        parser.error("set HF_TOKEN to a token that may read the base and the adapter")
    import huggingface_hub  # noqa: PLC0415 - `--help` works without it

    return gate(huggingface_hub, given.base, given.adapter, flavor=given.flavor, timeout=given.timeout, token=token)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
