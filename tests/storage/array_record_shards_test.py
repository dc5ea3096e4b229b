"""Imports and builds run again: which shards they trust, and how much of them they read."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from dgpt_jax import images, shards
from tests import data, rehearsal

PICTURES, SIZE = 40, 200


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(root, {command: its directory}), with an image dataset and a token store of noise: 5 MB."""
    root = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(0)
    (root / "src").mkdir()
    for i in range(PICTURES):
        noise = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(noise).save(root / "src" / f"{i:03d}.png", compress_level=0)
    data.random_teacher(root / "teacher")
    return root, {name: run(name, root, root) for name in ("import", "build")}


def run(command: str, root, out, **kwargs):
    """Imports to `out/images`, or builds `out/tokens` from `root/images`."""
    if command == "import":
        images.import_images(root / "src", out / "images", shard_size=10, **kwargs)
        return out / "images"
    changes = dict(picture_size=SIZE, shard_size=10, crop_scale=(1.0, 1.0))
    return data.token_store(out, root / "images", root / "teacher", **changes, **kwargs)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*array_record*")}


@pytest.mark.skipif(sys.platform != "linux", reason="bytes read are counted by Linux")
@pytest.mark.parametrize("command", ["import", "build"])
def test_what_is_complete_is_not_read_again(made, command):
    root, directories = made
    size = sum(len(shard) for shard in contents(directories[command]).values())
    assert size > 4e6
    (directories[command] / "dataset_info.json").unlink()  # as if stopped before the very end
    before = rehearsal.bytes_read()
    run(command, root, root)
    assert rehearsal.bytes_read() - before < size / 4
    before = rehearsal.bytes_read()
    run(command, root, root, check=True)
    assert rehearsal.bytes_read() - before >= size


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    """Another byte: of the same size, so that only a checksum tells."""
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("command", ["import", "build"])
def test_damaged_shards_are_written_again(made, tmp_path, command, check, is_finished, capfd):
    root, directories = made
    whole = directories[command]
    out = shutil.copytree(whole, tmp_path / whole.name)
    if not is_finished:
        (out / "dataset_info.json").unlink()
    missing, truncated, flipped, _ = sorted(out.glob("[!.]*array_record*"))
    missing.unlink()
    truncate(truncated)
    flip(flipped)
    run(command, root, tmp_path, **({"check": True} if check else {}))
    expected = contents(whole)
    if not check:
        expected[flipped.name] = flipped.read_bytes()
        assert flipped.read_bytes() != contents(whole)[flipped.name]
    assert contents(out) == expected
    assert shards.receipts(out) == shards.receipts(whole)
    again = 3 if check else 2
    output = "".join(capfd.readouterr())
    if command == "build":
        assert output.count("is damaged: it is built again") == again
    else:
        assert f"{again} damaged ones" in output
