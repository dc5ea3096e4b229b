"""What the pretraining task makes of a token store, and which stores it refuses."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from dgpt_jax.config import Train
from dgpt_jax.schema import UserError, parse
from dgpt_jax.tasks.pretrain import open_pretrain
from dgpt_jax.token_codec import Codec
from tests import data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(image dataset, teacher)."""
    root = tmp_path_factory.mktemp("pretrain")
    return data.image_dataset(root, per_class=6), data.random_teacher(root / "teacher")


def settings(store, **changes) -> Train:
    return parse(Train, {
        "batch_size": 4, "dtype": "float32", "model": data.TINY, "data": {"path": str(store)},
    } | changes)  # fmt: skip


@pytest.mark.parametrize("kind", [{"codec": "int4"}, {"codec": "int8", "pca": 8}, {}])
def test_losses_are_those_of_the_decoded_tokens(made, tmp_path, kind):
    store = data.token_store(tmp_path, *made, **kind)
    task = open_pretrain(settings(store))
    rows = [task.examples(i, i) for i in range(4)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    for name, shape in task.abstract_example().items():
        assert (batch[name].shape[1:], batch[name].dtype) == (shape.shape, shape.dtype)
    params = task.init(jax.random.key(0))
    loss, parts = jax.jit(task.loss)(params, {}, batch)
    plain = batch | {"tokens": np.asarray(task.target.codec.decode(batch["tokens"]))}
    task.target = replace(task.target, codec=Codec("float16", np.zeros(0)))
    assert plain["tokens"].shape == (4, 17, kind.get("pca", 24))
    expected, _ = jax.jit(task.loss)(params, {}, plain)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(parts) == {"next", "visible"} and float(loss) > 0.5


def test_held_out_stores_have_the_codec_of_the_trained(made, tmp_path):
    """Integers of one store mean something else under the scale of another."""
    dataset, teacher = made
    store = data.token_store(tmp_path / "train", dataset, teacher)
    for name, changes in {"same": {"like": str(store)}, "other": {}}.items():
        data.token_store(tmp_path / name, dataset, teacher, split="train[6:]", **changes)

    def heldout(name):
        return settings(store, evals={"heldout": str(tmp_path / name / "tokens")})

    _, length = open_pretrain(heldout("same")).heldout()
    assert length == 6
    with pytest.raises(UserError, match=f"another codec, scale or basis.*--config.like={store}"):
        open_pretrain(heldout("other")).heldout()
    with pytest.raises(UserError, match=r"codec, pca = \('int8', None\) of 24 channels"):
        data.token_store(tmp_path / "int4", dataset, teacher, codec="int4", like=str(store))


def test_stores_that_do_not_fit_the_config(made, tmp_path):
    store = data.token_store(tmp_path, *made)
    for changes, message in (
        ({"teacher": {"width": 32}}, "of width 24, the config expects 32"),
        ({"teacher": {"grid": 16}}, "of grid 4, the config expects 16"),
        (
            {"data": {"source": "imagenet2012"}},
            "store of images:1.0.0, the config expects imagenet",
        ),
        ({"data": {"source": "images:2.0.0"}}, "images:1.0.0, the config expects images:2.0.0"),
        ({"data": {"examples": 13}}, "has 12 examples, the config expects 13"),
    ):
        changes["data"] = {"path": str(store)} | changes.get("data", {})
        with pytest.raises(UserError, match=message):
            open_pretrain(settings(store, **changes))
    fitting = {"path": str(store), "source": "images:1.0.0", "examples": 12}
    open_pretrain(settings(store, data=fitting))
