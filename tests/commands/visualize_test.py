"""Pictures of what a model sees: each map against what it says it shows."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import visualize
from PIL import Image

from dgpt_jax import cli, digpt, heads, load, maps, records, segments, transformer, views
from dgpt_jax import pictures as drawing
from dgpt_jax.schema import UserError
from tests.data import image_dataset, random_teacher, smooth_image, tiny_model, token_store


@pytest.fixture(scope="module")
def encoder():
    """Random weights whose every array matters: norms and biases are not what they start as."""
    model, rng = tiny_model(), np.random.default_rng(0)
    images = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(heads.classifier(model, "cls").init, jax.random.key(0), images)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), x.dtype), shapes["params"]
    )
    return load.Encoder(model, params, "random")


def pictures(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([smooth_image(rng, 16, 16) for _ in range(count)])


def test_attention_makes_the_blocks_output(encoder):
    """The rest of the block on top of these probabilities gives what the encoder gives."""
    shown = pictures(2)
    attention, v, x, last = jax.jit(partial(maps.last_attention, encoder))(shown)
    block = jax.tree.map(lambda leaf: leaf[-1], encoder.params["encoder"]["blocks"])
    mixed = jnp.einsum("bhnm,bmhk->bnhk", attention, v).reshape(x.shape)
    proj = block["attn"]["proj"]
    x = x + mixed @ proj["kernel"] + proj["bias"]
    normed = transformer.LayerNorm(1e-6).apply({"params": block["norm2"]}, x)
    mlp = transformer.Mlp(4.0, "gelu", jnp.float32)
    output = x + mlp.apply({"params": block["mlp"]}, normed)
    np.testing.assert_allclose(output, last, rtol=0, atol=2e-4 * float(jnp.abs(last).max()))
    # and `last` is what features are made of
    module = heads.classifier(encoder.model, "cls")
    normed = module.apply({"params": encoder.params}, last, method=lambda m, x: m.norm(x))
    np.testing.assert_allclose(normed, encoder.tokens(shown), rtol=0, atol=1e-4)
    of_cls = maps.cls_attention(encoder, shown)
    assert of_cls.shape == (2, 2, 17)
    np.testing.assert_allclose(of_cls.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(of_cls, attention[:, :, 0], atol=1e-5)
    assert of_cls.max() > 0.15  # not the uniform 1/17, which any mistake would give too


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_foreground_is_the_thing_in_the_middle(monkeypatch, sign):
    components = maps._components  # of which a solver may give either sign
    monkeypatch.setattr(maps, "_components", lambda *args: sign * components(*args))
    rng = np.random.default_rng(0)
    thing = np.zeros((2, 6, 6), bool)
    thing[0, 2:5, 1:4] = thing[1, 1:5, 2:4] = True
    thing[1, 0, 2] = True  # it may touch a border
    tokens = rng.standard_normal((2, 36, 8)) * 0.1
    tokens[thing.reshape(2, 36)] += 5 * rng.standard_normal(8)
    mask, colours = maps.foreground(tokens)
    np.testing.assert_array_equal(mask, thing.reshape(2, 36))
    assert np.all(colours[~mask] == 1) and np.ptp(colours[mask], axis=0).min() > 0.9


def test_colours_are_joint_over_images():
    tokens = np.random.default_rng(0).standard_normal((2, 16, 8))
    tokens[1] = tokens[0]  # the same tokens in two images, the same colours
    tokens[1, 0] += 5
    colours = maps.pca_colours(tokens)
    assert colours.shape == (2, 16, 3) and colours.min() == 0 and colours.max() == 1
    np.testing.assert_allclose(colours[0, 1:], colours[1, 1:], atol=1e-9)
    assert maps.pca_colours(tokens[:, :, :2]).shape == (2, 16, 3)  # fewer channels than colours


@pytest.mark.parametrize("shape", [(40, 6), (5, 30), (300, 24), (2, 2)])
def test_components_are_those_of_the_svd(shape):
    """Up to their signs, also where there are fewer rows than channels."""
    rng = np.random.default_rng(0)
    flat = (5 + rng.standard_normal(shape) * rng.uniform(1, 9, shape[1])).astype(np.float32)
    components = maps._components(flat, 3)
    centred = flat - flat.mean(axis=0, dtype=float)
    basis = np.linalg.svd(centred, full_matrices=False)[2][:3]
    expected = np.zeros((shape[0], 3))
    expected[:, : len(basis)] = centred @ basis.T
    signs = np.sign((components * expected).sum(axis=0) + 1e-30)
    np.testing.assert_allclose(components * signs, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("queries", [1, 3, 256])
def test_neighbours_are_the_others_by_cosine(monkeypatch, queries):
    monkeypatch.setattr(maps, "QUERIES", queries)
    features = np.array([[1, 0], [0, 9], [2, 0.2], [-1, 0]], float)
    nearest, cosines = maps.neighbours(features, 2)
    np.testing.assert_array_equal(nearest[:3], [[2, 1], [2, 0], [0, 1]])
    assert cosines[0] == pytest.approx([2 / np.hypot(2, 0.2), 0])
    some, their_cosines = maps.neighbours(features, 2, of=[2, 1])
    np.testing.assert_array_equal(some, nearest[[2, 1]])
    np.testing.assert_allclose(their_cosines, cosines[[2, 1]])
    assert maps.neighbours(features, 9)[0].shape == (4, 3)  # no image is its own neighbour


class Predicted:
    """A module whose parameters are what it predicts of a batch."""

    def __init__(self, out_width: int = 5):
        self.out_width = out_width

    def apply(self, variables, images, orders):
        return variables["params"]


@pytest.mark.parametrize("teacher_side", [4, 8, 5])
def test_prediction_maps_are_the_losses_pairs_in_their_places(teacher_side):
    model, rng = tiny_model(), np.random.default_rng(0)
    names = ("next", "visible")
    predicted = {name: jnp.asarray(rng.standard_normal((4, 13, 5)), jnp.float32) for name in names}
    tokens = rng.standard_normal((4, 1 + teacher_side**2, 5)).astype(np.float32)
    orders = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 1, 0, 2], [1, 2, 0, 3]], np.int32)
    fake = load.Pretrained(model, predicted, Predicted())
    found = maps.prediction_maps(fake, pictures(4), tokens, orders, True)
    parts = digpt.token_losses(
        predicted, tokens[:, 1:], orders, grid=(4, 4), segment_grid=(2, 2), cls=False
    )
    grid = tokens[:, 1:].reshape(4, teacher_side, teacher_side, 5)
    for name, unseen in (("next", orders[:, 0]), ("visible", orders[:, -1])):
        similarity = found[name]["similarity"]
        blank = np.isnan(segments.split(similarity[..., None], (2, 2))).all(axis=(2, 3))
        np.testing.assert_array_equal(blank, np.arange(4) == unseen[:, None])
        loss = 2 - 2 * np.nanmean(similarity, axis=(1, 2))
        np.testing.assert_allclose(loss, parts[name], rtol=1e-4)
        if teacher_side != 5:  # else the teacher's tokens are resized
            there = ~np.isnan(similarity)
            np.testing.assert_array_equal(found[name]["teacher"][there], grid[there])
    guess = np.full((4, *found["next"]["similarity"].shape[1:]), 0.25)
    captions = drawing.prediction_captions(found, guess, orders, (2, 2))
    constant = " ".join(["0.25"] * 3)
    assert captions["mean token: cosine"][1] == f"next {constant}\nvisible {constant}"
    captions = captions["next: cosine"]
    half = 4 if teacher_side == 8 else 2
    top_left = found["next"]["similarity"][0, :half, :half].mean()  # segment 0, at place 1
    assert captions[0].split()[0] == f"{top_left:.2f}" and len(captions[0].split()) == 3


def test_perfect_predictions_look_like_the_teacher(monkeypatch):
    """Whatever their length, which the loss does not see."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((2, 17, 5)).astype(np.float32)
    orders = np.array([[2, 0, 3, 1], [0, 1, 2, 3]], np.int32)
    split = segments.split(tokens[:, 1:].reshape(2, 4, 4, 5), (2, 2))
    placed = np.stack([split[i, order] for i, order in enumerate(orders)])
    cls = np.zeros((2, 1, 5))
    predicted = {
        name: 30 * jnp.concatenate([placed[:, places].reshape(2, 12, 5), cls], axis=1)
        for name, places in (("next", slice(1, None)), ("visible", slice(0, 3)))
    }
    fake = load.Pretrained(tiny_model(), predicted, Predicted())
    monkeypatch.setattr(load, "load_digpt", lambda path: fake)
    monkeypatch.setattr(visualize, "stored", lambda *_: (pictures(2), tokens, orders, True))
    rows, captions = visualize.show_predictions(SimpleNamespace(checkpoint="run", store="store"))
    for name in ("next", "visible"):
        there = np.any(rows[f"{name}: predicted"] != 0.87, axis=-1)
        assert there.sum() == 2 * 12
        drawn = rows[f"{name}: predicted"][there]
        np.testing.assert_allclose(drawn, rows["teacher"][there], atol=1e-4)
        assert captions[f"{name}: cosine"] == ["1.00 1.00 1.00"] * 2
    fake.module.out_width = 7
    with pytest.raises(UserError, match="store holds tokens of 5 channels, run predicts 7"):
        visualize.show_predictions(SimpleNamespace(checkpoint="run", store="store"))


def test_the_order_is_drawn_on_the_picture():
    grey = np.full((16, 16, 3), 100, np.uint8)
    drawn = drawing.ordered(grey, np.array([3, 1, 0, 2]), (2, 2))
    assert drawn.shape == (192, 192, 3)
    corner = [tuple(drawn[y + 90, x + 90]) for y in (0, 96) for x in (0, 96)]
    assert corner == [(100,) * 3, (100,) * 3, (204,) * 3, (100,) * 3]  # segment 2 is the last


def test_heat():
    """Grey where nothing is known; dark to bright between the bounds."""
    values = np.array([[[np.nan, 0.0], [0.5, 1.0]], [[0.0, 0.25], [0.5, np.nan]]])
    drawn = drawing.heat(values, 0.0, 1.0)
    assert drawn.dtype == np.uint8 and drawn.shape == (2, 2, 2, 3)
    assert np.all(drawn[0, 0, 0] == 222) and np.all(drawn[1, 1, 1] == 222)
    np.testing.assert_allclose(drawn[0, 0, 1], (68, 1, 84), atol=2)  # viridis, not its mirror image
    np.testing.assert_allclose(drawn[0, 1, 1], (253, 231, 37), atol=2)
    own = drawing.heat(values)  # each up to its own largest value
    np.testing.assert_array_equal(own[1, 1, 0], own[0, 1, 1])


@pytest.fixture
def drawn(monkeypatch, encoder) -> list[dict]:
    """What visualize.main() draws: {title: images}, {title: captions}."""
    calls = []
    monkeypatch.setattr(load, "load_encoder", lambda path: encoder)
    monkeypatch.setattr(visualize, "grid", lambda rows, _, captions: calls.append((rows, captions)))
    return calls


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    visualize.main()


@pytest.mark.parametrize("show", visualize.SHOWN)
def test_pictures_of_an_encoder(monkeypatch, tmp_path, drawn, show):
    for i, picture in enumerate(pictures(3)):
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
    """600 images, 60 in each class, below a folder that also holds other files; the green of an
    image tells its place among all, sorted."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(600):
        path = root / f"class{i // 60}" / f"{i:03d}.{'png' if i % 2 else 'BMP'}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i // 256, i % 256, 100)).save(path)
        if i % 100 == 0:
            path.with_name(f"._{path.name}").write_bytes(b"no image")
            path.with_suffix(".txt").write_text("no image")
    return root


@pytest.mark.parametrize("show", visualize.SHOWN)
@pytest.mark.parametrize("count", [None, 1, 40])
def test_a_folder_is_shown_by_an_evenly_spread_subset(
    monkeypatch, tmp_path, encoder, folder, show, count
):
    """Only what is shown is read, the same every time, and the picture stays small."""
    monkeypatch.setattr(load, "load_encoder", lambda path: encoder)
    read, decode = [], visualize.views.decode_picture

    def counted(data):
        picture = decode(data)
        read.append(256 * int(picture[0, 0, 0]) + int(picture[0, 0, 1]))
        return picture

    monkeypatch.setattr(visualize.views, "decode_picture", counted)
    out, words = tmp_path / "out.png", [] if count is None else [f"--count={count}"]
    words += ["--gallery=50", "--neighbours=2"] if show == "neighbours" else []
    run(monkeypatch, "run", folder, f"--show={show}", f"--out={out}", *words)
    if show == "neighbours":  # the gallery, then each image again with its neighbours
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
    rows = {f"row {i}": np.full((visualize.MOST, 2, 2, 3), i / 2) for i in range(3)}
    visualize.grid(rows, tmp_path / "out.png", {"row 1": list(map(str, range(visualize.MOST)))})
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


def test_predictions_are_of_examples_from_the_whole_store(tmp_path):
    dataset = image_dataset(tmp_path, per_class=12)
    store = token_store(tmp_path, dataset, random_teacher(tmp_path / "teacher"))
    args = SimpleNamespace(store=store, view=0, count=4, seed=0)
    shown, tokens, _, cls = visualize.stored(args, tiny_model())
    split = records.Split(store, "view000")
    assert len(split) == 24 and (len(tokens), cls) == (4, True)
    for index, picture in zip((0, 6, 12, 18), shown, strict=True):
        np.testing.assert_array_equal(picture, views.decode_picture(split[index]["image"]))


def refused(monkeypatch, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(visualize.main)
    return ended.value.code


def test_what_is_refused(monkeypatch, tmp_path, encoder):
    monkeypatch.setattr(load, "load_encoder", lambda path: encoder)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    out = f"--out={tmp_path / 'out.png'}"
    (tmp_path / "empty").mkdir()
    for words, told in (
        (["run", tmp_path / "empty"], f"{tmp_path / 'empty'} holds no images"),
        (["run", tmp_path / "b.png"], "b.png"),
        (["run"], "--show=tokens takes images"),
        (["run", "--show=predictions", tmp_path], "takes --store=TOKENS and no images"),
        (["run", "--show=neighbours", tmp_path / "a.png"], "needs at least 2 images"),
        (["run", "--count=0", tmp_path], "argument --count: 0 is not a number from 1 on"),
        (["run", "--count=65", tmp_path], "--count=65: must be from 1 to 64"),
        (["run", "--neighbours=12", tmp_path], "--neighbours=12: must be from 1 to 11"),
        (["run", "--gallery=1", tmp_path], "--gallery=1: must be "),
    ):
        message = refused(monkeypatch, *words, out)
        assert message.startswith("error: ") and told in message, message
    assert not (tmp_path / "out.png").exists()
