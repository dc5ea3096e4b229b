"""What all tests share."""

import os
import tempfile

from tests.processes import QUICK_COMPILE

# Compiled programs are shared by the tests of one run: half of them compile the same step.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dgpt_jax_tests_"))
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE)


def pytest_collection_modifyitems(items):
    """The longest first: at the end, one worker would be busy with them alone."""
    items.sort(key=lambda item: "sharding_test" not in item.nodeid)
