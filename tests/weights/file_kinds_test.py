"""Weights files: any suffix, several state dicts, prefixes of names, invalid files."""

import gc
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from dgpt_jax.errors import UserError
from dgpt_jax.weights import files, mapping, registry, teacher_loading
from dgpt_jax.weights.layouts import timm
from tests.support.conversions import random_weights
from tests.support.data import random_teacher

A, B = {"a": np.arange(2.0, dtype=np.float32)}, {"b": np.arange(3.0, dtype=np.float32)}
NAMES = ("x.ckpt", "x.pth.tar", "x", "x.weights", "x.safetensors", "x.pth", "x.npz", "x.bin")


@pytest.fixture(autouse=True, scope="module")
def no_garbage():
    """What other tests left open is closed now, and not warned about within a test."""
    gc.collect()


def as_torch(content):
    """The same nested dicts with tensors for arrays."""
    torch = pytest.importorskip("torch")
    if isinstance(content, dict):
        return {name: as_torch(value) for name, value in content.items()}
    return torch.from_numpy(content) if isinstance(content, np.ndarray) else content


def save(path, content, legacy=False):
    torch = pytest.importorskip("torch")
    torch.save(as_torch(content), path, _use_new_zipfile_serialization=not legacy)
    return path


def index(path, names=("1.safetensors", "2.safetensors")):
    """Two shards with an index beside them."""
    for name, state in zip(names, (A, B), strict=True):
        save_file(state, path.parent / name)
    path.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    return path


def savez(path):
    with path.open("wb") as file:  # given a path, NumPy changes the suffix
        np.savez(file, **A, **B)


WRITERS = {
    "safetensors": lambda path: save_file(A | B, path),
    "torch": lambda path: save(path, A | B),
    "older torch": lambda path: save(path, A | B, legacy=True),
    "npz": savez,
    "index": index,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", WRITERS)
def test_formats_are_detected_by_content(tmp_path, kind, name):
    WRITERS[kind](tmp_path / name)
    state, path, notes = files.read(tmp_path / name)
    assert path == tmp_path / name and notes == ()
    for key, value in (A | B).items():
        np.testing.assert_array_equal(state[key], value)


@pytest.mark.parametrize("size", [ord("<"), ord("{")])
def test_safetensors_header_length_that_looks_like_text(tmp_path, size):
    """A safetensors file starts with the length of its header."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}})
    data = header.replace(" ", "").encode().ljust(size) + bytes(4)
    (tmp_path / "x").write_bytes(size.to_bytes(8, "little") + data)
    assert files.read(tmp_path / "x").state == {"a": 0}


STATES = [
    ({"state_dict": A, "state_dict_ema": B}, None, "state_dict", ["state_dict_ema"]),
    ({"state_dict": A, "state_dict_ema": B}, "state_dict_ema", "state_dict_ema", []),
    ({"state_dict_ema": B, "state_dict": A}, "state_dict", "state_dict", []),
    ({"model": A, "model_ema": B}, None, "model", ["model_ema"]),
    ({"model": A, "model_ema": B}, "model_ema", "model_ema", []),
    ({"model": A, "ema": {"module": B}, "epoch": 3}, "ema", "ema", []),
    ({"model": A, "state_dict": B}, None, "model", ["state_dict"]),
    ({"model_state_dict": A, "optimizer": {"state": {0: {"m": B["b"]}}}}, None, None, []),
    ({"module": A}, None, None, []),
    ({"net": A, "epoch": 1}, None, None, []),
    ({"model": {"state_dict": A}}, None, None, []),
    ({"teacher": A, "student": B}, "teacher", "teacher", []),
]


@pytest.mark.parametrize(("content", "key", "selected", "others"), STATES)
def test_several_state_dicts(tmp_path, content, key, selected, others):
    path = save(tmp_path / "x.pth", content)
    state, file, notes = files.read(f"{path}#{key}" if key else path)
    expected = B if key in ("state_dict_ema", "model_ema", "ema") else A
    assert state.keys() == expected.keys()
    assert file.name == (f"x.pth#{selected}" if selected else "x.pth")
    assert len(notes) == len(others)
    for note, other in zip(notes, others, strict=True):
        assert f" {selected};" in note and f"{path}#{other}" in note


def test_keys_of_state_dicts(tmp_path):
    path = save(tmp_path / "x.pth", {"teacher": A, "student": B})
    with pytest.raises(UserError, match=r"teacher, student.*#KEY"):
        files.read(path)
    with pytest.raises(UserError, match="'ema'.*teacher, student"):
        files.read(f"{path}#ema")
    for nested in ("teacher/a", "ema/model/b"):
        with pytest.raises(UserError, match=f"x.pth has .*'{nested}'.*within.*teacher, student"):
            registry.read(f"{path}#{nested}")
    save_file(A, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors.*#a/b"):
        files.read(tmp_path / "x.safetensors#a/b")
    with pytest.raises(UserError, match="x.safetensors.*#ema"):
        files.read(tmp_path / "x.safetensors#ema")
    with pytest.raises(UserError, match="absent.pth$"):
        files.read(tmp_path / "absent.pth#ema")
    save(tmp_path / "y#z.pth", A)
    assert files.read(tmp_path / "y#z.pth").path.name == "y#z.pth"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module."],
)
@pytest.mark.parametrize("more", [{}, {"n_averaged": np.zeros((), np.int64)}])
def test_a_prefix_of_all_names_is_removed(tmp_path, prefix, more):
    path = save(tmp_path / "x.pth", {"model": {f"{prefix}{n}": x for n, x in (A | B).items()}})
    state, _, notes = files.read(path)
    assert state.keys() == (A | B).keys()
    assert len(notes) == 1 and f"prefix {prefix} " in notes[0]


def test_a_prefix_of_some_names_remains(tmp_path):
    state = {"module.a": A["a"], "b": B["b"]}
    assert files.read(save(tmp_path / "x.pth", state)).state.keys() == state.keys()
    for name, shard in (("1.bin", {"module.a": A["a"]}), ("2.bin", {"b": B["b"]})):
        save(tmp_path / name, shard)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"weight_map": {"module.a": "1.bin", "b": "2.bin"}}))
    assert files.read(path).state.keys() == state.keys()
    path.write_text(json.dumps({"weight_map": {"module.a": "1.bin", "module.c": "1.bin"}}))
    with pytest.raises(UserError, match="module.c"):
        files.read(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
INVALID = {
    "empty": (b"", "empty"),
    "pointer": (POINTER, "git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>\x1b[1mSign in", "web page"),
    "error": (b'{"error": "not found"}', "weight_map"),
    "list": (b"[1, 2]", "JSON list"),
    "broken JSON": (b'{"weight_map": ', "JSON"),
    "shard outside": (b'{"weight_map": {"a": "../x"}}', "../x"),
    "shard missing": (b'{"weight_map": {"a": "y.bin"}}', "y.bin"),
    "itself": (b'{"weight_map": {"a": "NAME"}}', "shard"),
    "words": (b"some words \x1b[31m", None),
    "pickle": (b"\x80\x04N.", None),
    "zip": (b"PK\x03\x04 nothing", None),
    "hdf5": (b"\x89HDF\r\n\x1a\n", None),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", INVALID)
def test_invalid_files(tmp_path, case, name, recwarn):
    pytest.importorskip("torch")
    data, message = INVALID[case]
    (tmp_path / name).write_bytes(data.replace(b"NAME", name.encode()))
    with pytest.raises(UserError) as error:
        files.read(tmp_path / name)
    line = str(error.value)
    assert (message or "") in line and line.isprintable() and str(tmp_path / name) in line
    assert not [str(x.message) for x in recwarn]  # they would be printed on stderr


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", ["module", "under a key", "beside a state dict"])
def test_pickled_modules_are_refused_with_a_remedy(tmp_path, case, legacy):
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 2)
    content = {
        "module": module, "under a key": {"model": module},
        "beside a state dict": {"model": module.state_dict(), "ema": module},
    }[case]  # fmt: skip
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError) as error:
        files.read(tmp_path / "x.pth")
    line = str(error.value)
    assert "torch.nn.modules.linear.Linear" in line
    assert "`state_dict()`" in line and line.isprintable()


def test_parameters_and_sparse_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(2, 2)
    torch.save(linear.state_dict(keep_vars=True), tmp_path / "x.pth")
    assert files.read(tmp_path / "x.pth").state.keys() == {"weight", "bias"}
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth"):
        files.read(tmp_path / "x.pth")


def encoder_state():
    weights = random_weights(width=192)
    return weights, mapping.write(timm.LAYOUT.table(weights), weights.params)


def test_an_encoder_in_a_training_checkpoint(tmp_path):
    """Notes name key and prefix; the key is part of the source, by which results are named."""
    weights, state = encoder_state()
    ema = {f"module.{name}": 2 * array for name, array in state.items()}
    path = save(tmp_path / "x.ckpt", {"state_dict": state, "state_dict_ema": ema})
    _, default = registry.read(path, heads=3)
    assert default.source == f"{path}#state_dict" and "state_dict_ema" in default.notes[0]
    _, average = registry.read(f"{path}#state_dict_ema", heads=3)
    assert average.source == f"{path}#state_dict_ema" and "module." in average.notes[0]
    for name, array in weights.params.items():
        np.testing.assert_array_equal(average.params[name], 2 * array)


@pytest.mark.parametrize("name", ["teacher.ckpt", "teacher.pth.tar", "teacher"])
def test_a_teacher_in_a_training_checkpoint(tmp_path, name):
    random_teacher(tmp_path)
    expected = teacher_loading.load(str(tmp_path))
    file = tmp_path / "open_clip_model.safetensors"
    state = files.read_state(file)
    file.unlink()
    average = {f"module.{n}": x for n, x in state.items()}
    path = save(tmp_path / name, {"model": {"a": A["a"]}, "model_ema": average})
    teacher = teacher_loading.load(f"{path}#model_ema")
    assert (teacher.hash, teacher.tower) == (expected.hash, expected.tower)
    assert teacher.name == name.split("#")[0].removesuffix(".ckpt").removesuffix(".tar")
    with pytest.raises(UserError, match="teacher.* 1 arrays are a$"):
        teacher_loading.load(str(path))


def test_an_index_as_the_file_of_a_teacher(tmp_path):
    random_teacher(tmp_path)
    expected = teacher_loading.load(str(tmp_path))
    shutil.move(tmp_path / "open_clip_model.safetensors", tmp_path / "1.safetensors")
    names = files.read_state(tmp_path / "1.safetensors")
    path = tmp_path / files.INDEX
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "1.safetensors")}))
    assert (
        teacher_loading.load(str(path)).hash
        == teacher_loading.load(str(tmp_path)).hash
        == expected.hash
    )


def test_first_names_of_unknown_arrays(tmp_path):
    state = {f"net.{i}.weight": np.ones(1, np.float32) for i in range(9)}
    save_file(state, tmp_path / "x.safetensors")
    for read in (teacher_loading.load, registry.read):
        with pytest.raises(UserError, match="the first of its 9 arrays are net.0.weight, net.1.w"):
            read(str(tmp_path / "x.safetensors"))
