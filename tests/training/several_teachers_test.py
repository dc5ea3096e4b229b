"""Pretraining on the tokens of several teachers of one store."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgpt_jax import train
from dgpt_jax.config import TokensConfig, TrainConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import further_teachers, loader
from dgpt_jax.errors import UserError
from dgpt_jax.models import digpt, flops
from dgpt_jax.planning import plan
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import further
from dgpt_jax.training.tasks import pretrain
from dgpt_jax.weights import api
from tests.support import data
from tests.support.data import TINY

SECOND = dataclasses.replace(data.TOWER, image_size=8, patch=4, out_width=12)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of the teachers teacher (4×4, 24, CLS), second (2×2, 12, CLS) and third (4×4, 32)."""
    root = tmp_path_factory.mktemp("several")
    dataset = data.image_dataset(root, per_class=10)
    data.random_teacher(root / "first")
    data.random_teacher(root / "second", seed=1, tower=SECOND)
    (root / "third").mkdir()
    data.random_siglip(root / "third")
    path = data.token_store(root, dataset, root / "first", views=2)
    teachers = {name: {"weights": str(root / name)} for name in ("second", "third")}
    config = parse(
        TokensConfig, {"source": "x", "batch_size": 8, "threads": 2, "teachers": teachers}
    )
    for name in teachers:
        further.add(config, path, name)
    return path


def config(store, **changes):
    values = dict(
        total="4 steps", batch_size=8, dtype="float32", log_every=1, model=TINY,
        data={"path": str(store), "threads": 2}, optim={"blr": 0.064, "warmup": "1 steps"},
    )  # fmt: skip
    return parse(TrainConfig, values | changes)


def batch(task, seed=0):
    batches = loader.train_batches(task.examples, 8, rows=np.arange(8), start_step=seed)
    local = next(batches)
    batches.close()
    return {name: jnp.asarray(local[name]) for name in task.abstract_example()}


def losses_and_gradients(task, params):
    (total, losses), gradients = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, task.frozen, batch(task)
    )
    return total, losses, gradients


BOTH = {"second": {}, "third": {}}


@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_are_those_of_single_teachers(store, separate):
    """Each teacher's with the same parameters; the total is their mean, weighted."""
    weights = {"second": {"loss_weight": 2.0}, "third": {"loss_weight": 0.5}}
    model = TINY | {"separate_decoders": separate}
    task = pretrain.open_pretrain(config(store, teachers=weights, model=model))
    assert task.metric_names[:6] == (
        "next", "visible", "next_second", "visible_second", "next_third", "visible_third",
    )  # fmt: skip
    params = task.init(jax.random.key(0))
    total, losses, gradients = losses_and_gradients(task, params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["encoder"]))
    expected = sum(
        weight * losses[digpt.join(head, name)].mean()
        for name, weight in {"": 1.0, "second": 2.0, "third": 0.5}.items()
        for head in ("next", "visible")
    )
    np.testing.assert_allclose(total, expected / 3.5, rtol=1e-6)
    for name in ("", "second", "third"):
        changes = {} if not name else {"teacher": {"loss_weight": 0.0}, "teachers": {name: {}}}
        alone = pretrain.open_pretrain(config(store, **changes))
        assert list(alone.targets) == [name]
        single = single_teacher(params, name, separate)
        assert jax.tree.map(jnp.shape, single) == jax.tree.map(
            jnp.shape, jax.eval_shape(alone.init, jax.random.key(0))
        )
        _, own, _ = losses_and_gradients(alone, single)
        for head in ("next", "visible"):
            both = losses[digpt.join(head, name)], own[digpt.join(head, name)]
            np.testing.assert_allclose(*both, rtol=1e-5)


def single_teacher(params, name, separate):
    """Parameters of one teacher of several."""
    single = {"encoder": params["encoder"]}
    for head in ("next", "visible"):
        if separate:
            decoder, kept = dict(params[digpt.join(head, name)]), "pred"
        else:
            decoder, kept = dict(params[head]), digpt.join("pred", name)
        own = decoder[kept]
        decoder = {key: value for key, value in decoder.items() if not key.startswith("pred")}
        # Alone, a further teacher keeps the names of its heads.
        single[head] = decoder | {digpt.join("pred", name): own}
    return single


def test_a_weight_of_0_is_the_training_without_the_teacher(store, tmp_path):
    """Bit for bit, and without reading its tokens."""
    logs = []
    for number, changes in enumerate(
        [{}, {"teachers": {"second": {"loss_weight": 0}, "third": {"loss_weight": 0}}}]
    ):
        task = pretrain.open_pretrain(config(store, **changes))
        assert set(task.abstract_example()) == {"image", "order", "tokens"}
        assert set(task.examples(0, 0)) == {"image", "order", "tokens"}
        assert train.train(config(store, **changes), tmp_path / str(number)) == 0
        lines = [json.loads(line) for line in (tmp_path / str(number) / "metrics.jsonl").open()]
        names = ("step", "loss", "next", "visible", "grad_norm")
        logs.append([[line[n] for n in names] for line in lines if "loss" in line])
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
def test_a_run_on_three_teachers(store, tmp_path, separate):
    """Its losses fall; it resumes exactly; its encoder is exported, not its decoders."""
    settings = dict(
        teachers=BOTH, model=TINY | {"separate_decoders": separate}, total="12 steps",
        checkpoint={"every": "4 steps"}, evals={"heldout": str(store), "heldout_split": "view001",
                                                "every": "6 steps", "figures": 2},
    )  # fmt: skip
    whole = tmp_path / "whole"
    assert train.train(config(store, **settings), whole) == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    steps = [row for row in rows if "loss" in row]
    for name in ("next", "visible_second", "next_third"):
        assert steps[-1][name] < steps[0][name]
    assert any("heldout/visible_third" in row for row in rows)
    for step in ("8", "12"):
        shutil.rmtree(whole / "checkpoints" / step)
    assert train.train(config(store, **settings), whole) == 0
    again = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    numbers = ("step", "loss", "next", "visible_second", "next_third", "grad_norm")
    first, second = (
        [[row[n] for n in numbers] for row in part if "loss" in row and row["step"] > 4]
        for part in (rows, again[len(rows) :])
    )
    assert first == second and len(first) == 8
    encoder = api.load_encoder(whole)
    assert encoder.features(np.zeros((1, 16, 16, 3), np.uint8), "mean").shape == (1, TINY["width"])
    with pytest.raises(UserError, match=r"further teachers \(second, third\).*encoder"):
        api.load_digpt(whole)
    with pytest.raises(UserError, match="has other contents"):
        train.train(config(store, **settings | {"teachers": {"second": {}}}), whole)


def test_ids_are_compared_on_reading(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "store")
    directory = copy / "teachers/second"
    split = tfds_dataset.Split(directory, "view000")
    examples = list(split)
    examples[3]["id"], examples[4]["id"] = examples[4]["id"], examples[3]["id"]
    info = further_teachers.load(copy, "second")
    serialize = tfds_dataset.serializer(further_teachers.features(info))
    path = tfds_dataset.shard_path(directory, "view000", 0, 2, "second")
    receipt = array_record_shards.write(path, map(serialize, examples[:16]))
    infos = array_record_shards.shard_infos(directory)
    array_record_shards.write_manifest(directory, infos | {path.name: receipt})
    task = pretrain.open_pretrain(config(copy, teachers={"second": {}}))
    task.examples(0, 2)
    with pytest.raises(UserError, match="in the store it is .*--teacher=second"):
        task.examples(0, 3)


REFUSED = [
    ({"teachers": {"fourth": {}}}, r"no tokens of a teacher fourth .*second, third"),
    ({"teachers": {"teacher": {}}}, "that is the name of config.teacher"),
    ({"teachers": {"second": {"width": 13}}}, "width 12, .* 13 .config.teachers.second.width"),
    ({"teachers": {"third": {"grid": 7}}}, "grid 4, .* 7 .config.teachers.third.grid"),
    ({"teachers": {"second": {"loss_weight": -1}}}, "loss_weight must be at least 0"),
    ({"teacher": {"loss_weight": 0}}, "all teachers have loss_weight 0"),
    ({"teacher": {"loss_weight": 0}, "teachers": {"second": {"loss_weight": 0}}}, "all teachers"),
    ({"model": TINY | {"separate_decoders": True}}, "separate_decoders needs config.teachers"),
]


@pytest.mark.parametrize("changes,message", REFUSED)
def test_what_does_not_fit_is_refused(store, changes, message):
    with pytest.raises(UserError, match=message):
        pretrain.open_pretrain(config(store, **changes))


@pytest.mark.parametrize("separate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flops_are_counted(separate):
    """By the compiler, of the forward pass of two teachers."""
    model = parse(
        type(config("x").model),
        TINY | {"width": 64, "heads": 1, "decoder_width": 64, "separate_decoders": separate},
    )
    module = digpt.build(model, out_width=96, further={"second": 160})
    inputs = digpt.dummy_inputs(model)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    one = digpt.build(dataclasses.replace(model, separate_decoders=False), out_width=96)
    single = jax.eval_shape(one.init, jax.random.key(0), *inputs)

    def compiled(module, params):
        cost = jax.jit(module.apply).lower(params, *inputs).compile().cost_analysis()
        return cost["flops"]

    counted = [
        sum(flops.forward_flops(m, out_width=96, further=further).values())
        for m, further in (
            (model, (160,)),
            (dataclasses.replace(model, separate_decoders=False), ()),
        )
    ]
    ratio = compiled(module, params) / compiled(one, single)
    assert counted[0] / counted[1] == pytest.approx(ratio, rel=0.1)


def test_a_plan_counts_the_tokens_of_all_teachers(store, tmp_path):
    """Without a store, of the widths that the config states."""
    teachers = {"second": {"width": 12, "grid": 2}}
    changes = {"teacher": {"width": 24, "grid": 4}, "data": {"path": str(tmp_path / "absent")}}
    alone = pretrain.task_without_data(config(store, **changes))
    both = pretrain.task_without_data(config(store, **changes, teachers=teachers))
    assert both.abstract_example()["tokens_second"].shape == (5, 12)
    assert both.model_flops() > alone.model_flops()
    with pytest.raises(UserError, match=r"set config.teachers.second.width and .*second.grid"):
        pretrain.task_without_data(config(store, **changes, teachers={"second": {}}))
    assert plan.steps_of(config(store)) == 4
