"""Updates from non-finite numbers are skipped; many in a row stop the run and dump the step."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import portpicker
import pytest

from dgpt_jax import cli, train
from dgpt_jax.commands import replay as replay_tool
from dgpt_jax.config import TrainConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import loader, token_codec, token_store
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.models import losses
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.training import bad_step_replay, optimizer, train_step
from dgpt_jax.training.tasks.pretrain import PretrainTask, open_pretrain
from dgpt_jax.training.tasks.targets import Target
from tests.support import data, processes


def skipping(**changes):
    return optimizer.skip_nonfinite(
        optax.adam(0.1), **{"max_in_a_row": 3, "spike_factor": 0.0} | changes
    )


def run(tx, steps):
    """((parameter, skipped, in_a_row) after each step, final state) for (gradient, loss) steps."""
    params = {"x": jnp.ones(())}
    state, steps_taken = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient, loss in steps:
        updates, state = update(
            {"x": jnp.float32(gradient)}, state, params, value=jnp.float32(loss)
        )
        params = optax.apply_updates(params, updates)
        steps_taken.append((float(params["x"]), int(state.skipped), int(state.in_a_row)))
    return steps_taken, state


def test_non_finite_updates_are_skipped():
    good = [(1.0, 1.0), (0.5, 1.0)]
    expected, expected_state = run(skipping(), good)
    for gradient, loss in ((np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)):
        actual, state = run(skipping(), [good[0], (gradient, loss), good[1]])
        assert actual[0][0] == actual[1][0] and actual[1][1:] == (1, 1)
        assert actual[2] == (expected[1][0], 1, 0)
        jax.tree.map(np.testing.assert_array_equal, state.inner, expected_state.inner)
        assert state.mean_loss == expected_state.mean_loss


def test_after_max_in_a_row_all_updates_are_skipped():
    bad, good = (np.nan, 1.0), (1.0, 1.0)
    steps, _ = run(skipping(), [bad, bad, good, bad, bad, bad, good, good])
    values, skipped, in_a_row = zip(*steps, strict=True)
    assert values[1] == 1.0 != values[2] and len(set(values[2:])) == 1
    assert in_a_row == (1, 2, 0, 1, 2, 3, 4, 5) and skipped[-1] == 7


def test_loss_spikes_are_skipped():
    calm = [(0.01, 1.0)] * 120
    steps, state = run(skipping(spike_factor=2.0), [*calm, (0.01, 2.5), (0.01, 1.9)])
    assert [skipped for _, skipped, _ in steps[-3:]] == [0, 1, 1] and steps[-2][0] == steps[-3][0]
    assert 1.0 < float(state.mean_loss / state.weight) < 1.1  # without the spike
    steps, _ = run(skipping(), [*calm, (0.01, 2.5)])
    assert steps[-1][1] == 0
    early, _ = run(skipping(spike_factor=2.0), [(0.01, 1.0), (0.01, 9.0)])
    assert early[-1][1] == 0  # too few steps for a mean


def test_a_zero_vector_has_a_finite_gradient():
    x, zero = jnp.ones((2, 4)), jnp.zeros((2, 4))
    for a, b in ((zero, x), (x, zero), (zero, zero)):
        value, grads = jax.value_and_grad(lambda a, b: losses.cosine_loss(a, b).sum(), (0, 1))(a, b)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def add_dtypes(jaxpr, dtypes) -> dict:
    """{primitive: dtypes of its results}, including nested jaxprs."""
    for equation in jaxpr.eqns:
        for result in equation.outvars:
            dtypes.setdefault(equation.primitive.name, set()).add(str(result.aval.dtype))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                add_dtypes(inner, dtypes)
    return dtypes


def test_bfloat16_is_used_in_matmuls_only():
    """Norms, softmax, GELU, cosine, loss and gradients are float32."""
    config = parse(TrainConfig, {"model": data.TINY, "data": {"path": "x"}, "dtype": "bfloat16"})
    task = PretrainTask(config, {"": Target(24, (4, 4), True, Codec("int8", np.ones(24)))})
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = {n: jnp.zeros((2, *x.shape), x.dtype) for n, x in task.abstract_example().items()}
    step = jax.value_and_grad(task.loss, has_aux=True)
    (loss, _), grads = jax.eval_shape(step, params, {}, batch)
    assert {x.dtype.name for x in jax.tree.leaves((loss, grads, params))} == {"float32"}
    dtypes = add_dtypes(jax.make_jaxpr(task.loss)(params, {}, batch).jaxpr, {})
    assert "bfloat16" in dtypes["dot_general"]
    for primitive in ("erf", "exp", "rsqrt", "sqrt", "reduce_max", "reduce_sum", "square"):
        assert dtypes.get(primitive, {"float32"}) == {"float32"}, primitive
    assert {"erf", "exp", "rsqrt", "sqrt"} <= dtypes.keys()


def settings(store, **changes) -> TrainConfig:
    return parse(TrainConfig, {
        "total": "12 steps", "batch_size": 4, "dtype": "float32", "log_every": 1,
        "model": data.TINY, "data": {"path": str(store), "threads": 2},
        "optim": {"warmup": "1 steps", "max_skipped_in_a_row": 3}, "checkpoint": {"every": "100%"},
    } | changes)  # fmt: skip


def poisoned(store, indices) -> None:
    """Replaces the tokens of examples of view 0 by Inf."""
    info, split = token_store.StoreInfo.load(store), tfds_dataset.Split(store, "view000")
    features = token_store.features(info, split.label)
    shard_infos = array_record_shards.shard_infos(store)
    examples = list(split)
    for index in indices:
        examples[index]["tokens"] = np.full_like(examples[index]["tokens"], np.inf)
    path = tfds_dataset.shard_path(store, "view000", 0, 1, info.name)
    shard_info = array_record_shards.write(path, map(tfds_dataset.serializer(features), examples))
    array_record_shards.write_manifest(store, shard_infos | {path.name: shard_info})


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of float16 tokens, 12 examples in one shard, without the check for finite tokens."""
    monkeypatch.setattr(token_codec, "is_finite", lambda _: True)
    dataset = data.image_dataset(tmp_path, per_class=6)
    teacher = data.random_teacher(tmp_path / "teacher")
    return data.token_store(tmp_path, dataset, teacher, codec="float16")


def initial(config: TrainConfig, seed: int):
    """Initial parameters of a run."""
    tx = optimizer.optimizer(config.optim, 1e-3)
    mesh = sharding.make_mesh(config.mesh)
    return train_step.init_state(open_pretrain(config).init, tx, mesh, seed).params


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_batches_with_a_bad_example_are_skipped(store, tmp_path):
    poisoned(store, [5])
    config = settings(store)
    assert train.train(config, tmp_path / "run") == 0
    logged = [line for line in lines_of(tmp_path / "run") if "skipped" in line]
    assert logged[-1]["skipped"] == 4  # once in each of four epochs of three batches
    assert all(np.isfinite(line["loss"]) for line in logged if line["loss"] != "nan")
    assert sum(line["loss"] == "nan" for line in logged) == 4


def test_bad_numbers_stop_the_run_and_the_step_is_replayed(store, tmp_path, monkeypatch, capsys):
    poisoned(store, range(12))
    config = settings(store)
    with pytest.raises(UserError, match="max_skipped_in_a_row.*tools/replay.py") as error:
        train.train(config, tmp_path / "run")
    directory = str(error.value).split()[-1]
    metadata = json.loads((tmp_path / "run/bad_step_000000/step.json").read_text())
    assert not np.isfinite(metadata["loss"]) and metadata["step"] == 0
    assert not np.isfinite(metadata["grads"]["encoder/blocks/attn/qkv/kernel"]).any()
    replayed = bad_step_replay.replay(directory)
    assert replayed.bad_examples() == replayed.ids and len(replayed.ids) == 4
    assert all(id_.startswith("view000/") for id_ in replayed.ids)
    # The parameters are the initial ones.
    assert all(np.isfinite(norms).all() for norms in replayed.now["params"].values())
    kernel = initial(config, seed=0)["encoder"]["patch_embed"]["kernel"]
    assert replayed.now["params"]["encoder/patch_embed/kernel"] == pytest.approx(
        [np.linalg.norm(kernel)], rel=1e-4
    )
    monkeypatch.setattr(sys, "argv", ["replay", directory, "--dtype=float32"])
    cli.run(replay_tool.main)
    assert "4 of 4 examples have non-finite losses: view000/" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stopped_run_resumes_on_fixed_data(store, tmp_path):
    """Also from a checkpoint of a skipped step: the count of skips restarts."""
    sound = tmp_path / "sound"
    shutil.copytree(store, sound)
    poisoned(store, range(12))
    rarely = {"log_every": 5, "checkpoint": {"every": "4 steps"}}
    with pytest.raises(UserError, match="tools/replay.py"):
        train.train(settings(store, **rarely), tmp_path / "run")
    with pytest.raises(UserError, match="sound .*--allow_config_change"):
        train.train(settings(sound, **rarely), tmp_path / "run")
    run = settings(sound, **rarely)
    assert train.train(run, tmp_path / "run", allow_config_change=True) == 0
    last = [line for line in lines_of(tmp_path / "run") if "skipped" in line][-1]
    assert last["step"] == 12 and np.isfinite(last["loss"]) and 0 < last["skipped"] < 12


TRAIN_WITHOUT_TOKEN_CHECK = """
from dgpt_jax import cli, train
from dgpt_jax.data import token_codec
token_codec.is_finite = lambda _: True
cli.run(train.main)
"""


@pytest.mark.slow
def test_two_processes_dump_one_step(store, tmp_path):
    """With parameters that are sharded over both."""
    poisoned(store, range(12))
    argv = [
        "-c",
        TRAIN_WITHOUT_TOKEN_CHECK,
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    argv += [f"--config.data.path={store}", "--config.total=12 steps", "--config.batch_size=4"]
    argv += [
        "--config.log_every=1",
        "--config.optim.max_skipped_in_a_row=3",
        "--config.mesh.fsdp=2",
    ]
    argv += ["--config.evals.heldout=", "--config.evals.knn=", "--config.hosts.num_processes=2"]
    small = data.TINY | {"depth": 1, "taps": 1, "decoder_depth": 1}
    argv += [f"--config.model.{name}={value}" for name, value in small.items()]
    argv += [f"--config.hosts.coordinator=localhost:{portpicker.pick_unused_port()}"]
    both = [processes.start([*argv, f"--config.hosts.process_id={i}"]) for i in range(2)]
    outputs = processes.outputs_of(both, timeout=500)
    assert [process.returncode for process in both] == [1, 1], outputs
    assert all("python tools/replay.py" in output for output in outputs)
    directory = tmp_path / "run/bad_step_000000"
    assert len(list(directory.glob("batch_*.npz"))) == 2
    replayed = bad_step_replay.replay(directory)
    assert replayed.bad_examples() == replayed.ids and len(set(replayed.ids)) == 4
    before, now = (flat["encoder/blocks/attn/qkv/kernel"] for flat in (
        replayed.before["params"], replayed.now["params"]
    ))  # fmt: skip
    assert now == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_replay_of_a_good_step_returns_its_loss(store, tmp_path):
    """Without dataset and run."""
    config = settings(store)
    task = open_pretrain(config)
    mesh = sharding.make_mesh(config.mesh)
    params, rows = initial(config, seed=1), np.arange(4)
    local = next(loader.train_batches(task.examples, 4, rows=rows, start_step=2))
    ids = loader.batch_ids(task.examples, 4, rows=rows, step=2)
    directory = bad_step_replay.write(tmp_path / "run", task, params, 2, ids, local, mesh)
    replayed = bad_step_replay.replay(directory)
    assert replayed.now["loss"] == pytest.approx(replayed.before["loss"], rel=1e-5)
    assert replayed.now["loss"] == pytest.approx(
        float(jax.jit(task.loss)(params, {}, local)[0]), rel=1e-5
    )
    assert not replayed.bad_examples() and replayed.layers()[0][2] > 0
    with pytest.raises(UserError, match="step.json"):
        bad_step_replay.replay(tmp_path)
