"""Starts the command line for `merge-gate` and `python -m merge_gate`, without slow imports."""

from __future__ import annotations

import gc
import signal


def main() -> int:
    """Run the command. A SIGINT during the imports ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(10_000, 10, 100)  # look for garbage rarely: a fleet's records live to the end
    from merge_gate.cli.dispatch import main as run  # noqa: PLC0415 - see above

    code = run()
    gc.freeze()  # else the interpreter looks through all that is left at its end: of a fleet, for a tenth of a second
    return code


if __name__ == "__main__":
    raise SystemExit(main())
