"""Marks for a table of attempts: one row of `make attempts` for each case of a parametrized test."""

from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import pytest
from _pytest.mark import ParameterSet


def tried(prefix: str, what: str, expected: str, cases: Mapping[str, object] | Sequence[str]) -> list[ParameterSet]:
    """The values of the cases as parameters, each with the id of its attempt: T05a, T05b, …"""
    if isinstance(cases, Sequence):
        cases = {case: case for case in cases}
    return [
        pytest.param(value, id=name, marks=pytest.mark.attempt(f"{prefix}{letter}", f"{what}: {name}", expected))
        for letter, (name, value) in zip(ascii_lowercase, cases.items(), strict=False)
    ]
