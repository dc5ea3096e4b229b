"""What all tests share."""

import importlib.util
import os
import signal
import tempfile

from tests.processes import QUICK_COMPILE

# Compiled programs are shared by the tests of one run: half of them compile the same step.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dgpt_jax_tests_"))
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE)
# A shell's background job ignores Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Operators that torchvision defines in compiled code, and names when it is imported.
TORCHVISION = ("nms", "qnms")


def _name_operators():
    """Lets timm and transformers import a torchvision whose compiled code is not for this PyTorch.

    That is so where it comes from PyPI and PyTorch is the build for the CPU. Nothing here calls its
    operators: names are enough. Returns the library that defines them, which must live on.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "torchvision")):
        return None
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in TORCHVISION:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_operators = _name_operators()


def pytest_collection_modifyitems(items):
    """The longest first: at the end, one worker would be busy with them alone."""
    items.sort(key=lambda item: "sharding_test" not in item.nodeid)
