"""Targets that are centered or whitened by the statistics of a store's tokens."""

import jax
import numpy as np
import pytest

from dgpt_jax.config import TrainConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_statistics, token_store
from dgpt_jax.errors import UserError
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.training.tasks import pretrain
from tests.support import data
from tests.support.data import TINY


@pytest.fixture(scope="module")
def tokens():
    """Tokens (500, 6) of very different channels, correlated, one of them constant."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((500, 6)) * [20, 1, 1, 0.5, 3, 0] + [5, 0, -3, 0, 1, 2]
    values[:, 1] += 0.8 * values[:, 2]
    return values.astype(np.float32)


def test_centered_and_whitened_tokens(tokens):
    measured = token_statistics.measure(tokens)
    normalize = {kind: np.asarray(measured.normalize(tokens, kind)) for kind in
                 ("none", "center", "whiten", "pca_whiten")}  # fmt: skip
    np.testing.assert_array_equal(normalize["none"], tokens)
    for kind in ("center", "whiten", "pca_whiten"):
        np.testing.assert_allclose(normalize[kind].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(normalize["whiten"].var(axis=0)[:5], 1, rtol=1e-3)
    assert not normalize["whiten"][:, 5].any()  # the constant channel
    covariance = np.cov(normalize["pca_whiten"], rowvar=False, bias=True)
    np.testing.assert_allclose(covariance[:5, :5], np.eye(5), atol=2e-3)
    rotated = token_statistics.measure(tokens[:, ::-1])
    np.testing.assert_allclose(rotated.axis_variance, measured.axis_variance, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("statistics")
    dataset = data.image_dataset(root, per_class=10)
    data.random_teacher(root / "teacher")
    return data.token_store(root, dataset, root / "teacher", views=2), dataset, root / "teacher"


def task(path, **teacher):
    values = dict(
        total="2 steps", batch_size=8, dtype="float32", model=TINY, data={"path": str(path)},
        teacher=teacher, optim={"warmup": "1 steps"},
    )  # fmt: skip
    return pretrain.open_pretrain(parse(TrainConfig, values))


def test_a_build_measures_what_training_decodes(store):
    path, _, _ = store
    info = token_store.StoreInfo.load(path).teacher
    stored = np.stack([example["tokens"] for example in tfds_dataset.Split(path, "view000")])
    decoded = np.asarray(info.load_codec(path).decode(stored))
    expected = token_statistics.measure(decoded)
    measured = token_statistics.load(path, info.width, "")
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(measured, name), value, rtol=1e-5, atol=1e-6)
    for kind in ("center", "whiten", "pca_whiten"):
        opened = task(path, normalize=kind)
        targets = opened.tokens({}, {"tokens": jax.numpy.asarray(stored)}, "")
        np.testing.assert_allclose(targets, measured.normalize(decoded, kind), rtol=1e-5, atol=1e-5)
        assert abs(np.asarray(targets).mean(axis=(0, 1))).max() < 1e-4


def test_a_store_without_statistics(store, tmp_path):
    """Of an earlier version: refused with the command that measures them; a rerun does."""
    _, dataset, teacher = store
    path = data.token_store(tmp_path, dataset, teacher, views=2)
    (path / token_statistics.FILE).rename(tmp_path / "before")
    task(path)  # not needed
    with pytest.raises(UserError, match="lacks statistics.npz.*measures them: "):
        task(path, normalize="center")
    data.token_store(tmp_path, dataset, teacher, views=2)
    assert (path / token_statistics.FILE).read_bytes() == (tmp_path / "before").read_bytes()
    for content in (b"", b"PK", (tmp_path / "before").read_bytes()[:500]):
        (path / token_statistics.FILE).write_bytes(content)
        with pytest.raises(UserError, match="statistics.npz is damaged"):
            task(path, normalize="center")


def test_what_cannot_be_normalized_is_refused(store):
    path, dataset, _ = store
    with pytest.raises(UserError, match="normalize must be one of none, center"):
        task(path, normalize="zscore")
    values = dict(data={"path": str(dataset), "targets": "online"}, model=TINY,
                  teacher={"weights": "x", "normalize": "center"})  # fmt: skip
    with pytest.raises(UserError, match="normalize=center needs config.data.targets=stored"):
        parse(TrainConfig, values)
