"""Repeated imports and builds: which shards are verified, read and written again."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from dgpt_jax.data.ingest import importer
from dgpt_jax.storage import array_record_shards
from tests.support import data, real_size

IMAGES, SIZE = 40, 200


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(root, {command: its directory}), with an image dataset and a token store of noise: 5 MB."""
    root = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(0)
    (root / "src").mkdir()
    for i in range(IMAGES):
        noise = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(noise).save(root / "src" / f"{i:03d}.png", compress_level=0)
    data.random_teacher(root / "teacher")
    return root, {name: run(name, root, root) for name in ("import", "build")}


def run(command: str, root, out, **kwargs):
    """Imports to `out/images`, or builds `out/tokens` from `root/images`."""
    if command == "import":
        importer.import_images(root / "src", out / "images", shard_size=10, **kwargs)
        return out / "images"
    changes = dict(image_size=SIZE, shard_size=10, crop_scale=(1.0, 1.0))
    return data.token_store(out, root / "images", root / "teacher", **changes, **kwargs)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*array_record*")}


@pytest.mark.skipif(sys.platform != "linux", reason="bytes read are counted by Linux")
@pytest.mark.parametrize("command", ["import", "build"])
def test_complete_shards_are_not_read_again(sources, command):
    root, directories = sources
    size = sum(len(shard) for shard in contents(directories[command]).values())
    assert size > 4e6
    (directories[command] / "dataset_info.json").unlink()  # as if interrupted at the very end
    before = real_size.bytes_read()
    run(command, root, root)
    assert real_size.bytes_read() - before < size / 4
    before = real_size.bytes_read()
    run(command, root, root, check=True)
    assert real_size.bytes_read() - before >= size


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    """Changes a bit; only a checksum detects it."""
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("command", ["import", "build"])
def test_damaged_shards_are_written_again(sources, tmp_path, command, check, is_finished, capfd):
    root, directories = sources
    original = directories[command]
    out = shutil.copytree(original, tmp_path / original.name)
    if not is_finished:
        (out / "dataset_info.json").unlink()
    missing, truncated, flipped, _ = sorted(out.glob("[!.]*array_record*"))
    missing.unlink()
    truncate(truncated)
    flip(flipped)
    run(command, root, tmp_path, **({"check": True} if check else {}))
    expected = contents(original)
    if not check:
        expected[flipped.name] = flipped.read_bytes()
        assert flipped.read_bytes() != contents(original)[flipped.name]
    assert contents(out) == expected
    assert array_record_shards.shard_infos(out) == array_record_shards.shard_infos(original)
    rewritten = 3 if check else 2
    output = "".join(capfd.readouterr())
    if command == "build":
        assert output.count("is damaged") == rewritten
    else:
        assert f"writing {rewritten} damaged ones again" in output
