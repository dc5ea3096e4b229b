"""Which examples a config names, and what it is refused for."""

import numpy as np
import pytest

from dgpt_jax import pipeline
from dgpt_jax.config import Data
from dgpt_jax.schema import UserError, parse
from tests import stores
from tests.data import image_dataset, tiny_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """An image dataset and a token store of two views."""
    directory = tmp_path_factory.mktemp("pipeline")
    stores.write(directory / "tokens", [3, 2], views=2)
    return {"images": image_dataset(directory, per_class=3), "tokens": directory / "tokens"}


def opened(path, **data):
    return pipeline.open_examples(parse(Data, {"path": str(path)} | data), tiny_model(), seed=0)


@pytest.mark.parametrize(
    "which, data, message",
    [
        ("images", {"targets": "stored"}, "needs a token store, and"),
        ("tokens", {"targets": "online"}, "needs an image dataset, and"),
        ("tokens", {"views": 3}, "views 3: .* holds 2 views"),
        ("tokens", {"views": 0}, "views must be at least 1, got 0"),
        ("tokens", {"examples": 6}, "has 5 examples, the config expects 6"),
    ],
)
def test_what_does_not_fit_is_refused(paths, which, data, message):
    with pytest.raises(UserError, match=message):
        opened(paths[which], **data)


def test_an_epoch_has_a_view_and_views_come_again(paths):
    examples = opened(paths["tokens"])
    of_epoch = [examples(0, 0, epoch)["tokens"] for epoch in range(3)]
    assert not np.array_equal(of_epoch[0], of_epoch[1])
    np.testing.assert_array_equal(of_epoch[0], of_epoch[2])
    first = opened(paths["tokens"], views=1)
    np.testing.assert_array_equal(first(0, 0, 1)["tokens"], of_epoch[0])
