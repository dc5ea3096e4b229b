"""Weights by names on the Hugging Face hub: which files are read, at which commit, and refusals."""

import sys

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from dgpt_jax.errors import UserError
from dgpt_jax.weights import api, hub, registry, teacher_loading
from tests.support import data
from tests.support.classifying import untrained
from tests.support.fake_hub import MAIN, Hub

OLD = "b" * 40


def files_of(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    data.random_teacher(root / "teacher")
    data.random_teacher(root / "other", seed=1)
    encoder = untrained(root / "encoder.safetensors", "mean")
    two = files_of(root / "teacher") | {"encoder.safetensors": encoder.read_bytes()}
    return {
        "org/clip": {
            MAIN: files_of(root / "teacher") | {"README.md": b"", "pytorch_model.bin": b"large"},
            OLD: files_of(root / "other"),
        },
        "org/several": {MAIN: two},
        "org/empty": {MAIN: {"README.md": b""}},
        "org/gated": {MAIN: two},
    }, root


def _point_to(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def served(repositories, tmp_path, monkeypatch):
    """A hub with an empty cache."""
    with Hub(repositories[0]) as server:
        server.gated.add("org/gated")
        _point_to(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_teacher(served, repositories):
    loaded = teacher_loading.load("hf:org/clip")
    local = teacher_loading.load(repositories[1] / "teacher")
    assert (loaded.hash, loaded.tower) == (local.hash, local.tower)
    assert loaded.name == f"hf:org/clip@{MAIN}"
    names = [file for _, file in served.read]
    assert "pytorch_model.bin" not in names and "README.md" not in names
    assert len(names) == len(set(names)) == 2  # weights and their JSON

    again = teacher_loading.load(loaded.name)
    assert again.hash == loaded.hash and len(served.read) == 2
    old = teacher_loading.load(f"hf:org/clip@{OLD}")
    assert old.hash == teacher_loading.load(repositories[1] / "other").hash != loaded.hash


def test_all_files_are_of_one_commit(served, repositories, monkeypatch):
    """`main` moves between the weights and their JSON."""
    commits = repositories[0]["org/clip"]
    moved = {"model.safetensors": b"", "config.json": b"{}", "open_clip_config.json": b"{}"}
    download = huggingface_hub.hf_hub_download

    def then_move(repo, file, revision):
        path = download(repo, file, revision=revision)
        monkeypatch.setitem(served.repos, "org/clip", {**commits, "c" * 40: moved})
        monkeypatch.setattr("tests.support.fake_hub.MAIN", "c" * 40)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", then_move)
    assert teacher_loading.load("hf:org/clip").name.endswith(MAIN)
    assert {commit for commit, _ in served.read} == {MAIN}


def test_an_encoder_by_file(served, repositories):
    name = "hf:org/several/encoder.safetensors"
    _, weights = registry.read(name)
    _, local = registry.read(repositories[1] / "encoder.safetensors")
    assert weights.source == f"hf:org/several@{MAIN}/encoder.safetensors"
    for path, array in local.params.items():
        np.testing.assert_array_equal(weights.params[path], array)
    assert api.load_encoder(name).source == weights.source


def test_without_network(served, monkeypatch):
    first = teacher_loading.load("hf:org/clip")
    _point_to(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between retries
    assert teacher_loading.load("hf:org/clip").hash == first.hash
    assert teacher_loading.load("hf:org/clip").name == first.name
    with pytest.raises(UserError, match="is not in the local cache and the hub does not answer"):
        teacher_loading.load("hf:org/several")


REFUSED = {
    "hf:clip": "names on the Hugging Face hub are",
    "hf:org/none": "does not exist, or is private",
    "hf:org/gated": "accept its licence",
    f"hf:org/clip@{'d' * 40}": "has no revision d",
    "hf:org/empty": r"has none of model\.safetensors",
    "hf:org/clip/x.pth": r"has no file x\.pth",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("read", [registry.read, teacher_loading.load])
def test_refused(served, name, read):
    with pytest.raises(UserError, match=f"^{name}.*{REFUSED[name]}"):
        read(name)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'dgpt_jax\[hub\]'"):
        hub.fetch("hf:org/clip", ["model.safetensors"])
