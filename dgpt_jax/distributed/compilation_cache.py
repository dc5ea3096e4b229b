"""JAX's persistent compilation cache, in the work directory by default: a resumed run does not
recompile its step, on a new machine either."""

import os
from pathlib import Path

import jax
from etils import epath

DIRECTORY = "compile_cache"
_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_counts = {_HIT: 0, _MISS: 0}


def _directory() -> str | None:  # JAX adds the attribute at run time
    return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


def _count(event: str, **_):
    if event in _counts:
        _counts[event] += 1


def use(workdir: epath.Path | Path | str):
    """Caches programs that take a second to compile in `workdir`, unless the user has set another
    directory (JAX_COMPILATION_CACHE_DIR) or none (JAX_ENABLE_COMPILATION_CACHE=false)."""
    if _directory() is None:
        directory = os.path.join(os.fspath(workdir), DIRECTORY)
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.monitoring.register_event_listener(_count)


def cache_summary() -> str:
    """Compilation-cache hits and lookups."""
    hits, lookups = _counts[_HIT], sum(_counts.values())
    return f"{hits} of {lookups} programs from {_directory()}"
