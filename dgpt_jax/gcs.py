"""Google Cloud Storage, reached through gcsfs (the extra `gcs`): what this package asks of it.

Importing this module settles it, so that etils' paths and TFDS get it too.
"""

import importlib.util
import logging
import os

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
