"""Stands in for the hook of NVIDIA's Container Toolkit: notes the container, and gives device files without a driver.

docker_engine.py puts an interpreter and UUIDS before it. With `prestart` it is the hook that Docker starts: like
NVIDIA's, it reads NVIDIA_VISIBLE_DEVICES of the container, of which the last one counts, and fails for a GPU that does
not exist. Otherwise it is a hook of a CDI specification, which only notes the container.
"""

import json
import subprocess
import sys
from pathlib import Path

state = json.load(sys.stdin)
config = json.loads(Path(state["bundle"], "config.json").read_text())
Path(__file__).with_name("container.json").write_text(json.dumps(config))
variables = dict(variable.split("=", 1) for variable in config["process"]["env"])
known = {"all": [0, 1], "0": [0], "1": [1], UUIDS[0]: [0], UUIDS[1]: [1]}  # noqa: F821 - see above
for name in variables["NVIDIA_VISIBLE_DEVICES"].split(",") if sys.argv[1:] == ["prestart"] else []:
    if name not in known:
        sys.exit(f"nvidia-container-cli: device error: {name}: unknown device")
    for number in known[name]:
        file = f"{config['root']['path']}/dev/nvidia{number}"
        subprocess.run(["nsenter", f"--target={state['pid']}", "--mount", "touch", file], check=True)
