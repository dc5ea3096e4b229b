"""Settings of all test processes, and the order of the tests."""

import importlib.util
import os
import shutil
import signal
import tempfile

from tests.support.processes import QUICK_COMPILE

# Tests of one run share compiled programs: half of them compile the same step. The controller of
# pytest-xdist creates the directory; workers inherit the variable.
_cache_dir = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache_dir = tempfile.mkdtemp(prefix="dgpt_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache_dir
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE)
# Background jobs of a shell ignore SIGINT, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Operators of torchvision's compiled library that torchvision registers on import.
TORCHVISION_OPS = ("nms", "qnms")


def _define_torchvision_ops():
    """Lets timm and transformers import a torchvision whose compiled library does not load.

    Happens with torchvision from PyPI beside a CPU build of PyTorch. No test calls the operators,
    so declarations are enough. Returns the defining library, which must stay alive.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "torchvision")):
        return None
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in TORCHVISION_OPS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_torchvision_ops = _define_torchvision_ops()


def pytest_collection_modifyitems(items):
    """Slowest file first; otherwise one worker runs it alone at the end."""
    items.sort(key=lambda item: "sharding_test" not in item.nodeid)


def pytest_unconfigure():
    """Removes the compilation cache; in workers `_cache_dir` is None."""
    if _cache_dir is not None:
        shutil.rmtree(_cache_dir, ignore_errors=True)
