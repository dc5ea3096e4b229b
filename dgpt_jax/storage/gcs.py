"""Google Cloud Storage, reached through gcsfs (the extra `gcs`): what this package asks of it.

Importing this module settles it, so that etils' paths and TFDS get it too.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator

import fsspec

from dgpt_jax.schema import UserError

# A listing that is remembered would hide what other hosts write.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

# gcsfs would ask of what kind a bucket is, through another API and with a permission that reading
# and writing do not need, again and again where it is refused.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# It prints the traceback of each error that it also raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

# What google-cloud-cpp, and so array_record, calls the address of a stand-in, by gcsfs's name for
# it. Neither takes credentials there.
if _endpoint := os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT"):
    os.environ.setdefault("STORAGE_EMULATOR_HOST", _endpoint)


def require(path):
    """Raises UserError where a path is on gs:// and gcsfs is not installed."""
    if os.fspath(path).startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} is read through gcsfs: pip install 'dgpt_jax[gcs]'")


def filesystem(path):
    """fsspec's file system of a path, near or far, and the path's name there."""
    return fsspec.core.url_to_fs(os.fspath(path))


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """A context: an error of a file system, near or far, becomes a UserError, "WHAT: reason"."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # gcsfs and what lies below it raise various
        line = (str(e).strip().splitlines() or [""])[0][:200]
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {line}"
        raise UserError(f"{what}: {reason}") from e


def put(file, far):
    """Copies a local file in blocks to `far`, which is there when all are. Raises UserError."""
    with failures(f"{far} cannot be written"):
        system, path = filesystem(far)
        system.put_file(os.fspath(file), path)


def get(far, file):
    """Copies `far` to a local file; nothing where it does not exist. Raises UserError."""
    with failures(f"{far} cannot be read"):
        system, path = filesystem(far)
        if system.exists(path):
            system.get_file(path, os.fspath(file))
