"""A random change of a published directory is never green, unless a rule that is written down names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.verify.random_changes import Place, failures, places

if TYPE_CHECKING:
    pass

EXAMPLES = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    return places(tmp_path_factory.mktemp("changes"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers warns of settings that it does not know
@pytest.mark.attempt("R01", "200 random changes of a key, a byte, or a file", "named, or expected by a row")
@pytest.mark.parametrize("number", range(3))
def test_no_random_change_is_green_unless_a_rule_names_it(number: int, made: list[Place]) -> None:
    count = EXAMPLES // 3 + 1
    assert list(failures(made[number], range(number * count, (number + 1) * count))) == []
