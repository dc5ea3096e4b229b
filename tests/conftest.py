"""What all tests share."""

import os
import tempfile

# Compiled programs are shared by the tests of one run: half of them compile the same step.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dgpt_jax_tests_"))
