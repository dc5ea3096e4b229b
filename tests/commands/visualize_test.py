"""Figures of an encoder: each map against a direct computation."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import cli
from dgpt_jax.commands import visualize
from dgpt_jax.data import image_ops, segments
from dgpt_jax.errors import UserError
from dgpt_jax.evals import feature_maps
from dgpt_jax.evals import figures as drawing
from dgpt_jax.models import classifier, digpt, transformer
from dgpt_jax.storage import tfds_dataset
from dgpt_jax.weights import api
from tests.support.data import image_dataset, random_teacher, smooth_image, tiny_model, token_store


@pytest.fixture(scope="module")
def encoder():
    """Random weights in every array, norms and biases included."""
    model, rng = tiny_model(), np.random.default_rng(0)
    images = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(classifier.classifier(model, "cls").init, jax.random.key(0), images)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype), shapes["params"]
    )
    return api.PretrainedEncoder(model, params, "random")


def random_images(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([smooth_image(rng, 16, 16) for _ in range(count)])


def test_attention_gives_the_blocks_output(encoder):
    """The rest of the block applied to these probabilities equals the encoder's output."""
    shown = random_images(2)
    attention, v, x, last = jax.jit(partial(feature_maps.last_attention, encoder))(shown)
    block = jax.tree.map(lambda leaf: leaf[-1], encoder.params["encoder"]["blocks"])
    mixed = jnp.einsum("bhnm,bmhk->bnhk", attention, v).reshape(x.shape)
    proj = block["attn"]["proj"]
    x = x + mixed @ proj["kernel"] + proj["bias"]
    normed = transformer.LayerNorm(1e-6).apply({"params": block["norm2"]}, x)
    mlp = transformer.Mlp(4.0, "gelu", jnp.float32)
    output = x + mlp.apply({"params": block["mlp"]}, normed)
    np.testing.assert_allclose(output, last, rtol=0, atol=2e-4 * float(jnp.abs(last).max()))
    # `last`, normalized, is the features
    module = classifier.classifier(encoder.model, "cls")
    normed = module.apply({"params": encoder.params}, last, method=lambda m, x: m.norm(x))
    np.testing.assert_allclose(normed, encoder.tokens(shown), rtol=0, atol=1e-4)
    of_cls = feature_maps.cls_attention(encoder, shown)
    assert of_cls.shape == (2, 2, 17)
    np.testing.assert_allclose(of_cls.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(of_cls, attention[:, :, 0], atol=1e-5)
    assert of_cls.max() > 0.15  # not uniform 1/17


@pytest.mark.parametrize("sign", [-1, 1])
def test_foreground_is_the_object_in_the_center(monkeypatch, sign):
    components = feature_maps._components  # a solver may return either sign
    monkeypatch.setattr(feature_maps, "_components", lambda *args: sign * components(*args))
    rng = np.random.default_rng(0)
    thing = np.zeros((2, 6, 6), bool)
    thing[0, 2:5, 1:4] = thing[1, 1:5, 2:4] = True
    thing[1, 0, 2] = True  # may touch a border
    tokens = rng.standard_normal((2, 36, 8)) * 0.1
    tokens[thing.reshape(2, 36)] += 5 * rng.standard_normal(8)
    mask, colors = feature_maps.foreground(tokens)
    np.testing.assert_array_equal(mask, thing.reshape(2, 36))
    assert np.all(colors[~mask] == 1) and np.ptp(colors[mask], axis=0).min() > 0.9


def test_colors_are_joint_over_images():
    tokens = np.random.default_rng(0).standard_normal((2, 16, 8))
    tokens[1] = tokens[0]  # the same tokens in two images, the same colors
    tokens[1, 0] += 5
    colors = feature_maps.pca_colors(tokens)
    assert colors.shape == (2, 16, 3) and colors.min() == 0 and colors.max() == 1
    np.testing.assert_allclose(colors[0, 1:], colors[1, 1:], atol=1e-9)
    assert feature_maps.pca_colors(tokens[:, :, :2]).shape == (
        2,
        16,
        3,
    )  # fewer channels than colors


@pytest.mark.parametrize("shape", [(40, 6), (5, 30), (300, 24), (2, 2)])
def test_components_are_those_of_the_svd(shape):
    """Up to sign, also with fewer rows than channels."""
    rng = np.random.default_rng(0)
    flat = (5 + rng.standard_normal(shape) * rng.uniform(1, 9, shape[1])).astype(np.float32)
    components = feature_maps._components(flat, 3)
    centered = flat - flat.mean(axis=0, dtype=float)
    basis = np.linalg.svd(centered, full_matrices=False)[2][:3]
    expected = np.zeros((shape[0], 3))
    expected[:, : len(basis)] = centered @ basis.T
    signs = np.sign((components * expected).sum(axis=0) + 1e-30)
    np.testing.assert_allclose(components * signs, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("queries", [1, 3, 256])
def test_neighbors_by_cosine(monkeypatch, queries):
    monkeypatch.setattr(feature_maps, "QUERIES", queries)
    features = np.array([[1, 0], [0, 9], [2, 0.2], [-1, 0]], float)
    nearest, cosines = feature_maps.neighbors(features, 2)
    np.testing.assert_array_equal(nearest[:3], [[2, 1], [2, 0], [0, 1]])
    assert cosines[0] == pytest.approx([2 / np.hypot(2, 0.2), 0])
    some, their_cosines = feature_maps.neighbors(features, 2, [2, 1])
    np.testing.assert_array_equal(some, nearest[[2, 1]])
    np.testing.assert_allclose(their_cosines, cosines[[2, 1]])
    assert feature_maps.neighbors(features, 9)[0].shape == (
        4,
        3,
    )  # an image is not its own neighbor


class Predicted:
    """A module that returns its parameters as predictions."""

    def __init__(self, out_width: int = 5):
        self.out_width = out_width

    def apply(self, variables, images, orders):
        return variables["params"]


@pytest.mark.parametrize("teacher_side", [4, 8, 5])
def test_prediction_maps_match_the_loss(teacher_side):
    model, rng = tiny_model(), np.random.default_rng(0)
    names = ("next", "visible")
    predicted = {name: jnp.asarray(rng.standard_normal((4, 13, 5)), jnp.float32) for name in names}
    tokens = rng.standard_normal((4, 1 + teacher_side**2, 5)).astype(np.float32)
    orders = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 0, 3]], np.int32)
    fake = api.PretrainedDiGPT(model, predicted, Predicted())
    maps = feature_maps.prediction_maps(fake, random_images(4), tokens, orders, True)
    losses = digpt.token_losses(
        predicted, tokens[:, 1:], orders, grid=(4, 4), segment_grid=(2, 2), cls=False
    )
    grid = tokens[:, 1:].reshape(4, teacher_side, teacher_side, 5)
    for name, unseen in (("next", orders[:, 0]), ("visible", orders[:, -1])):
        similarity = maps[name]["similarity"]
        blank = np.isnan(segments.split(similarity[..., None], (2, 2))).all(axis=(2, 3))
        np.testing.assert_array_equal(blank, np.arange(4) == unseen[:, None])
        loss = 2 - 2 * np.nanmean(similarity, axis=(1, 2))
        np.testing.assert_allclose(loss, losses[name], rtol=1e-4)
        if teacher_side != 5:  # else the teacher's tokens are resized
            predicted_mask = ~np.isnan(similarity)
            np.testing.assert_array_equal(
                maps[name]["teacher"][predicted_mask], grid[predicted_mask]
            )
    guess = np.full((4, *maps["next"]["similarity"].shape[1:]), 0.25)
    captions = drawing.prediction_captions(maps, guess, orders, (2, 2))
    constant = " ".join(["0.25"] * 3)
    assert captions["mean token: cosine"][1] == f"next {constant}\nvisible {constant}"
    captions = captions["next: cosine"]
    half = 4 if teacher_side == 8 else 2
    top_left = maps["next"]["similarity"][0, :half, :half].mean()  # segment 0, rank 1
    assert captions[0].split()[0] == f"{top_left:.2f}" and len(captions[0].split()) == 3


def test_perfect_predictions_look_like_the_teacher(monkeypatch):
    """For vectors of any length, which the loss ignores."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((2, 17, 5)).astype(np.float32)
    orders = np.array([[2, 0, 3, 1], [0, 1, 2, 3]], np.int32)
    split = segments.split(tokens[:, 1:].reshape(2, 4, 4, 5), (2, 2))
    ordered = np.stack([split[i, order] for i, order in enumerate(orders)])
    cls = np.zeros((2, 1, 5))
    predicted = {
        name: 30 * jnp.concatenate([ordered[:, ranks].reshape(2, 12, 5), cls], axis=1)
        for name, ranks in (("next", slice(1, None)), ("visible", slice(0, 3)))
    }
    args = SimpleNamespace(checkpoint="run", store="store", heads=None, decoder_heads=None)
    fake = api.PretrainedDiGPT(tiny_model(), predicted, Predicted())
    monkeypatch.setattr(api, "load_digpt", lambda path, **_: fake)
    monkeypatch.setattr(
        visualize, "store_examples", lambda *_: (random_images(2), tokens, orders, True)
    )
    rows, captions = visualize.show_predictions(args)
    for name in ("next", "visible"):
        mask = np.any(rows[f"{name}: predicted"] != 0.87, axis=-1)
        assert mask.sum() == 2 * 12
        predicted = rows[f"{name}: predicted"][mask]
        np.testing.assert_allclose(predicted, rows["teacher"][mask], atol=1e-4)
        assert captions[f"{name}: cosine"] == ["1.00 1.00 1.00"] * 2
    fake.module.out_width = 7
    with pytest.raises(UserError, match="store .* 5 .*run .* 7"):
        visualize.show_predictions(args)


def test_the_order_is_drawn_on_the_image():
    grey = np.full((16, 16, 3), 100, np.uint8)
    drawn = drawing.draw_order(grey, np.array([3, 1, 0, 2]), (2, 2))
    assert drawn.shape == (192, 192, 3)
    corner = [tuple(drawn[y + 90, x + 90]) for y in (0, 96) for x in (0, 96)]
    assert corner == [(100,) * 3, (100,) * 3, (204,) * 3, (100,) * 3]  # segment 2 is the last


def test_heat():
    """Gray for NaN; dark to bright between the bounds."""
    values = np.array([[[np.nan, 0.0], [0.5, 1.0]], [[0.0, 0.25], [0.5, np.nan]]])
    drawn = drawing.heat(values, 0.0, 1.0)
    assert drawn.dtype == np.uint8 and drawn.shape == (2, 2, 2, 3)
    assert np.all(drawn[0, 0, 0] == 222) and np.all(drawn[1, 1, 1] == 222)
    np.testing.assert_allclose(drawn[0, 0, 1], (68, 1, 84), atol=2)  # viridis, not its mirror image
    np.testing.assert_allclose(drawn[0, 1, 1], (253, 231, 37), atol=2)
    own = drawing.heat(values)  # each scaled to its own maximum
    np.testing.assert_array_equal(own[1, 1, 0], own[0, 1, 1])


@pytest.fixture
def drawn(monkeypatch, encoder) -> list[dict]:
    """Arguments of visualize.grid: {title: images}, {title: captions}."""
    calls = []
    monkeypatch.setattr(api, "load_encoder", lambda path, heads=None: encoder)
    monkeypatch.setattr(visualize, "grid", lambda rows, _, captions: calls.append((rows, captions)))
    return calls


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    visualize.main()


@pytest.mark.parametrize("show", visualize.RENDERERS)
def test_pictures_of_an_encoder(monkeypatch, tmp_path, drawn, show):
    for i, picture in enumerate(random_images(3)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    run(monkeypatch, "run", f"--show={show}", tmp_path, f"--out={tmp_path / 'x.png'}")
    ((rows, captions),) = drawn
    assert captions.keys() <= rows.keys() and len(rows) >= 3
    for title, images in rows.items():
        images = np.asarray(images)
        assert images.ndim == 4 and images.shape[0] == images.shape[3] == 3, title
        assert len(captions.get(title, images)) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """600 images, 60 per class, in a directory that also holds other files; red and green of an
    image encode its index in sorted order."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(600):
        path = root / f"class{i // 60}" / f"{i:03d}.{'png' if i % 2 else 'BMP'}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i // 256, i % 256, 100)).save(path)
        if i % 100 == 0:
            path.with_name(f"._{path.name}").write_bytes(b"no image")
            path.with_suffix(".txt").write_text("no image")
    return root


@pytest.mark.parametrize("show", visualize.RENDERERS)
@pytest.mark.parametrize("count", [None, 1, 40])
def test_a_folder_is_sampled_evenly(monkeypatch, tmp_path, encoder, folder, show, count):
    """Reads only the sample, the same every time; the figure stays small."""
    monkeypatch.setattr(api, "load_encoder", lambda path, heads=None: encoder)
    read, decode = [], visualize.image_ops.decode_image

    def counted(data):
        picture = decode(data)
        read.append(256 * int(picture[0, 0, 0]) + int(picture[0, 0, 1]))
        return picture

    monkeypatch.setattr(visualize.image_ops, "decode_image", counted)
    out, words = tmp_path / "out.png", [] if count is None else [f"--count={count}"]
    words += ["--gallery=50", "--neighbors=2"] if show == "neighbors" else []
    run(monkeypatch, "run", folder, f"--show={show}", f"--out={out}", *words)
    if show == "neighbors":  # the gallery, then each image again with its neighbours
        assert read[:50] == list(range(0, 600, 12))
        read = read[50::3]
        expected = [12 * (i * 50 // (count or 12)) for i in range(count or 12)]
    else:
        expected = [i * 600 // (count or 12) for i in range(count or 12)]
    assert read == expected
    with Image.open(out) as image:
        width, height = image.size
    assert width < 2500 and height < 16000


def test_the_largest_figure(tmp_path):
    rows = {f"row {i}": np.full((visualize.MAX_IMAGES, 2, 2, 3), i / 2) for i in range(3)}
    visualize.grid(
        rows, tmp_path / "out.png", {"row 1": list(map(str, range(visualize.MAX_IMAGES)))}
    )
    with Image.open(tmp_path / "out.png") as image:
        assert image.width < 2500 and image.height < 5000


def test_neighbours_come_from_the_gallery(monkeypatch, tmp_path, drawn, folder):
    words = "--show=neighbours", "--gallery=300", "--count=3", "--neighbours=5"
    run(monkeypatch, "run", folder, f"--out={tmp_path / 'x.png'}", *words)
    ((rows, captions),) = drawn
    assert [len(images) for images in rows.values()] == [6, 6, 6]
    for texts in captions.values():
        cosines = [float(text.split()[-1]) for text in texts[1:]]
        assert cosines == sorted(cosines, reverse=True)
        assert all(len(line) <= 18 for text in texts for line in text.split("\n"))


def test_predictions_sample_the_store_evenly(tmp_path):
    dataset = image_dataset(tmp_path, per_class=12)
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "teacher"))
    args = SimpleNamespace(store=store, view=0, count=4, seed=0)
    shown, tokens, _, cls = visualize.store_examples(args, tiny_model())
    split = tfds_dataset.Split(store, "view000")
    assert len(split) == 24 and (len(tokens), cls) == (4, True)
    for index, picture in zip((0, 6, 12, 18), shown, strict=True):
        np.testing.assert_array_equal(picture, image_ops.decode_image(split[index]["image"]))


def refused(monkeypatch, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(visualize.main)
    return ended.value.code


def test_refused_arguments(monkeypatch, tmp_path, encoder):
    monkeypatch.setattr(api, "load_encoder", lambda path, heads=None: encoder)
    Image.fromarray(random_images(1)[0]).save(tmp_path / "a.png")
    out = f"--out={tmp_path / 'out.png'}"
    (tmp_path / "empty").mkdir()
    for words, fragment in (
        (["run", tmp_path / "empty"], f"{tmp_path / 'empty'} holds no images"),
        (["run", tmp_path / "b.png"], f"no such file or directory: {tmp_path / 'b.png'}"),
        (["run"], "--show=tokens"),
        (["run", "--show=predictions", tmp_path], "--store=TOKENS"),
        (["run", "--show=neighbors", tmp_path / "a.png"], "--show=neighbors"),
        (["run", "--count=0", tmp_path], "argument --count: 0 "),
        (["run", "--count=65", tmp_path], "--count=65: "),
        (["run", "--neighbors=12", tmp_path], "--neighbors=12: "),
        (["run", "--gallery=1", tmp_path], "--gallery=1: "),
    ):
        message = refused(monkeypatch, *words, out)
        assert message.startswith("error: ") and fragment in message, message
    assert not (tmp_path / "out.png").exists()
