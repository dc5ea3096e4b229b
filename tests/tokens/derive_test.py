"""Stores copied from others: which records, unchanged bytes, resuming, refusals."""

import dataclasses
import functools
import json
import shutil
import signal
import sys

import numpy as np
import pytest

from dgpt_jax.commands import store as command
from dgpt_jax.data import token_store
from dgpt_jax.errors import UserError
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import selection
from tests.support import gcs, processes, stores

IDS = [f"n{i % 3}/{i:03d}.jpg" for i in range(21)]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A directory with two stores of different ids, A and B."""
    root = tmp_path_factory.mktemp("stores")
    stores.write_ids(root / "A", IDS)
    stores.write_ids(root / "B", [f"b/{i}" for i in range(10)], shard_size=3)
    return root


@pytest.fixture
def root(originals, tmp_path):
    """A copy of `originals`."""
    return shutil.copytree(originals, tmp_path / "root")


@pytest.fixture
def run(root, monkeypatch, capsys):
    """Runs `store WORDS…`, in which {root} is replaced; returns its output."""

    monkeypatch.setattr(command.preemption, "raise_on_sigterm", lambda: None)

    def run(*words) -> str:
        words = [str(word).format(root=root) for word in words]
        monkeypatch.setattr(sys, "argv", ["store.py", *words])
        command.main()
        return capsys.readouterr().out

    return run


def records(store) -> dict[str, list[bytes]]:
    """{view: serialized examples} of a store."""
    names = tfds_dataset.open_builder(store).info.splits
    splits = {name: tfds_dataset.Split(store, name) for name in names}
    return {name: [split.raw(i) for i in range(len(split))] for name, split in splits.items()}


def ids(store, view=0) -> list[str]:
    return [example["id"] for example in tfds_dataset.Split(store, token_store.view_split(view))]


def files(store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--labels=b"], IDS[1::2]),
        (["--labels=1"], IDS[1::2]),
        (["--labels=a,1"], IDS),
        (["--ids={root}/ids"], IDS[2:9]),
        (["--count=21"], IDS),
    ],
)
def test_extract(root, run, flags, expected):
    (root / "ids").write_text("\n".join([*reversed(IDS[2:9]), "", IDS[2]]) + "\r\n")
    assert "next: " in run("extract", "{root}/A", "{root}/out", *flags)
    rows = [IDS.index(name) for name in expected]
    for view, copied in records(root / "out").items():
        assert copied == [records(root / "A")[view][row] for row in rows]
    info, parent = (token_store.StoreInfo.load(root / name) for name in ("out", "A"))
    assert info.source["examples"] == len(expected)
    for name in ("teacher", "image", "views", "layout"):
        assert getattr(info, name) == getattr(parent, name)
    lengths = tfds_dataset.open_builder(root / "out").info.splits["view001"].shard_lengths
    assert lengths == [4] * (len(rows) // 4) + [len(rows) % 4] * (len(rows) % 4 > 0)
    label = tfds_dataset.Split(root / "out", "view000").label
    assert label is not None and label.names == ["a", "b"]


def test_fractions_are_nested_and_independent_of_the_store(root, run):
    for name, flags in {
        "small": ["--fraction=0.3"], "large": ["--fraction=0.6"], "few": ["--count=5"],
        "other": ["--fraction=0.6", "--seed=1"],
    }.items():  # fmt: skip
        run("extract", "{root}/A", f"{{root}}/{name}", *flags)
    chosen = {name: set(ids(root / name)) for name in ("small", "large", "few", "other")}
    assert chosen["small"] < chosen["large"] != chosen["other"]
    assert len(chosen["few"]) == 5 and chosen["few"] <= chosen["large"]
    stores.write_ids(root / "grown", ["x", *IDS, "y"])
    run("extract", "{root}/grown", "{root}/large2", "--fraction=0.6")
    assert set(ids(root / "large2")) - {"x", "y"} == chosen["large"]


def test_split_divides_all_views(root, run):
    output = run("split", "{root}/A", "{root}/both", "--fraction=0.3")
    assert f"--config.evals.heldout={root}/both/heldout" in output
    train, heldout = ids(root / "both/train"), ids(root / "both/heldout")
    assert sorted(train + heldout) == sorted(IDS) and heldout
    assert ids(root / "both/heldout", view=1) == heldout
    run("extract", "{root}/A", "{root}/same", "--fraction=0.3")
    assert ids(root / "same") == heldout
    run("split", "{root}/A", "{root}/both", "--fraction=0.3", "--names=a,b")
    assert ids(root / "both/b") == heldout


def test_merge(root, run):
    run("merge", "{root}/A", "{root}/B", "{root}/out")
    a, b = records(root / "A"), records(root / "B")
    joined = {view: a[view] + b[view] for view in a}
    assert records(root / "out") == joined
    info = token_store.StoreInfo.load(root / "out")
    assert info.source["examples"] == 31 and info.source["name"] == "images"
    assert [part["examples"] for part in info.source["derived"]["from"]] == [21, 10]
    run("split", "{root}/out", "{root}/parts", "--fraction=0.5")
    run("merge", "{root}/parts/train", "{root}/parts/heldout", "{root}/again")
    assert sorted(records(root / "again")["view001"]) == sorted(joined["view001"])


def test_an_interrupted_command_resumes(root, run, monkeypatch):
    words = ("split", "{root}/A", "{root}/out", "--fraction=0.4", "--threads=1")
    run(*words)
    expected = [files(root / "out" / side) for side in ("train", "heldout")]
    assert "complete: 42 of 42 records" in run(*words)
    assert [files(root / "out" / side) for side in ("train", "heldout")] == expected
    shutil.rmtree(root / "out")
    write, count = array_record_shards.write, iter(range(100))

    def failing(path, items):
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        return write(path, items)

    monkeypatch.setattr(array_record_shards, "write", failing)
    with pytest.raises(OSError):
        run(*words)
    monkeypatch.setattr(array_record_shards, "write", write)
    out = root / "out/train"
    complete = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*array_record*")}
    assert complete and not (out / "dataset_info.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        token_store.require_finished(out)
    with pytest.raises(UserError, match="OUT"):  # another selection
        run("split", "{root}/A", "{root}/out", "--fraction=0.5")
    run(*words)
    assert all(path.stat().st_mtime_ns == at for path, at in complete.items())
    assert [files(root / "out" / side) for side in ("train", "heldout")] == expected


KILLED = """
import os, signal, sys
from dgpt_jax.commands import store
from dgpt_jax.storage import array_record_shards as shards

write, count = shards._write_file, iter(range(100))

def killed(path, items):
    if next(count) == 2:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, items)

shards._write_file = killed
sys.argv[0] = "store.py"
store.main()
"""


def test_a_kill_and_a_rerun(root, run):
    """SIGKILL while the third shard is written."""
    words = ["extract", f"{root}/A", f"{root}/out", "--count=21", "--threads=1"]
    run(*words)
    expected = files(root / "out")
    shutil.rmtree(root / "out")
    process = processes.start(["-c", KILLED, *words])
    processes.outputs_of([process], timeout=60)
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in (root / "out").iterdir()]
    assert len([name for name in left if "array_record" in name and name[0] != "."]) == 2
    assert [name for name in left if name.endswith(".partial")]
    run(*words)
    assert files(root / "out") == expected


@pytest.mark.parametrize("check", [False, True])
def test_damaged_shards_are_written_again(root, run, check):
    words = ["extract", "{root}/A", "{root}/out", "--labels=a"]
    run(*words)
    expected = files(root / "out")
    path = next((root / "out").glob("*view001*00001-of*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if check else content[:-100])
    assert path.name in run(*words, *["--check"] * check)
    assert files(root / "out") == expected


def rewrite(path, **changes):
    file = path / token_store.STORE_FILE
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(content[key], dict) else value
    file.write_text(json.dumps(content))


def teacher(path):
    rewrite(path, teacher={"weights": {"width": 4, "hash": "other"}})


def crops(path):
    rewrite(path, views={"crop_scale": [0.5, 1.0]})


OTHER_SETTINGS = {
    "teacher": teacher,
    "crops": crops,
    "encoding": functools.partial(rewrite, image={"encoding": "png"}),
    "scales": functools.partial(rewrite, teacher={"channel_scale": [2.0] * 4}),
}
OTHER_STORES = {
    "labels": {"classes": ("a", "c")},
    "no labels": {"classes": ()},
    "views": {"views": 1},
    "codec": {"info": stores.store_info("float16")},
    "image size": {"info": stores.store_info(image_size=24)},
    "ids": {"ids": [*"xyz", IDS[4], IDS[20]]},
}


@pytest.mark.parametrize("kind", [*OTHER_SETTINGS, *OTHER_STORES])
def test_stores_that_cannot_be_merged(root, run, kind):
    settings = {"ids": list("xyz")} | OTHER_STORES.get(kind, {})
    other = stores.write_ids(root / "other", settings.pop("ids"), **settings)
    OTHER_SETTINGS.get(kind, lambda _: None)(other)
    with pytest.raises(UserError) as caught:
        run("merge", "{root}/A", "{root}/other", "{root}/out")
    assert str(root / "other") in str(caught.value) and not (root / "out").exists()
    if kind == "ids":
        assert f"2 ids of {root}/A: {IDS[4]}, {IDS[20]}:" in str(caught.value)


WRONG = {
    "ids that are absent": (["extract", "{root}/A", "{root}/out", "--ids={root}/ids"],
                            "2 of 3 ids", "nope, no"),
    "no ids": (["extract", "{root}/A", "{root}/out", "--ids={root}/none"], "none"),
    "no file": (["extract", "{root}/A", "{root}/out", "--ids={root}/nowhere"], "nowhere"),
    "an unknown label": (["extract", "{root}/A", "{root}/out", "--labels=a,c"], "'c'"),
    "a number of a class": (["extract", "{root}/A", "{root}/out", "--labels=2"], "'2'"),
    "too many": (["extract", "{root}/A", "{root}/out", "--count=22"], "21 examples"),
    "nothing selected": (["extract", "{root}/A", "{root}/out", "--fraction=1e-9"], "21 examples"),
    "an empty side": (["split", "{root}/A", "{root}/out", "--fraction=0.999999999"], "out/train"),
    "two selections": (["extract", "{root}/A", "{root}/out", "--count=1", "--labels=a"], "2 of"),
    "no selection": (["extract", "{root}/A", "{root}/out"], "--fraction"),
    "a seed without effect": (
        ["extract", "{root}/A", "{root}/out", "--labels=a", "--seed=1"], "--seed"),
    "a flag of another action": (["merge", "{root}/A", "{root}/B", "{root}/out", "--seed=1"],
                                 "--seed"),
    "a fraction of 1": (["split", "{root}/A", "{root}/out", "--fraction=1"], "--fraction"),
    "no fraction": (["split", "{root}/A", "{root}/out"], "--fraction"),
    "the names of sides": (["split", "{root}/A", "{root}/out", "--fraction=0.5", "--names=a,a"],
                           "--names"),
    "one store": (["merge", "{root}/A", "{root}/out"], "STORE STORE"),
    "itself": (["merge", "{root}/A", "{root}/A", "{root}/out"], "21 ids"),
    "onto itself": (["extract", "{root}/A", "{root}/A", "--count=3"], "itself"),
    "onto another": (["extract", "{root}/A", "{root}/B", "--count=3"], "OUT"),
    "below a file": (["extract", "{root}/A", "{root}/ids/x", "--count=3"], "ids"),
    "no store": (["extract", "{root}", "{root}/out", "--count=3"], "not a token store"),
    "an unfinished store": (["extract", "{root}/C", "{root}/out", "--count=3"], "unfinished"),
    "a damaged record": (["extract", "{root}/D", "{root}/out", "--count=3"], "--check"),
    "a missing shard": (["merge", "{root}/A", "{root}/E", "{root}/out"], "is missing"),
    "nothing there": (["info", "{root}/nowhere"], "nowhere"),
    "neither": (["info", "{root}"], "not a TFDS dataset"),
    "two of one": (["info", "{root}/A", "{root}/B"], "STORE"),
    "a sample without a figure": (["info", "{root}/A", "--sample=3"], "--out"),
    "a figure of another kind": (["info", "{root}/A", "--out={root}/x.txt"], "x.txt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_inputs(root, run, kind):
    (root / "ids").write_text(f"nope\n{IDS[1]}\nno\n")
    (root / "none").write_text("\n\n")
    for name in "CDE":
        shutil.copytree(root / "B", root / name)
    (root / "C/dataset_info.json").unlink()
    damaged = next((root / "D").glob("*view000*00001-of*"))
    content = bytearray(damaged.read_bytes())
    content[200] ^= 1
    damaged.write_bytes(content)
    next((root / "E").glob("*view001*00001-of*")).unlink()
    before = sorted(path for path in root.rglob("*"))
    words, *expected = WRONG[kind]
    with pytest.raises(UserError) as caught:
        run(*words)
    message = str(caught.value)
    assert all(text in message for text in expected) and "\n" not in message, message
    assert sorted(path for path in root.rglob("*")) == before


def test_too_little_disk_space(root, run, monkeypatch):
    run("extract", "{root}/A", "{root}/first", "--count=20")
    size = sum(len(data) for name, data in files(root / "first").items() if "array_record" in name)
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(UserError, match="OUT"):
        run("extract", "{root}/A", "{root}/out", "--count=20")
    assert not (root / "out").exists()


def test_views_with_other_ids_are_refused(root, run):
    stores.write(root / "old", [4], views=2)  # their ids are "view/index"
    with pytest.raises(UserError, match=r"view001 is 1/0, that of view000 0/0"):
        run("extract", "{root}/old", "{root}/out", "--count=4")


def test_keys_and_fractions():
    """Keys never end in a zero byte, which NumPy would drop; fractions are uniform in [0, 1)."""
    keys = np.array([selection.key_of(b"%d" % i) for i in range(20_000)], selection.KEY)
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {16}
    zeros = np.zeros(len(keys), np.int64)
    index = selection.Index(keys, zeros, zeros)
    values = selection.fractions(index, seed=0)
    assert values.min() >= 0 and values.max() < 1
    assert abs((values < 0.1).mean() - 0.1) < 0.01
    assert abs(np.corrcoef(values, selection.fractions(index, seed=1))[0, 1]) < 0.03


def test_info(root, run):
    shown = json.loads(run("info", "{root}/A", "--json", "--check"))
    assert shown["kind"] == "token store" and shown["classes"] == 2
    assert shown["complete"] and shown["readable"] and shown["checksums"]
    sizes = shown["record_bytes"]
    lengths = [len(record) for record in records(root / "A")["view000"]]
    assert sizes["total"] == pytest.approx(np.mean(lengths))
    assert sizes["tokens"] == 20 and sizes["image"] + 20 + sizes["rest"] == sizes["total"]
    assert [split["examples"] for split in shown["splits"]] == [21, 21]
    assert shown["bytes"] == sum(
        len(data) for name, data in files(root / "A").items() if "array_record-" in name
    )
    run("extract", "{root}/A", "{root}/out", "--labels=a")
    assert "labels a, from images (21)" in run("info", "{root}/out")
    assert run("info", "{root}/out").splitlines()[-1].startswith("next: ")


@pytest.mark.parametrize("fault", ["shard", "record", "unfinished"])
def test_info_of_damaged_stores(root, run, capsys, fault):
    path = next((root / "A").glob("*view001*00000-of*"))
    if fault == "shard":
        path.unlink()
    elif fault == "record":
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(content)
    else:
        (root / "A/dataset_info.json").unlink()
        assert not json.loads(run("info", "{root}/A", "--json"))["complete"]
        return
    with pytest.raises(UserError, match="view001"):
        run("info", "{root}/A", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["complete"] is (fault == "record") and not shown["readable"]
    assert dataclasses.asdict(token_store.StoreInfo.load(root / "A"))["source"] == shown["source"]


def test_remote_stores(root, run, monkeypatch):
    """A store on gs:// is extracted to gs://, with the bytes of a local one."""
    run("extract", "{root}/A", "{root}/out", "--labels=b")
    with gcs.Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        remote = server.add(root / "A", "x/A")
        words = ("extract", remote, f"gs://{gcs.BUCKET}/x/out", "--labels=b")
        run(*words)
        assert "complete: 20 of 20 records" in run(*words)
        shown = json.loads(run("info", f"gs://{gcs.BUCKET}/x/out", "--json"))
        assert shown["complete"] and shown["readable"] is None and shown["checksums"] is None
        objects = {
            name.removeprefix("x/out/"): data
            for name, data in server.objects.items() if name.startswith("x/out/")
        }  # fmt: skip
    expected = files(root / "out")
    assert objects.keys() == expected.keys()
    assert {name for name in objects if objects[name] != expected[name]} == {"token_store.json"}


def test_a_figure_of_stored_images(root, run):
    assert "wrote" in run("info", "{root}/A", "--sample=3", "--out={root}/x.png")
    assert (root / "x.png").stat().st_size > 1000
