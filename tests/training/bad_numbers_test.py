"""Updates from bad numbers are left out; a run of them stops, and can be run again alone."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import portpicker
import pytest
import replay as replay_tool

from dgpt_jax import (
    batching,
    cli,
    losses,
    optim,
    records,
    replay,
    sharding,
    shards,
    state,
    token_codec,
    token_store,
    train,
)
from dgpt_jax.config import Train
from dgpt_jax.schema import UserError, parse
from dgpt_jax.tasks.pretrain import Pretrain, Target, open_pretrain
from dgpt_jax.token_codec import Codec
from tests import data, processes


def guarded(**changes):
    return optim.guarded(optax.adam(0.1), **{"most": 3, "spike": 0.0} | changes)


def run(tx, steps):
    """Parameters and state after (gradient, loss) steps on one number."""
    params = {"x": jnp.ones(())}
    state, seen = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient, loss in steps:
        updates, state = update(
            {"x": jnp.float32(gradient)}, state, params, value=jnp.float32(loss)
        )
        params = optax.apply_updates(params, updates)
        seen.append((float(params["x"]), int(state.skipped), int(state.in_a_row)))
    return seen, state


def test_an_update_that_is_not_finite_changes_nothing():
    good = [(1.0, 1.0), (0.5, 1.0)]
    expected, wanted = run(guarded(), good)
    for gradient, loss in ((np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)):
        found, state = run(guarded(), [good[0], (gradient, loss), good[1]])
        assert found[0][0] == found[1][0] and found[1][1:] == (1, 1)
        assert found[2] == (expected[1][0], 1, 0)
        jax.tree.map(np.testing.assert_array_equal, state.inner, wanted.inner)
        assert state.mean_loss == wanted.mean_loss


def test_after_so_many_in_a_row_nothing_moves_any_more():
    bad, good = (np.nan, 1.0), (1.0, 1.0)
    found, _ = run(guarded(), [bad, bad, good, bad, bad, bad, good, good])
    values, skipped, in_a_row = zip(*found, strict=True)
    assert values[1] == 1.0 != values[2] and len(set(values[2:])) == 1
    assert in_a_row == (1, 2, 0, 1, 2, 3, 4, 5) and skipped[-1] == 7


def test_a_spike_of_the_loss_is_left_out():
    calm = [(0.01, 1.0)] * 120
    found, state = run(guarded(spike=2.0), [*calm, (0.01, 2.5), (0.01, 1.9)])
    assert [f[1] for f in found[-3:]] == [0, 1, 1] and found[-2][0] == found[-3][0]
    assert 1.0 < float(state.mean_loss / state.weight) < 1.1  # the spike is not in it
    found, _ = run(guarded(), [*calm, (0.01, 2.5)])
    assert found[-1][1] == 0
    early, _ = run(guarded(spike=2.0), [(0.01, 1.0), (0.01, 9.0)])
    assert early[-1][1] == 0  # a mean of one step is none


def test_a_zero_vector_has_a_finite_gradient():
    x, zero = jnp.ones((2, 4)), jnp.zeros((2, 4))
    for a, b in ((zero, x), (x, zero), (zero, zero)):
        value, grads = jax.value_and_grad(lambda a, b: losses.cosine_loss(a, b).sum(), (0, 1))(a, b)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def dtypes_of(jaxpr, found) -> dict:
    """{primitive: dtypes of its results}, also within the programs that it calls."""
    for equation in jaxpr.eqns:
        for result in equation.outvars:
            found.setdefault(equation.primitive.name, set()).add(str(result.aval.dtype))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                dtypes_of(inner, found)
    return found


def test_float32_where_it_matters():
    """Norms, softmax, GELU, cosine, loss, gradients of parameters; bfloat16 only in products."""
    config = parse(Train, {"model": data.TINY, "data": {"path": "x"}, "dtype": "bfloat16"})
    task = Pretrain(config, Target(24, (4, 4), True, Codec("int8", np.ones(24))))
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = {n: jnp.zeros((2, *x.shape), x.dtype) for n, x in task.abstract_example().items()}
    step = jax.value_and_grad(task.loss, has_aux=True)
    (loss, _), grads = jax.eval_shape(step, params, {}, batch)
    assert {x.dtype.name for x in jax.tree.leaves((loss, grads, params))} == {"float32"}
    found = dtypes_of(jax.make_jaxpr(task.loss)(params, {}, batch).jaxpr, {})
    assert "bfloat16" in found["dot_general"]
    for primitive in ("erf", "exp", "rsqrt", "sqrt", "reduce_max", "reduce_sum", "square"):
        assert found.get(primitive, {"float32"}) == {"float32"}, primitive
    assert {"erf", "exp", "rsqrt", "sqrt"} <= found.keys()


def settings(store, **changes) -> Train:
    return parse(Train, {
        "total": "12 steps", "batch_size": 4, "dtype": "float32", "log_every": 1,
        "model": data.TINY, "data": {"path": str(store), "threads": 2},
        "optim": {"warmup": "1 steps", "bad_steps": 3}, "checkpoint": {"every": "100%"},
    } | changes)  # fmt: skip


def poisoned(store, indices) -> None:
    """Examples of view 0 whose tokens are infinite."""
    info, split = token_store.StoreInfo.load(store), records.Split(store, "view000")
    features, receipts = token_store.features(info, split.label), shards.receipts(store)
    examples = list(split)
    for index in indices:
        examples[index]["tokens"] = np.full_like(examples[index]["tokens"], np.inf)
    path = records.shard_path(store, "view000", 0, 1, info.name)
    receipt = shards.write(path, map(records.serializer(features), examples))
    shards.seal(store, receipts | {path.name: receipt})


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of float16 tokens, 12 examples in one shard, read without looking at them: what is
    not finite would be refused there."""
    monkeypatch.setattr(token_codec, "is_finite", lambda _: True)
    dataset = data.image_dataset(tmp_path, per_class=6)
    teacher = data.random_teacher(tmp_path / "teacher")
    return data.token_store(tmp_path, dataset, teacher, codec="float16")


def initial(config: Train, seed: int):
    """The parameters that a run begins with, made by its program, which is compiled already."""
    tx = optim.optimizer(config.optim, 1e-3)
    mesh = sharding.make_mesh(config.mesh)
    return state.create(open_pretrain(config).init, tx, mesh, seed).params


def lines_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_one_bad_example_costs_its_batches(store, tmp_path):
    poisoned(store, [5])
    config = settings(store)
    assert train.train(config, tmp_path / "run") == 0
    logged = [line for line in lines_of(tmp_path / "run") if "skipped" in line]
    assert logged[-1]["skipped"] == 4  # once in each of four epochs of three batches
    assert all(np.isfinite(line["loss"]) for line in logged if line["loss"] != "nan")
    assert sum(line["loss"] == "nan" for line in logged) == 4


def test_bad_numbers_stop_the_run_and_the_step_runs_again(store, tmp_path, monkeypatch, capsys):
    poisoned(store, range(12))
    config = settings(store)
    with pytest.raises(UserError, match="in all .* steps from 0 on.*tools/replay.py") as error:
        train.train(config, tmp_path / "run")
    left = str(error.value).split()[-1]
    told = json.loads((tmp_path / "run/bad_step_000000/step.json").read_text())
    assert not np.isfinite(told["loss"]) and told["step"] == 0
    assert not np.isfinite(told["grads"]["encoder/blocks/attn/qkv/kernel"]).any()
    found = replay.replay(left)
    assert found.bad_examples() == found.ids and len(found.ids) == 4
    assert all(id_.startswith("view000/") for id_ in found.ids)
    # The parameters are those of the start, and sound.
    assert all(np.isfinite(norms).all() for norms in found.now["params"].values())
    kernel = initial(config, seed=0)["encoder"]["patch_embed"]["kernel"]
    assert found.now["params"]["encoder/patch_embed/kernel"] == pytest.approx(
        [np.linalg.norm(kernel)], rel=1e-4
    )
    monkeypatch.setattr(sys, "argv", ["replay", left, "--dtype=float32"])
    cli.run(replay_tool.main)
    assert "4 of 4 examples are not finite: view000/" in capsys.readouterr().out


def test_a_run_that_stopped_goes_on_when_its_data_are_mended(store, tmp_path):
    """A checkpoint that was saved among bad steps does not hold on to their count."""
    sound = tmp_path / "sound"
    shutil.copytree(store, sound)
    poisoned(store, range(12))
    rarely = {"log_every": 5, "checkpoint": {"every": "4 steps"}}
    with pytest.raises(UserError, match="tools/replay.py"):
        train.train(settings(store, **rarely), tmp_path / "run")
    with pytest.raises(UserError, match="sound has other contents"):
        train.train(settings(sound, **rarely), tmp_path / "run")
    run = settings(sound, **rarely)
    assert train.train(run, tmp_path / "run", allow_config_change=True) == 0
    last = [line for line in lines_of(tmp_path / "run") if "skipped" in line][-1]
    assert last["step"] == 12 and np.isfinite(last["loss"]) and 0 < last["skipped"] < 12


TOGETHER = """
from dgpt_jax import cli, token_codec, train
token_codec.is_finite = lambda _: True
cli.run(train.main)
"""


@pytest.mark.slow
def test_two_processes_leave_one_step(store, tmp_path):
    """Each its rows of the batch, and parameters that no process held whole."""
    poisoned(store, range(12))
    words = ["-c", TOGETHER, "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    words += [f"--config.data.path={store}", "--config.total=12 steps", "--config.batch_size=4"]
    words += ["--config.log_every=1", "--config.optim.bad_steps=3", "--config.mesh.fsdp=2"]
    words += ["--config.evals.heldout=", "--config.evals.knn=", "--config.hosts.processes=2"]
    small = data.TINY | {"depth": 1, "taps": 1, "decoder_depth": 1}
    words += [f"--config.model.{name}={value}" for name, value in small.items()]
    words += [f"--config.hosts.coordinator=localhost:{portpicker.pick_unused_port()}"]
    both = [processes.start([*words, f"--config.hosts.process={i}"]) for i in range(2)]
    outputs = processes.outputs_of(both, timeout=500)
    assert [process.returncode for process in both] == [1, 1], outputs
    assert all("look with python tools/replay.py" in output for output in outputs)
    left = tmp_path / "run/bad_step_000000"
    assert len(list(left.glob("batch_*.npz"))) == 2
    found = replay.replay(left)
    assert found.bad_examples() == found.ids and len(set(found.ids)) == 4
    before, now = (flat["encoder/blocks/attn/qkv/kernel"] for flat in (
        found.before["params"], found.now["params"]
    ))  # fmt: skip
    assert now == pytest.approx(before, rel=1e-5)


def test_replay_of_a_sound_step_gives_its_loss(store, tmp_path):
    """What is written down is enough: no data, no run."""
    config = settings(store)
    task = open_pretrain(config)
    mesh = sharding.make_mesh(config.mesh)
    params, rows = initial(config, seed=1), np.arange(4)
    local = next(batching.train_batches(task.examples, 4, rows=rows, start_step=2))
    ids = batching.batch_ids(task.examples, 4, rows=rows, step=2)
    left = replay.write(tmp_path / "run", task, params, 2, ids, local, mesh)
    found = replay.replay(left)
    assert found.now["loss"] == pytest.approx(found.before["loss"], rel=1e-5)
    assert found.now["loss"] == pytest.approx(
        float(jax.jit(task.loss)(params, {}, local)[0]), rel=1e-5
    )
    assert not found.bad_examples() and found.layers()[0][2] > 0
    with pytest.raises(UserError, match="has no step.json"):
        replay.replay(tmp_path)
