"""Google Cloud Storage through gcsfs (the extra `gcs`), and fsspec's file systems in general.

Importing this module configures gcsfs, also for the paths of etils and TFDS.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
from etils import epath

from dgpt_jax.errors import UserError, one_line

AnyPath = Path | str | epath.Path

# A cached listing would hide what other hosts write.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

# gcsfs would ask for the kind of a bucket through another API, with a permission that reading and
# writing do not need, and would ask again wherever it is refused.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

# It prints the traceback of every error that it also raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

# Address of an emulator: google-cloud-cpp's variable (array_record uses it) under gcsfs's name.
# Neither takes credentials there.
if _endpoint := os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT"):
    os.environ.setdefault("STORAGE_EMULATOR_HOST", _endpoint)


def is_remote(path: AnyPath) -> bool:
    """Returns True for gs:// and other URLs."""
    return "://" in os.fspath(path)


def require(path: AnyPath) -> None:
    """Raises UserError if a path is on gs:// or s3:// and gcsfs or s3fs is not installed."""
    for scheme, package, extra in (("gs://", "gcsfs", "gcs"), ("s3://", "s3fs", "s3")):
        if os.fspath(path).startswith(scheme) and importlib.util.find_spec(package) is None:
            raise UserError(f"{path} is read through {package}: pip install 'dgpt_jax[{extra}]'")


def filesystem(path: AnyPath) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns fsspec's file system of a local or remote path, and the path's name in it."""
    return fsspec.core.url_to_fs(os.fspath(path))


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Context that turns errors of a local or remote file system into UserError("WHAT: reason")."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # gcsfs and the libraries below it raise various types
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: {one_line(e)}"
        raise UserError(f"{what}: {reason}") from e


def put(file: AnyPath, remote: AnyPath) -> None:
    """Uploads a local file in blocks; the object appears once complete. Raises UserError."""
    with failures(f"{remote} cannot be written"):
        system, path = filesystem(remote)
        system.put_file(os.fspath(file), path)


def get(remote: AnyPath, file: AnyPath) -> None:
    """Downloads an object to a local file; does nothing if there is none. Raises UserError."""
    with failures(f"{remote} cannot be read"):
        system, path = filesystem(remote)
        if system.exists(path):
            system.get_file(path, os.fspath(file))
