"""Augmentation equals timm's, operation by operation and in what is drawn; mixing and erasing."""

import random
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from dgpt_jax import augment, mixing
from dgpt_jax.schema import UserError
from tests.data import smooth_image
from tests.paths import GOLDEN

# timm's names of the increasing operations.
TIMM = {
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd", "color": "ColorIncreasing", "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing", "sharpness": "SharpnessIncreasing", "shear_x": "ShearX",
    "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip
OURS = {theirs: ours for ours, theirs in TIMM.items()}
RECIPE = "rand-m9-mstd0.5-inc1"


def test_operations_are_timms():
    golden = np.load(GOLDEN / "rand_augment.npz")
    picture = golden["picture"]
    seen = set()
    for key in golden.files:
        if key == "picture":
            continue
        name, level, negative, interpolation = key.split()
        increasing = name in OURS
        ours = OURS[name] if increasing else name.lower()
        value = augment.value_of(ours, float(level), negative == "1", increasing)
        (chosen,) = augment.INTERPOLATIONS[interpolation]
        made = augment.apply(picture, [augment.Op(ours, value, chosen)])
        np.testing.assert_array_equal(made, golden[key], err_msg=key)
        seen.add(ours)
    assert seen == set(augment.OPS)


def test_no_bits_are_black():
    assert augment.value_of("posterize", 10.0, False, True) == 0
    made = augment.apply(np.full((2, 2, 3), 255, np.uint8), [augment.Op("posterize", 0)])
    assert not made.any()


def test_what_is_drawn():
    """Names evenly, half of the layers, levels about 9 cut off at 10, either sign."""
    policy = augment.rand_augment(RECIPE, "random")
    assert (policy.magnitude, policy.deviation, policy.layers, policy.prob) == (9, 0.5, 2, 0.5)
    rng = np.random.default_rng(0)
    drawn = [op for _ in range(20_000) for op in policy.draw(rng)]
    assert abs(len(drawn) / 40_000 - 0.5) < 0.01
    counts = Counter(op.name for op in drawn)
    assert set(counts) == set(augment.OPS)
    assert all(abs(n / len(drawn) - 1 / 15) < 0.008 for n in counts.values())
    angles = np.array([op.value for op in drawn if op.name == "rotate"]) / 3
    assert abs((angles > 0).mean() - 0.5) < 0.05
    levels = np.abs(angles)
    assert abs(levels.mean() - 9) < 0.05 and abs(levels.std() - 0.5) < 0.04
    assert levels.max() == 10 and 0.005 < (levels == 10).mean() < 0.045
    assert abs(np.mean([op.filter == Image.Resampling.BICUBIC for op in drawn]) - 0.5) < 0.02
    fixed = augment.rand_augment(RECIPE).draw
    assert {op.filter for _ in range(50) for op in fixed(rng)} == {Image.Resampling.BICUBIC}


@pytest.mark.parametrize(
    "text", ["", "auto-m9", "rand-m9-x3", "rand-m", "rand-m9.5", "rand-mstd101", "rand-p1.5"]
)
def test_policies_that_cannot_be_read(text):
    with pytest.raises(UserError, match="cannot read the augmentation"):
        augment.rand_augment(text)


def test_jitter():
    rng = np.random.default_rng(0)
    drawn = [augment.draw_jitter(rng, (0.3, 0.0, 0.2)) for _ in range(2000)]
    assert all(len(ops) == 2 for ops in drawn)
    first = Counter(ops[0].name for ops in drawn)
    assert set(first) == {"brightness", "color"} and abs(first["color"] / 2000 - 0.5) < 0.05
    for name, strength in (("brightness", 0.3), ("color", 0.2)):
        values = [op.value for ops in drawn for op in ops if op.name == name]
        assert 1 - strength <= min(values) < 1 - 0.95 * strength
        assert 1 + 0.95 * strength < max(values) <= 1 + strength


def test_erased_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.draw_erased(rng, 224, 0.25) for _ in range(8000)])
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) / 8000 - 0.25) < 0.02
    top, left, height, width = erased.T
    assert (top + height <= 224).all() and (left + width <= 224).all()
    share, ratio = height * width / 224**2, np.log(height / width)
    assert share.min() > 0.019 and share.max() < 0.335 and abs(np.median(ratio)) < 0.05
    assert top.min() == 0 and (top + height).max() == 224 and abs(share.mean() - 0.173) < 0.01


def test_erasing_leaves_the_rest():
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
    boxes = np.array([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 8, 8]], np.int32)
    made = np.asarray(jax.jit(mixing.erase)(jax.random.key(0), images, boxes))
    changed = (made != images).all(axis=-1)
    expected = np.zeros((3, 8, 8), bool)
    expected[1, 1:4, 2:6] = expected[2] = True
    np.testing.assert_array_equal(changed, expected)
    assert abs(made[2].std() - 1) < 0.15 and len(np.unique(made[2])) == 192


def mixed(own, cut, centre, images, targets):
    mix = mixing.cut_boxes(np.float32(own), np.array(cut), np.array(centre), images.shape[1])
    return jax.jit(mixing.apply)(mix, images, targets)


def batch(rows: int):
    rng = np.random.default_rng(1)
    images = rng.standard_normal((rows, 10, 10, 3)).astype(np.float32)
    labels = rng.integers(0, 5, rows)
    targets = np.asarray(mixing.soft_labels(labels, 5, 0.1))
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[np.arange(rows), labels], 0.92, rtol=1e-6)
    return images, targets


def test_mixup_and_cutmix_by_hand():
    """Two groups of 4 rows: the first is blended, of the second a 5×5 box is cut."""
    images, targets = batch(8)
    partners = np.array([3, 2, 1, 0, 7, 6, 5, 4])
    made, soft = mixed([0.7, 0.75], [False, True], [[5, 9], [5, 4]], images, targets)
    blended = 0.7 * images + 0.3 * images[partners]
    np.testing.assert_allclose(made[:4], blended[:4], atol=1e-6)
    expected = images.copy()
    expected[:, 7:, 2:7] = images[partners][:, 7:, 2:7]  # rows 7 to 12, cut off at 10
    np.testing.assert_array_equal(made[4:], expected[4:])
    own = np.array([0.7, 1 - 15 / 100]).repeat(4)[:, None]
    np.testing.assert_allclose(soft, own * targets + (1 - own) * targets[partners], atol=1e-6)


def test_what_is_mixed():
    draw = jax.jit(lambda a, b: mixing.draw(jax.random.key(0), 4000, 224, mixup=a, cutmix=b),
                   static_argnums=(0, 1))  # fmt: skip
    mix = draw(0.8, 1.0)
    cut = np.asarray(mix.cut)
    assert abs(cut.mean() - 0.5) < 0.03
    own = np.asarray(mix.own)[~cut]
    assert abs(own.mean() - 0.5) < 0.02 and abs(own.var() - 1 / (4 * 2.6)) < 0.01
    top, bottom, left, right = (np.asarray(x)[cut] for x in mix.box)
    shares = (bottom - top) * (right - left) / 224**2
    np.testing.assert_allclose(1 - shares, np.asarray(mix.own)[cut], atol=1e-6)
    assert 0.3 < shares.mean() < 0.4 and top.min() == 0 and bottom.max() == 224
    assert draw(0.0, 1.0).cut.all() and not draw(0.3, 0.0).cut.any()


class TestLive:
    """Against timm and torchvision, where they are installed."""

    def test_operations(self, monkeypatch):
        policies = pytest.importorskip("timm.data.auto_augment")
        picture = smooth_image(np.random.default_rng(0), 37, 48)
        for ours, theirs in TIMM.items():
            for level in (0.0, 0.7, 3.3, 6.1, 9.0, 9.9):
                for negative in (False, True):
                    for kind in ("bilinear", "bicubic"):
                        (chosen,) = augment.INTERPOLATIONS[kind]
                        hparams = {"img_mean": (124, 116, 104), "interpolation": chosen}
                        op = policies.AugmentOp(theirs, 1.0, level, hparams)
                        monkeypatch.setattr(random, "random", lambda n=negative: 0.9 if n else 0.1)
                        expected = np.asarray(op(Image.fromarray(picture)))
                        value = augment.value_of(ours, level, negative, True)
                        made = augment.apply(picture, [augment.Op(ours, value, chosen)])
                        np.testing.assert_array_equal(made, expected, err_msg=f"{ours} {level}")

    def test_draws(self):
        policies = pytest.importorskip("timm.data.auto_augment")
        policy = policies.rand_augment_transform(RECIPE, {"img_mean": (124, 116, 104)})
        drawn = []
        for op in policy.ops:
            op.aug_fn = lambda img, *args, name=op.name, **kwargs: (
                drawn.append((OURS[name], args[0] if args else 0, kwargs["resample"])) or img
            )
        for _ in range(10_000):
            policy(None)
        rng = np.random.default_rng(0)
        mine = augment.rand_augment(RECIPE, "random")
        ours = [(o.name, o.value, o.filter) for _ in range(10_000) for o in mine.draw(rng)]
        assert abs(len(ours) - len(drawn)) < 400
        for name in augment.OPS:
            a, b = (np.sort([v for n, v, _ in found if n == name]) for found in (ours, drawn))
            assert abs(len(a) - len(b)) < 150, name
            quantiles = np.linspace(0.02, 0.98, 25)
            spread = max(np.ptp(b), 1e-9)
            gap = np.abs(np.quantile(a, quantiles) - np.quantile(b, quantiles)) / spread
            assert np.sort(gap)[-3] < 0.05, (name, gap)  # where the sign changes, it jumps

    def test_mixing(self, monkeypatch):
        torch = pytest.importorskip("torch")
        Mixup = pytest.importorskip("timm.data.mixup").Mixup
        images, _ = batch(6)
        labels = np.array([0, 4, 2, 2, 1, 3])
        targets = mixing.soft_labels(labels, 5, 0.1)
        for cut in (False, True):
            for own in (0.05, 0.4, 0.93):
                mixer = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, num_classes=5)
                monkeypatch.setattr(np.random, "rand", lambda *_, c=cut: 0.3 if c else 0.7)
                monkeypatch.setattr(np.random, "beta", lambda *_, lam=own: lam)
                monkeypatch.setattr(np.random, "randint", lambda *_, **__: 8)
                x = torch.tensor(images.transpose(0, 3, 1, 2).copy())
                x, y = mixer(x, torch.tensor(labels))
                made, soft = mixed([own], [cut], [[8], [8]], images, targets)
                np.testing.assert_allclose(made, x.numpy().transpose(0, 2, 3, 1), atol=1e-6)
                np.testing.assert_allclose(soft, y.numpy(), atol=1e-6)

    def test_erasing_and_jitter(self):
        pytest.importorskip("timm")
        torch = pytest.importorskip("torch")
        from timm.data.random_erasing import RandomErasing

        eraser = RandomErasing(1.0, mode="pixel", device="cpu")
        random.seed(0)
        found = []
        for _ in range(1500):
            found.append(float((eraser(torch.zeros(1, 64, 64)) != 0).float().mean()))
        rng = np.random.default_rng(0)
        boxes = np.array([augment.draw_erased(rng, 64, 1.0) for _ in range(1500)])
        mine = boxes[:, 2] * boxes[:, 3] / 64**2
        for q in (0.1, 0.5, 0.9):
            assert abs(np.quantile(mine, q) - np.quantile(found, q)) < 0.02
        functional = pytest.importorskip("torchvision.transforms.functional")
        picture = smooth_image(rng, 20, 24)
        adjust = {"brightness": "brightness", "contrast": "contrast", "color": "saturation"}
        for name, theirs in adjust.items():
            expected = getattr(functional, f"adjust_{theirs}")(Image.fromarray(picture), 0.77)
            made = augment.apply(picture, [augment.Op(name, 0.77)])
            np.testing.assert_array_equal(made, np.asarray(expected))
