"""`python -m merge_gate` is the command `merge-gate`."""

from merge_gate.cli import main

raise SystemExit(main())
