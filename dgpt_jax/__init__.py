"""D-iGPT (arXiv 2312.02147) in JAX: pretrain vision transformers from stored CLIP tokens."""

from dgpt_jax._version import __version__

__all__ = ["__version__", "load_classifier", "load_digpt", "load_encoder", "pretrain"]


def __getattr__(name: str):
    # Loaded on first use, so that `import dgpt_jax` stays light.
    if name == "pretrain":
        from dgpt_jax.commands.pretrain import pretrain

        return pretrain
    if name in __all__:
        from dgpt_jax.weights import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
