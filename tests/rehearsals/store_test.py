"""Token stores of many records, described, extracted, divided and merged: memory, files, resuming.

REHEARSAL_RECORDS=1281167 is the full size: 6 GB of disk, a few minutes on two cores.
"""

import os
import shutil
import signal
import time

import numpy as np
import pytest

from dgpt_jax.data import token_store
from dgpt_jax.storage import array_record_shards, tfds_dataset
from tests.support import processes, stores, watch

pytestmark = pytest.mark.slow
RECORDS = int(os.environ.get("REHEARSAL_RECORDS", 40_000))
FEW, VIEWS, SHARD = 2_000, 2, 8192
MEMORY = 60e6, 100  # bytes beyond the command on FEW records: constant, and per record
FILES = 70  # open at a time, beyond those of FEW: `info` samples 64 records
CODE = """
from dgpt_jax.commands import store
sys.argv = ["store.py", *sys.argv[1:]]
store.main()
"""


def write_store(directory, first: int, count: int):
    """Writes a store whose records have the ids first, first + 1, … and are otherwise equal."""
    info = stores.store_info(grid=(1, 1), cls=False, image_size=8)
    stores.write_ids(
        directory / "one", ["123456789"], views=1, shard_size=SHARD, classes=(), info=info
    )
    template = tfds_dataset.Split(directory / "one", "view000").raw(0)
    before, after = template.split(b"123456789")
    out = directory / "store"
    out.mkdir()
    shutil.copy(directory / "one" / token_store.STORE_FILE, out)
    info = token_store.StoreInfo.load(out)
    splits, manifest = {}, {}
    for view in map(token_store.view_split, range(VIEWS)):
        starts = range(first, first + count, SHARD)
        for shard, start in enumerate(starts):
            path = tfds_dataset.shard_path(out, view, shard, len(starts), info.name)
            rows = range(start, min(start + SHARD, first + count))
            records = (b"%b%09d%b" % (before, i, after) for i in rows)
            manifest[path.name] = array_record_shards.write(path, records)
            splits.setdefault(view, []).append(manifest[path.name])
    tfds_dataset.write_metadata(out, token_store.features(info, None), splits, info.name)
    array_record_shards.write_manifest(out, manifest)
    shutil.rmtree(directory / "one")
    return out


def usage(name: str, *words, few: dict | None = None) -> dict:
    """Resources of a command; with those of FEW records, tested against the limits."""
    result = watch.usage_of(CODE, *map(str, words))
    print(f"\n{name}: {result['seconds']:.0f} s, peak {result['peak'] / 1e6:.0f} MB, files "
          f"{result['files']}" + (f" (of {FEW} records: {few})" if few else ""))  # fmt: skip
    if few:
        constant, each = MEMORY
        assert result["peak"] < few["peak"] + constant + each * RECORDS
        assert result["files"] < few["files"] + FILES
    return result


def commands(store, root) -> dict[str, list]:
    return {
        "info": ["info", store],
        "extract": ["extract", store, root / "tenth", "--fraction=0.1"],
        "split": ["split", store, root / "both", "--fraction=0.1"],
        "merge": ["merge", root / "both/train", root / "both/heldout", root / "merged"],
    }


def files(root) -> dict[str, int]:
    """{name: hash} of a store's files but the metadata, which name the command."""
    paths = [p for p in root.iterdir() if p.name != token_store.STORE_FILE]
    return {p.name: hash(p.read_bytes()) for p in paths}


def test_many_records(tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    small = write_store(few, 0, FEW)
    least = {name: usage(name, *words) for name, words in commands(small, few).items()}
    started = time.monotonic()
    store = write_store(tmp_path, 0, RECORDS)
    print(f"{RECORDS} records, {VIEWS} views, written in {time.monotonic() - started:.0f} s")
    for name, words in commands(store, tmp_path).items():
        usage(name, *words, few=least[name])
    lengths = [
        len(tfds_dataset.Split(tmp_path / name, "view001"))
        for name in ("tenth", "both/train", "both/heldout", "merged")
    ]
    assert lengths[0] == lengths[2] and lengths[1] + lengths[2] == lengths[3] == RECORDS
    assert abs(lengths[0] / RECORDS - 0.1) < 3 * np.sqrt(0.09 / RECORDS)
    shutil.rmtree(tmp_path / "merged")
    _kill_and_resume(store, tmp_path)


def _kill_and_resume(store, root):
    """A copy that is killed with SIGKILL and started again has the same bytes."""
    expected = files(root / "tenth")
    shutil.rmtree(root / "tenth")
    words = [str(word) for word in commands(store, root)["extract"]]
    process = processes.start(["tools/store.py", *words])
    while not list(root.glob("tenth/[!.]*array_record*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = [p.name for p in root.glob("tenth/[!.]*array_record*")]
    assert written and not (root / "tenth/dataset_info.json").exists()
    print(f"killed with {len(written)} shards")
    again = usage("extract, resumed", *words)
    assert again and files(root / "tenth") == expected
