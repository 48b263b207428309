"""How many examples a property is tried with: few in `make test`, all of them in `make sweeps`."""

from hypothesis import settings

FAST_EXAMPLES = 25


def examples(count: int) -> int:
    """`count`, or as many as the profile "fast" allows."""
    most = settings.default.max_examples
    return min(count, most) if most == FAST_EXAMPLES else count
