"""GPUs up to the driver: Docker Engine, stand-ins for the hook and the CDI specification of NVIDIA's toolkit.

In: directories for what they write. Out: an engine that runs, and the containers as the toolkit sees them.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.e2e.act import TAG
from tests.support.e2e.engines import answering

UUIDS = ("GPU-fef8089b-4820-abfc-e83e-94318197576e", "GPU-0a53c6ce-5b0b-1b6e-9a1c-0d2c0c8e2b11")


@dataclass(frozen=True)
class Hook:
    """The toolkit's hook, under the name that Docker looks for on its PATH."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "nvidia-container-runtime-hook"

    def write(self) -> None:
        text = Path(__file__).with_name("nvidia_hook.py").read_text(encoding="utf-8")
        self.program.write_text(f"#!{sys.executable}\nUUIDS = {UUIDS}\n{text}", encoding="utf-8")
        self.program.chmod(0o755)

    def container(self) -> dict[str, Any] | None:
        """Return the OCI configuration of the container that the hook got since the last call; None if it got none."""
        note = self.folder / "container.json"
        try:
            return json.loads(note.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        finally:
            note.unlink(missing_ok=True)


def cdi_specification(**edits: Any) -> str:
    """A specification like that of `nvidia-ctk cdi generate` for two GPUs. Each device is /dev/null.

    Args:
        edits: what every container gets besides the devices, as CDI's `containerEdits`.
    """
    cards = [{"path": f"/dev/nvidia{number}", "hostPath": "/dev/null"} for number in range(len(UUIDS))]
    nodes = {"all": cards, **{str(number): [card] for number, card in enumerate(cards)}}
    devices = [{"name": name, "containerEdits": {"deviceNodes": listed}} for name, listed in nodes.items()]
    specification = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "containerEdits": edits, "devices": devices}
    return json.dumps(specification)


@contextlib.contextmanager
def docker_engine(home: Path, hook: Hook | None) -> Iterator[str]:
    """Start the Docker Engine of .ci/install-e2e.sh, and return its address. With a hook, it also has CDI.

    Its files are in memory: a disk that other tests use takes a minute to remove an image.
    """
    programs = [home / "docker" / "usr" / name for name in ("sbin", "bin")]
    assert (programs[0] / "dockerd").is_file(), f"no Docker Engine in {home}: run .ci/install-e2e.sh first"
    with tempfile.TemporaryDirectory(prefix="docker-") as directory:
        place = Path(directory)
        settings: dict[str, Any] = {}
        if hook:
            (place / "nvidia.json").write_text(cdi_specification(), encoding="utf-8")
            settings = {"features": {"cdi": True}, "cdi-spec-dirs": [directory]}
            programs.append(hook.folder)
        (place / "daemon.conf").write_text(json.dumps(settings), encoding="utf-8")
        (place / "data").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", place / "data"], check=True)
        words = [
            str(programs[0] / "dockerd"), "--log-level=error", "--bridge=none", "--iptables=false",
            "--ip6tables=false", f"--config-file={place}/daemon.conf", f"--data-root={place}/data",
            f"--exec-root={place}/exec", f"--pidfile={place}/pid", f"--host=unix://{place}/docker.sock",
            f"--containerd-namespace=merge-gate-{TAG}",
        ]  # fmt: skip
        environ = {**os.environ, "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]])}
        try:
            with answering(words, environ, place / "docker.sock"):
                yield f"unix://{place}/docker.sock"
        finally:
            subprocess.run(["umount", place / "data"], check=True)
