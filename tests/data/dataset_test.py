"""Datasets of a config, and configs that do not match the data."""

import numpy as np
import pytest

from dgpt_jax.config import DataConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset
from dgpt_jax.errors import UserError
from tests.support import stores
from tests.support.data import image_dataset, tiny_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """An image dataset and a token store of two views."""
    directory = tmp_path_factory.mktemp("pipeline")
    stores.write(directory / "tokens", [3, 2], views=2)
    return {"images": image_dataset(directory, per_class=3), "tokens": directory / "tokens"}


def opened(path, **data):
    return dataset.open_examples(
        parse(DataConfig, {"path": str(path)} | data), tiny_model(), seed=0
    )


@pytest.mark.parametrize(
    "kind, data, message",
    [
        ("images", {"targets": "stored"}, "config.data.targets=stored"),
        ("tokens", {"targets": "online"}, "config.data.targets=online"),
        ("tokens", {"views": 3}, "config.data.views=3: .* 2 views"),
        ("tokens", {"views": 0}, "views.* 0"),
        ("tokens", {"examples": 6}, r"has 5 examples.* 6 .config.data.examples"),
    ],
)
def test_configs_that_do_not_match_the_data(paths, kind, data, message):
    with pytest.raises(UserError, match=message):
        opened(paths[kind], **data)


def test_epochs_cycle_through_views(paths):
    examples = opened(paths["tokens"])
    tokens = [examples(0, 0, epoch)["tokens"] for epoch in range(3)]
    assert not np.array_equal(tokens[0], tokens[1])
    np.testing.assert_array_equal(tokens[0], tokens[2])
    first = opened(paths["tokens"], views=1)
    np.testing.assert_array_equal(first(0, 0, 1)["tokens"], tokens[0])
