"""Further teachers of a token store: added, resumed, verified, refused."""

import dataclasses
import itertools
import json
import shutil
import signal
import time

import numpy as np
import portpicker
import pytest

from dgpt_jax.commands import store_info
from dgpt_jax.config import TokensConfig, roots
from dgpt_jax.config.schema import parse
from dgpt_jax.data import further_teachers, image_ops, token_codec, token_store
from dgpt_jax.errors import UserError
from dgpt_jax.models import teacher_vit
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import describe, further, store_parts, verify
from dgpt_jax.weights import teacher_loading
from tests.support import data, processes

EXAMPLES, VIEWS = 40, 2
# Another width, grid and class token than the first teacher's.
SECOND = dataclasses.replace(data.TOWER, image_size=8, patch=4, out_width=12)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(root, flags of the command that built `root/store` of the teachers teacher and second)."""
    root = tmp_path_factory.mktemp("further")
    dataset = data.image_dataset(root, per_class=EXAMPLES // 2)
    data.random_teacher(root / "first")
    data.random_teacher(root / "second", seed=1, tower=SECOND)
    (root / "third").mkdir()
    data.random_siglip(root / "third")
    flags = [
        "tools/build_tokens.py", "--config=configs/quickstart_tokens.py",
        f"--config.source={dataset}", "--config.image_size=16", "--config.image_encoding=png",
        f"--config.views={VIEWS}", "--config.shard_size=16", "--config.batch_size=8",
        "--config.crop_scale=(0.2, 1.0)", "--config.flip=True",
        f"--config.teacher.weights={root / 'first'}",
        f"--config.teachers.second.weights={root / 'second'}",
        "--config.teachers.second.codec=float16",
    ]  # fmt: skip
    output = run([*flags, f"--out={root / 'store'}"])
    assert "teachers/second: float16 tokens 5×12" in output
    assert f"verify {root / 'store'}" in output.replace("_tokens.py", "") and (
        "--teacher=second" in output.splitlines()[-1]
    )
    return root, flags


def run(words, **kwargs) -> str:
    process = processes.start(words, **kwargs)
    (output,) = processes.outputs_of([process], timeout=180)
    assert process.returncode == 0, output[-3000:]
    return output


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("[!.]*array_record*")}


def settings(root, **teachers):
    values = {"source": "unused", "batch_size": 8, "threads": 2, "teachers": teachers}
    return parse(TokensConfig, values)


def weights(root, name: str, **changes):
    return parse(roots.TeacherConfig, {"weights": str(root / name), **changes})


def test_tokens_belong_to_the_stored_images(built):
    """By id, and equal to the teacher's of the decoded images."""
    root, _ = built
    store = root / "store"
    teacher, directory = further_teachers.open_directory(store, "second")
    loaded = teacher_loading.load(str(root / "second"))
    first, second = (
        [tfds_dataset.Split(path, token_store.view_split(v)) for v in range(VIEWS)]
        for path in (store, directory)
    )
    for images, tokens in zip(first, second, strict=True):
        assert [e["id"] for e in images] == [e["id"] for e in tokens]
        assert [s.take for s in images.shards] == [s.take for s in tokens.shards] == [16, 16, 8]
        decoded = np.stack([image_ops.decode_image(e["image"]) for e in images])
        expected = teacher_vit.teacher_tokens(loaded.tower, loaded.params, decoded)
        stored = np.stack([e["tokens"] for e in tokens])
        actual = teacher.load_codec(directory).decode(stored)
        assert token_codec.cosines(actual, expected).min() > 0.99999
    assert teacher.weights["hash"] == loaded.hash and teacher.name == "second"


@pytest.mark.slow
def test_the_first_teacher_is_stored_as_without_a_second(built, tmp_path):
    root, flags = built
    alone = [flag for flag in flags if "teachers" not in flag]
    run([*alone, f"--out={tmp_path / 'store'}"])
    assert contents(tmp_path / "store") == contents(root / "store")
    assert not (tmp_path / "store/teachers").exists()


@pytest.mark.slow
def test_a_third_teacher_is_added_and_killed_in_the_middle(built, tmp_path):
    """By --only, without the source and the weights of the first; nothing else is written."""
    root, _ = built
    expected = root / "store"
    further.add(settings(root, third={"weights": str(root / "third")}), expected, "third")
    store = shutil.copytree(expected, tmp_path / "store")
    shutil.rmtree(store / "teachers/third")
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    words = [
        "tools/build_tokens.py", "--config=configs/quickstart_tokens.py",
        "--config.source=absent", "--config.batch_size=8", "--only=third",
        f"--config.teachers.third.weights={root / 'third'}", f"--out={store}",
    ]  # fmt: skip
    process = processes.start(words)
    out = store / "teachers/third"
    while len(contents(out)) < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    process.kill()
    process.wait()
    assert 2 <= len(contents(out)) < 6
    with pytest.raises(UserError, match="third is unfinished; finish it with: .*--only=third"):
        further_teachers.open_directory(store, "third")
    output = run(words)
    assert "third, complete: " in output and "teachers/third: int8 tokens 16×32" in output
    assert contents(out) == contents(expected / "teachers/third")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    limits = verify.thresholds(further_teachers.load(store, "third").teacher)
    reports = list(verify.verify(store, weights(root, "third"), further="third"))
    assert len(reports) == 6 and all(report.is_sound(*limits) for report in reports)


@pytest.mark.slow
def test_two_processes_add_the_same_tokens(built, tmp_path):
    root, flags = built
    store = shutil.copytree(root / "store", tmp_path / "store")
    shutil.rmtree(store / "teachers")
    words = [
        *flags,
        "--only=second",
        f"--out={store}",
        f"--config.hosts.coordinator=localhost:{portpicker.pick_unused_port()}",
    ]
    words.append("--config.hosts.num_processes=2")
    started = [processes.start([*words, f"--config.hosts.process_id={i}"]) for i in range(2)]
    outputs = processes.outputs_of(started, timeout=180)
    assert [process.returncode for process in started] == [0, 0], outputs
    assert contents(store / "teachers/second") == contents(root / "store/teachers/second")


@pytest.mark.slow
def test_views_that_were_added_later_are_completed(built, tmp_path):
    root, flags = built
    store = shutil.copytree(root / "store", tmp_path / "store")
    old = contents(store / "teachers/second")
    run([*flags, "--config.views=3", f"--out={store}"])
    new = contents(store / "teachers/second")
    assert new.items() > old.items() and len(new) == 9
    assert len(further_teachers.load(store, "second").views) == 3


def swap_shards(store):
    """Exchanges two shards of the second teacher, with their receipts."""
    directory = store / "teachers/second"
    a, b = (tfds_dataset.shard_path(directory, "view001", i, 3, "second") for i in (0, 1))
    infos = array_record_shards.shard_infos(directory)
    infos[a.name], infos[b.name] = infos[b.name], infos[a.name]
    a.rename(directory / "swap")
    b.rename(a)
    (directory / "swap").rename(b)
    array_record_shards.write_manifest(directory, infos)


def swap_views(store):
    """Exchanges two views of the second teacher: ids are as before."""
    directory = store / "teachers/second"
    infos = array_record_shards.shard_infos(directory)
    for i in range(3):
        a, b = (tfds_dataset.shard_path(directory, f"view00{v}", i, 3, "second") for v in (0, 1))
        infos[a.name], infos[b.name] = infos[b.name], infos[a.name]
        a.rename(directory / "swap")
        b.rename(a)
        (directory / "swap").rename(b)
    array_record_shards.write_manifest(directory, infos)


@pytest.mark.parametrize("fault,shards", [(swap_shards, {3, 4}), (swap_views, set(range(6)))])
def test_swapped_shards_are_found(built, tmp_path, fault, shards):
    root, _ = built
    store = shutil.copytree(root / "store", tmp_path / "store")
    fault(store)
    limits = verify.thresholds(further_teachers.load(store, "second").teacher)
    reports = list(verify.verify(store, weights(root, "second"), further="second"))
    assert {i for i, r in enumerate(reports) if not r.is_sound(*limits)} == shards
    words = ["tools/verify_tokens.py", store, f"--weights={root / 'second'}", "--teacher=second"]
    process = processes.start(words)
    (output,) = processes.outputs_of([process], timeout=120)
    assert process.returncode == 1 and "view001" in output


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_contents(store):
    """A second store of the same images, with other crops."""
    views = further_teachers.load(store, "second").views
    edit_json(store / "teachers/second/teacher.json", views=["0" * 16, *views[1:]])


# Change of a store, what is called, the error message.
ADD, OPEN = "add", "open"
FAULTS = [
    (lambda store: shutil.rmtree(store / "teachers"), OPEN,
     "no tokens of a teacher second .*has none.*--only=second"),
    (lambda store: (store / "teachers/second/dataset_info.json").unlink(), OPEN,
     "second is unfinished; finish it with: "),
    (other_contents, OPEN, "other contents of .*view000: remove"),
    (other_contents, ADD, "views of the store"),
    (lambda store: edit_json(store / "teachers/second/teacher.json", format=9), OPEN,
     "written by a newer version: format 9"),
    (lambda store: edit_json(store / "teachers/second/teacher.json", x=1), OPEN, "damaged.*json.x"),
    (lambda store: (store / "teachers/second/teacher.json").write_text("{"), OPEN,
     "teacher.json is damaged: JSONDecodeError"),
    (lambda store: (store / "dataset_info.json").unlink(), ADD, "unfinished; finish it with"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_are_refused(built, tmp_path, number):
    root, _ = built
    change, call, message = FAULTS[number]
    store = shutil.copytree(root / "store", tmp_path / "store")
    change(store)
    config = settings(root, second={"weights": str(root / "second"), "codec": "float16"})
    with pytest.raises(UserError, match=message):
        if call == OPEN:
            further_teachers.open_directory(store, "second")
        else:
            further.add(config, store, "second")


OTHERS = {
    "weights": ({"weights": "first", "image_size": 16}, "weights' hash"),
    "dtype": ({"weights": "second", "dtype": "bfloat16"}, "weights' dtype"),
    "codec": ({"weights": "second", "codec": "int8"}, "codec float16, not int8"),
    "pca": ({"weights": "second", "pca": 4}, "pca None, not 4"),
    "size": ({"weights": "second", "image_size": 24}, "16 pixels, second takes 24"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_teacher_of_the_same_name_is_refused(built, name):
    root, _ = built
    changes, message = OTHERS[name]
    values = {"codec": "float16", **changes, "weights": str(root / changes["weights"])}
    with pytest.raises(UserError, match=message):
        further.add(settings(root, second=values), root / "store", "second")


def test_names_and_flags_are_checked(built):
    root, flags = built
    for name, message in {
        "teacher": "that is the name of config.teacher", "a-b": "letters, digits", "": "letters",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            settings(root, **{name: {"weights": "x"}})
    with pytest.raises(UserError, match="second.weights is empty"):
        settings(root, second={})
    with pytest.raises(UserError, match="unknown config key .*teachers.second.codek: .*codec"):
        settings(root, second={"weights": "x", "codek": "int8"})
    for flag, message in itertools.chain(
        {"--only=third": "no config.teachers.third"}.items(),
        {"--config.teachers.second=3": "a group of named groups"}.items(),
        {"--config.teachers.second.codek=int8": "teachers.second.codek: did you mean"}.items(),
    ):
        process = processes.start([*flags, flag, f"--out={root / 'other'}"])
        (output,) = processes.outputs_of([process], timeout=60)
        assert process.returncode == 1 and message in output, output


def test_further_teachers_are_described_and_not_left_out(built):
    root, _ = built
    described = describe.describe(root / "store")
    (second,) = [t for t in described["further_teachers"] if t["name"] == "second"]
    assert second["complete"] and second["tokens"]["width"] == 12 and second["bytes"] > 0
    text = "\n".join(store_info.lines(described))
    assert "second       5 × 12, float16, cosine to exact tokens" in text
    with pytest.raises(UserError, match="further teachers .second.*left out"):
        store_parts.open_store(root / "store")


def test_a_heldout_store_takes_the_codec_of_another(built, tmp_path):
    """config.codec_from: the scales of a further teacher, too; another codec is refused."""
    root, _ = built
    store = shutil.copytree(root / "store", tmp_path / "store")
    third = {"weights": str(root / "third")}
    further.add(settings(root, third=third), store, "third")
    heldout = data.token_store(
        tmp_path, root / "images", root / "first", split="train[30:]", crop_scale=(0.9, 1.0)
    )
    values = {"source": "unused", "batch_size": 8, "threads": 2, "codec_from": str(store)}
    other = parse(TokensConfig, values | {"teachers": {"third": third | {"codec": "float16"}}})
    with pytest.raises(UserError, match=r"codec_from.*third \('int8', .*'float16'"):
        further.add(other, heldout, "third")
    further.add(parse(TokensConfig, values | {"teachers": {"third": third}}), heldout, "third")
    stored, taken = (
        teacher.load_codec(directory)
        for teacher, directory in (
            further_teachers.open_directory(path, "third") for path in (store, heldout)
        )
    )
    assert stored.equals(taken)
    shutil.rmtree(heldout / "teachers")
    further.add(settings(root, third=third), heldout, "third")
    own, directory = further_teachers.open_directory(heldout, "third")
    assert not own.load_codec(directory).equals(stored)
