"""`merge-gate` and `python -m merge_gate`: the command line, reached before anything that takes time is imported."""

from __future__ import annotations

import signal


def main() -> int:
    """Run the command. A SIGINT while the imports go on ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from merge_gate.cli import main as run  # noqa: PLC0415 - see above

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
