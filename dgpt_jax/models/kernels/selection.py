"""Process-wide choice of the implementation of attention and LayerNorm.

Choose before anything is traced (kernel_check.select does, from `config.kernels`): a compiled
function keeps the implementation that it was traced with.
"""

import contextlib
from collections.abc import Iterator

# "ours" (XLA where we have no kernel), "xla" or "cudnn". Ahead-of-time plans choose nothing.
_implementation = "ours"


def implementation() -> str:
    """Returns the current choice."""
    return _implementation


def choose(name: str) -> None:
    """Sets the choice for the rest of the process."""
    global _implementation
    _implementation = name


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Sets the choice for what is traced within the context."""
    previous = _implementation
    choose(name)
    try:
        yield
    finally:
        choose(previous)
