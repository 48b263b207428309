"""A launcher in a process of its own, with a token to look for."""

TOKEN = "hf_aTokenThatNobodyFindsInWhatIsLeft"
LAUNCH = """
import os, sys
from pathlib import Path
from merge_gate.action.docker.container import TIMEOUT_S, ContainerRun
from merge_gate.action.docker.launcher import run_in_container
from merge_gate._internal.errors import GateError
config, output, image = sys.argv[1:]
run = ContainerRun(
    config=Path(config), workspace=Path(config).parent, output=Path(output), image=image, environ=dict(os.environ),
    timeout_s=float(os.environ.get("LIMIT", TIMEOUT_S)),
)
try:
    sys.exit(run_in_container(run, lambda data: (sys.stdout.buffer.write(data), sys.stdout.flush())))
except GateError as error:
    print(error.message)
    sys.exit(int(error.exit_code))
"""
