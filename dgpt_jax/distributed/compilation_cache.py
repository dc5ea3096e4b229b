"""JAX's persistent cache of compiled programs, in the work directory: a run that continues, on a
new machine as well, does not compile its step again."""

import os

import jax

DIRECTORY = "compile_cache"
_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_counts = {_HIT: 0, _MISS: 0}


def _count(event: str, **_):
    if event in _counts:
        _counts[event] += 1


def use(workdir):
    """From now on programs that took a second to compile are kept in `workdir`, unless the user has
    chosen a place (JAX_COMPILATION_CACHE_DIR) or none (JAX_ENABLE_COMPILATION_CACHE=false)."""
    if jax.config.jax_compilation_cache_dir is None:
        directory = os.path.join(os.fspath(workdir), DIRECTORY)
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.monitoring.register_event_listener(_count)


def told() -> str:
    """How many programs were found there, of those that were looked for."""
    hits, all_ = _counts[_HIT], sum(_counts.values())
    return f"{hits} of {all_} programs from {jax.config.jax_compilation_cache_dir}"
