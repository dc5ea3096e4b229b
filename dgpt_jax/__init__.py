"""D-iGPT (arXiv 2312.02147) in JAX: pretrain vision transformers from stored CLIP tokens."""

import time

STARTED = time.monotonic()  # a command's start-up is counted from here
__version__ = "0.1.0"
__all__ = ["load_classifier", "load_digpt", "load_encoder"]


def __getattr__(name: str):
    # Loaded when asked for, so that `import dgpt_jax` stays light.
    if name in __all__:
        from dgpt_jax import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
