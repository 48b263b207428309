"""Parameters of which `make test` tries a sample, and `make sweeps` the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], sample: Collection[Any]) -> list[Any]:
    """`values`, of which all but those of `sample` are marked slow. The id of one with a name is its name."""
    return [
        pytest.param(value, id=getattr(value, "name", None), marks=() if value in sample else pytest.mark.slow)
        for value in values
    ]
