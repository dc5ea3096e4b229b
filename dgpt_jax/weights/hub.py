"""Weights on the Hugging Face hub: `hf:ORG/NAME[@REVISION][/FILE]` in place of a path.

Only the needed files are downloaded, into the cache of huggingface_hub. HF_HOME, HF_HUB_OFFLINE,
HF_TOKEN and HF_ENDPOINT work as in that library. All files are of one commit, which is part of the
name that is recorded.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dgpt_jax.errors import UserError, one_line

PREFIX = "hf:"
NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
# Beside weights, read where they exist.
SETTINGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


class Snapshot(NamedTuple):
    """A downloaded weights file, with #KEY if one was given, and its name hf:ORG/NAME@COMMIT[/FILE]
    for metadata and messages."""

    path: Path
    name: str


def is_name(path: str | os.PathLike) -> bool:
    """Returns True if a path names a repository of the hub."""
    return os.fspath(path).startswith(PREFIX)


def fetch(name: str | os.PathLike, files: Sequence[str]) -> Snapshot:
    """Downloads the weights of `hf:…`, unless they are cached: the named file, or the first of
    `files` that the repository has, with SETTINGS and the shards of an index.

    Raises UserError on a name that is none, an unknown repository, revision or file, a repository
    without any of `files`, and without network if they are not cached.
    """
    name = os.fspath(name)
    match = NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name}: names on the Hugging Face hub are hf:ORG/NAME[@REVISION][/FILE]")
    file, _, key = (match["file"] or "").partition("#")
    repository = _Repository(name, match["repo"], match["revision"])
    weights = next(filter(None, map(repository.get, (file,) if file else files)), None)
    if weights is None:
        where = f"{match['repo']} on the Hugging Face hub"
        raise UserError(
            f"{name}: {where} has no file {file}"
            if file
            else f"{name}: {where} has none of {', '.join(files)}: name one as {name}/FILE"
        )
    for setting in SETTINGS:
        repository.get(str(Path(file).with_name(setting)) if file else setting)
    if weights.name.endswith(".index.json"):
        _fetch_shards(repository, weights)
    part = f"/{match['file']}" if file else ""
    path = weights.with_name(f"{weights.name}#{key}") if key else weights
    return Snapshot(path, f"{PREFIX}{match['repo']}@{repository.revision}{part}")


def _fetch_shards(repository: "_Repository", index: Path):
    try:
        shards = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError):
        return  # files.read says what is wrong with it
    for shard in shards:
        if Path(shard).name == shard:
            repository.get(shard)


class _Repository:
    """Files of a repository at a revision; after the first file, at that file's commit."""

    def __init__(self, name: str, repo: str, revision: str | None):
        self.name, self.repo, self.revision = name, repo, revision
        self._offline = False

    def get(self, file: str) -> Path | None:
        """Local path of a file, None if the repository has none of this name. Raises UserError."""
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError:
            raise UserError(f"{self.name}: pip install 'dgpt_jax[hub]'") from None
        if self._offline or (self.revision and re.fullmatch("[0-9a-f]{40}", self.revision)):
            known = huggingface_hub.try_to_load_from_cache(self.repo, file, revision=self.revision)
            if known is not None:
                return self._at_commit(known) if isinstance(known, str) else None
        if self._offline:  # also for settings: without them weights could be read wrongly
            raise UserError(
                f"{self.name}: {file} is not in the local cache and the hub does not answer: check "
                f"the network, or run once where there is one"
            )
        try:
            path = huggingface_hub.hf_hub_download(self.repo, file, revision=self.revision)
        except errors.LocalEntryNotFoundError:
            self._offline = True  # the library has retried for 25 s
            return self.get(file)
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError:
            reason = "is gated: accept its licence on its page, then set HF_TOKEN"
        except errors.RevisionNotFoundError:
            reason = f"has no revision {self.revision}"
        except errors.RepositoryNotFoundError:
            reason = "does not exist, or is private and HF_TOKEN is not set to a token for it"
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as e:
            reason = f"could not be read: {one_line(e)}"
        else:
            return self._at_commit(path)
        raise UserError(f"{self.name}: {self.repo} on the Hugging Face hub {reason}")

    def _at_commit(self, path: str) -> Path:
        if match := COMMIT.search(Path(path).as_posix()):
            self.revision = match[1]
        return Path(path)
