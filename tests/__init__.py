"""The tests. What they share is in `tests.support`, whose assertions pytest explains like those of tests."""

import os

import pytest

# As in the worker: transformers replaces no layer by code from the Hub or its cache.
os.environ["USE_HUB_KERNELS"] = "0"

pytest.register_assert_rewrite("tests.support")
