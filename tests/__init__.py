"""The tests. What they share is in `tests.support`, whose assertions pytest explains like those of tests."""

import pytest

pytest.register_assert_rewrite("tests.support")
