"""The pretraining task on token stores, and stores that it refuses."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dgpt_jax.config import TrainConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError
from dgpt_jax.training.tasks.pretrain import open_pretrain
from tests.support import data


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(image dataset, teacher)."""
    root = tmp_path_factory.mktemp("pretrain")
    return data.image_dataset(root, per_class=6), data.random_teacher(root / "teacher")


def settings(store, **changes) -> TrainConfig:
    return parse(TrainConfig, {
        "batch_size": 4, "dtype": "float32", "model": data.TINY, "data": {"path": str(store)},
    } | changes)  # fmt: skip


@pytest.mark.parametrize("kind", [{"codec": "int4"}, {"codec": "int8", "pca": 8}, {}])
def test_losses_equal_those_of_decoded_tokens(inputs, tmp_path, kind):
    store = data.token_store(tmp_path, *inputs, **kind)
    task = open_pretrain(settings(store))
    rows = [task.examples(i, i) for i in range(4)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    for name, shape in task.abstract_example().items():
        assert (batch[name].shape[1:], batch[name].dtype) == (shape.shape, shape.dtype)
    params = task.init(jax.random.key(0))
    loss, losses = jax.jit(task.loss)(params, {}, batch)
    decoded = batch | {"tokens": np.asarray(task.target.codec.decode(batch["tokens"]))}
    task.targets = {"": replace(task.target, codec=Codec("float16", np.zeros(0)))}
    assert decoded["tokens"].shape == (4, 17, kind.get("pca", 24))
    expected, _ = jax.jit(task.loss)(params, {}, decoded)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(losses) == {"next", "visible"} and float(loss) > 0.5


def test_a_heldout_store_with_another_codec_is_refused(inputs, tmp_path):
    dataset, teacher = inputs
    store = data.token_store(tmp_path / "train", dataset, teacher)
    for name, changes in {"same": {"codec_from": str(store)}, "other": {}}.items():
        data.token_store(tmp_path / name, dataset, teacher, split="train[6:]", **changes)

    def heldout(name):
        return settings(store, evals={"heldout": str(tmp_path / name / "tokens")})

    _, length = open_pretrain(heldout("same")).heldout()
    assert length == 6
    with pytest.raises(UserError, match=f"config.evals.heldout.*--config.codec_from={store}"):
        open_pretrain(heldout("other")).heldout()
    with pytest.raises(UserError, match="config.codec_from=.*'int8', None, 24"):
        data.token_store(tmp_path / "int4", dataset, teacher, codec="int4", codec_from=str(store))


def test_stores_that_do_not_match_the_config_are_refused(inputs, tmp_path):
    store = data.token_store(tmp_path, *inputs)
    for changes, message in (
        ({"teacher": {"width": 32}}, "width 24.* 32.*config.teacher.width"),
        ({"teacher": {"grid": 16}}, "grid 4.* 16.*config.teacher.grid"),
        (
            {"data": {"source": "imagenet2012"}},
            "images:1.0.0.* imagenet2012.*config.data.source",
        ),
        ({"data": {"source": "images:2.0.0"}}, "images:1.0.0.*images:2.0.0"),
        ({"data": {"examples": 13}}, "12.* 13"),
    ):
        changes["data"] = {"path": str(store)} | changes.get("data", {})
        with pytest.raises(UserError, match=message):
            open_pretrain(settings(store, **changes))
    fitting = {"path": str(store), "source": "images:1.0.0", "examples": 12}
    open_pretrain(settings(store, data=fitting))
