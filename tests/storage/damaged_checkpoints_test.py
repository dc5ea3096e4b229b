"""Checkpoints with changed, truncated or missing files are read as saved, or refused."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax.config import MeshConfig, OptimConfig
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.storage import checksums, orbax_checkpoint, orbax_errors
from dgpt_jax.training import checkpointing, optimizer, train_step
from tests.support.data import edit_metadata
from tests.support.processes import on_devices


def make_state(step: int, ema: float = 0.9) -> train_step.TrainState:
    """A state whose moving average differs from the parameters."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.optimizer(OptimConfig(ema=ema), 1e-3)
    first = train_step.init_state(
        lambda key: {"encoder": {"w": jax.random.normal(key, (48, 32)), "b": jnp.ones((7,))}},
        tx, mesh, seed=step,
    )  # fmt: skip
    params = jax.tree.map(lambda x: x + 1, first.params)
    return train_step.TrainState(first.step + step, params, first.opt_state)


def save(workdir, *states) -> None:
    with checkpointing.Checkpoints(workdir, keep=9) as checkpoints:
        for saved in states:
            checkpoints.save(saved, {"config": {"seed": 3}})


def restore(workdir) -> train_step.TrainState:
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
    )
    with checkpointing.Checkpoints(workdir, keep=9) as checkpoints:
        return checkpoints.restore(checkpoints.latest(), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, make_state(4))
    return workdir


FILES = {  # glob below the step's directory: positions of bytes to change, as fractions of the size
    "metadata/metadata": (0.1, 0.5, 0.9),
    "params/_METADATA": (0.05, 0.3, 0.6, 0.95),
    "params/_sharding": (0.1, 0.5),
    "params/manifest.ocdbt": (0.1, 0.5, 0.9),
    "params/d/*": (0.1, 0.5, 0.9),
    "params/ocdbt.process_0/manifest.ocdbt": (0.5,),
    "params/ocdbt.process_0/d/*": (0.1, 0.3, 0.5, 0.7, 0.9),
    "params/array_metadatas/process_0": (0.5,),
    "opt_state/_METADATA": (0.05, 0.3, 0.6, 0.95),
    "opt_state/_sharding": (0.5,),
    "opt_state/manifest.ocdbt": (0.5,),
    "opt_state/d/*": (0.1, 0.5, 0.9),
    "opt_state/ocdbt.process_0/d/*": (0.1, 0.3, 0.5, 0.7, 0.9),
    "_CHECKPOINT_METADATA": (0.1, 0.5),
}
DAMAGES = [(name, "bit", at) for name, positions in FILES.items() for at in positions]
DAMAGES += [(name, kind, 0.5) for name in FILES for kind in ("truncated", "emptied", "removed")]


def damage(path, kind: str, at: float):
    content = bytearray(path.read_bytes())
    position = int(at * (len(content) - 1))
    if kind == "removed":
        return path.unlink()
    if kind == "bit":
        content[position] ^= 4
    else:
        del content[position if kind == "truncated" else 0 :]
    return path.write_bytes(content)


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


@pytest.mark.parametrize("name,kind,at", DAMAGES, ids=lambda value: str(value).replace("/", "."))
def test_damaged_files_are_read_as_saved_or_refused(saved, tmp_path, name, kind, at):
    workdir = shutil.copytree(saved, tmp_path / "run")
    files = [path for path in (workdir / "checkpoints/4").glob(name) if path.is_file()]
    assert files, "the pattern matches no file of this version of Orbax"
    for path in files:
        damage(path, kind, at)
    expected = make_state(4)
    try:
        params, metadata = orbax_checkpoint.load_params(workdir)
        assert equal(params, expected.opt_state.inner.ema)
        assert metadata["config"] == {"seed": 3} and metadata["step"] == 4
    except UserError as e:
        assert re.search("damaged|lacks opt_state|no finished checkpoint", str(e)), e
        assert "\n" not in str(e)
    try:
        again = restore(workdir)
        assert equal(again.params, expected.params)
        assert equal(again.opt_state, expected.opt_state)
    except UserError as e:
        assert "damaged" in str(e)


@pytest.mark.parametrize(
    "error,message",
    [
        (FileNotFoundError(2, "No such file"), "x is damaged: .*No such file"),
        (ValueError("DATA_LOSS: CRC mismatch\nmore"), "x is damaged: DATA_LOSS: CRC mismatch"),
        (KeyError("tree"), "x is damaged: 'tree'"),
        (PermissionError(13, "Permission denied"), "x cannot be read: .*Permission denied$"),
        (ConnectionResetError(104, "Connection reset"), "x cannot be read: .*Connection reset$"),
        (TimeoutError("timed out"), "x cannot be read: timed out$"),
        (ValueError("UNAVAILABLE: connection lost"), "x cannot be read: UNAVAILABLE"),
        (ValueError("PERMISSION_DENIED: no"), "x cannot be read: PERMISSION_DENIED"),
    ],
)
def test_unreachable_files_are_not_called_damaged(error, message):
    with pytest.raises(UserError, match=message), orbax_errors.translate_damage("x"):
        raise error


WRONG = "0" * 16


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda sums: sums.update({"params/encoder/w": WRONG}), "params/encoder/w differs"),
        (lambda sums: sums.update({"params/encoder/x": WRONG}), "params/encoder/x is missing"),
        (lambda sums: sums.pop("params/encoder/b"), "params/encoder/b differs"),
    ],
    ids=["another", "missing", "added"],
)
def test_arrays_must_match_the_saved_checksums(tmp_path, edit, message):
    save(tmp_path, make_state(4, ema=0.0))
    edit_metadata(tmp_path / "checkpoints/4", lambda content: edit(content["checksums"]))
    with pytest.raises(UserError, match=message):
        orbax_checkpoint.load_params(tmp_path)
    params, _ = orbax_checkpoint.load_params(tmp_path, names=["nothing"])
    assert params == {}


def test_requested_arrays_alone_are_verified(tmp_path):
    save(tmp_path, make_state(4, ema=0.0))
    edit_metadata(
        tmp_path / "checkpoints/4",
        lambda content: content["checksums"].update({"params/encoder/w": WRONG}),
    )
    params, _ = orbax_checkpoint.load_params(tmp_path, names=["encoder/b"])
    assert list(params["encoder"]) == ["b"]


def test_a_missing_average_is_refused(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/4/opt_state")
    with pytest.raises(UserError, match="lacks opt_state.*config.optim.ema"):
        orbax_checkpoint.load_params(workdir)
    assert orbax_checkpoint.describe(workdir)  # the other arrays can be listed
    with pytest.raises(UserError, match="damaged"):
        restore(workdir)


def test_missing_checksums_are_reported_once(saved, tmp_path, capsys):
    workdir = shutil.copytree(saved, tmp_path / "run")
    path = workdir / "checkpoints/4/metadata/metadata"
    content = json.loads(path.read_text())
    del content["checksums"], content["checksum"]
    path.write_text(json.dumps(content))
    orbax_checkpoint.load_params(workdir)
    assert capsys.readouterr().err.count("has no checksums") == 1
    restore(workdir)
    assert capsys.readouterr().err.count("has no checksums") == 1


ARRAYS = {
    "float32": np.linspace(-1, 1, 35 * 64, dtype=np.float32).reshape(35, 64),
    "bfloat16": np.linspace(-1, 1, 24).reshape(8, 3).astype(jnp.bfloat16),
    "float16": np.linspace(-1, 1, 9).astype(np.float16),
    "int8": np.arange(-40, 40, dtype=np.int8).reshape(2, 40),
    "int32": np.arange(3 * checksums.CHUNK + 5, dtype=np.int32),
    "uint32": np.full((3, 3, 3), 2**32 - 1, np.uint32),
    "bool": np.array([True, False, True]),
    "scalar": np.float32(3.5).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
    "nan": np.array([np.nan, -np.nan, 0.0, -0.0], np.float32),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ARRAYS)
def test_checksums_are_equal_on_devices_and_host(name):
    host = checksums.of_tree({"x": ARRAYS[name]})
    assert len(host["x"]) == 16
    on_device = jnp.asarray(ARRAYS[name])
    assert checksums.of_tree({"x": on_device}) == host  # on a CPU, by NumPy
    compiled = checksums._on_devices(on_device)
    np.testing.assert_array_equal(compiled, checksums._on_host(ARRAYS[name]))


@pytest.mark.parametrize("name", [name for name in ARRAYS if name != "empty"])
def test_every_bit_and_position_counts(name):
    array = ARRAYS[name]
    sums = {checksums.of_tree([array])["0"]}
    data = array.tobytes()
    for position in sorted({0, len(data) // 2, len(data) - 1}):
        for bit in range(8) if array.dtype != bool else (0,):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            other = np.frombuffer(bytes(changed), array.dtype).reshape(array.shape)
            sums.add(checksums.of_tree([other])["0"])
    flat = array.reshape(-1)
    count = 1 + (8 if array.dtype != bool else 1) * len({0, len(data) // 2, len(data) - 1})
    assert len(sums) == count
    if flat.size > 1 and flat[0] != flat[-1]:
        swapped = flat.copy()
        swapped[[0, -1]] = swapped[[-1, 0]]
        assert checksums.of_tree([swapped.reshape(array.shape)])["0"] not in sums


def check_shardings():
    """Runs in a process with eight devices."""
    host = {"x": np.arange(64 * 24, dtype=np.float32).reshape(64, 24), "y": ARRAYS["scalar"]}
    expected = checksums.of_tree(host)
    P = jax.sharding.PartitionSpec
    for devices in (jax.devices(), jax.devices()[::-1], jax.devices()[3:5]):
        mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 2), ("a", "b"))
        for spec in (P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))):
            if any(64 % len(devices) or 24 % n for n in mesh.shape.values()):
                continue
            sharded = {
                name: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec if x.ndim else P()))
                for name, x in host.items()
            }
            assert checksums.of_tree(sharded) == expected, (spec, devices)
            text = checksums._on_devices.lower(sharded["x"]).compile().as_text()
            assert "all-gather" not in text, "an array is gathered to be summed"
            print("checked", spec)


def test_checksums_are_independent_of_sharding(capfd):
    on_devices(8, check_shardings)
    assert capfd.readouterr().out.count("checked") >= 10
