"""Augmentation against timm: operations and their distributions; mixup, CutMix and erasing."""

import random
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from dgpt_jax.data import augment
from dgpt_jax.errors import UserError
from dgpt_jax.training import mixup
from tests.support.data import smooth_image
from tests.support.paths import GOLDEN

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


def test_operations_equal_timm():
    golden = np.load(GOLDEN / "rand_augment.npz")
    image = golden["picture"]
    tested = set()
    for key in golden.files:
        if key == "picture":
            continue
        name, level, negative, interpolation = key.split()
        increasing = name in OURS
        ours = OURS[name] if increasing else name.lower()
        value = augment.value_of(ours, float(level), negative == "1", increasing)
        (chosen,) = augment.INTERPOLATIONS[interpolation]
        result = augment.apply(image, [augment.Op(ours, value, chosen)])
        np.testing.assert_array_equal(result, golden[key], err_msg=key)
        tested.add(ours)
    assert tested == set(augment.OPS)


def test_posterize_to_zero_bits_is_black():
    assert augment.value_of("posterize", 10.0, False, True) == 0
    result = augment.apply(np.full((2, 2, 3), 255, np.uint8), [augment.Op("posterize", 0)])
    assert not result.any()


def test_sampled_operations():
    """Uniform names, half of the layers, levels around 9 clipped at 10, random signs."""
    policy = augment.rand_augment(RECIPE, "random")
    assert (policy.magnitude, policy.deviation, policy.layers, policy.prob) == (9, 0.5, 2, 0.5)
    rng = np.random.default_rng(0)
    ops = [op for _ in range(20_000) for op in policy.draw(rng)]
    assert abs(len(ops) / 40_000 - 0.5) < 0.01
    counts = Counter(op.name for op in ops)
    assert set(counts) == set(augment.OPS)
    assert all(abs(n / len(ops) - 1 / 15) < 0.008 for n in counts.values())
    angles = np.array([op.value for op in ops if op.name == "rotate"]) / 3
    assert abs((angles > 0).mean() - 0.5) < 0.05
    levels = np.abs(angles)
    assert abs(levels.mean() - 9) < 0.05 and abs(levels.std() - 0.5) < 0.04
    assert levels.max() == 10 and 0.005 < (levels == 10).mean() < 0.045
    assert abs(np.mean([op.filter == Image.Resampling.BICUBIC for op in ops]) - 0.5) < 0.02
    fixed = augment.rand_augment(RECIPE).draw
    assert {op.filter for _ in range(50) for op in fixed(rng)} == {Image.Resampling.BICUBIC}


@pytest.mark.parametrize(
    "text", ["", "auto-m9", "rand-m9-x3", "rand-m", "rand-m9.5", "rand-mstd101", "rand-p1.5"]
)
def test_invalid_policies(text):
    with pytest.raises(UserError, match=f"{text!r}"):
        augment.rand_augment(text)


def test_jitter():
    rng = np.random.default_rng(0)
    ops = [augment.draw_jitter(rng, (0.3, 0.0, 0.2)) for _ in range(2000)]
    assert all(len(ops) == 2 for ops in ops)
    first = Counter(ops[0].name for ops in ops)
    assert set(first) == {"brightness", "color"} and abs(first["color"] / 2000 - 0.5) < 0.05
    for name, strength in (("brightness", 0.3), ("color", 0.2)):
        values = [op.value for ops in ops for op in ops if op.name == name]
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


def test_erasing_changes_only_the_box():
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
    boxes = np.array([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 8, 8]], np.int32)
    result = np.asarray(jax.jit(mixup.erase)(jax.random.key(0), images, boxes))
    changed = (result != images).all(axis=-1)
    expected = np.zeros((3, 8, 8), bool)
    expected[1, 1:4, 2:6] = expected[2] = True
    np.testing.assert_array_equal(changed, expected)
    assert abs(result[2].std() - 1) < 0.15 and len(np.unique(result[2])) == 192


def mixed(own, cut, center, images, targets):
    mix = mixup.cut_boxes(np.float32(own), np.array(cut), np.array(center), images.shape[1])
    return jax.jit(mixup.apply)(mix, images, targets)


def batch(rows: int):
    rng = np.random.default_rng(1)
    images = rng.standard_normal((rows, 10, 10, 3)).astype(np.float32)
    labels = rng.integers(0, 5, rows)
    targets = np.asarray(mixup.soft_labels(labels, 5, 0.1))
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets[np.arange(rows), labels], 0.92, rtol=1e-6)
    return images, targets


def test_mixup_and_cutmix_by_hand():
    """Two groups of 4 rows: the first is blended, the second gets a 5×5 box."""
    images, targets = batch(8)
    partners = np.array([3, 2, 1, 0, 7, 6, 5, 4])
    result, soft = mixed([0.7, 0.75], [False, True], [[5, 9], [5, 4]], images, targets)
    blended = 0.7 * images + 0.3 * images[partners]
    np.testing.assert_allclose(result[:4], blended[:4], atol=1e-6)
    expected = images.copy()
    expected[:, 7:, 2:7] = images[partners][:, 7:, 2:7]  # rows 7 to 12, clipped at 10
    np.testing.assert_array_equal(result[4:], expected[4:])
    own = np.array([0.7, 1 - 15 / 100]).repeat(4)[:, None]
    np.testing.assert_allclose(soft, own * targets + (1 - own) * targets[partners], atol=1e-6)


def test_sampled_mixes():
    draw = jax.jit(lambda a, b: mixup.sample_mix(jax.random.key(0), 4000, 224, mixup=a, cutmix=b),
                   static_argnums=(0, 1))  # fmt: skip
    mix = draw(0.8, 1.0)
    cut = np.asarray(mix.cut)
    assert abs(cut.mean() - 0.5) < 0.03
    own = np.asarray(mix.lam)[~cut]
    assert abs(own.mean() - 0.5) < 0.02 and abs(own.var() - 1 / (4 * 2.6)) < 0.01
    top, bottom, left, right = (np.asarray(x)[cut] for x in mix.box)
    shares = (bottom - top) * (right - left) / 224**2
    np.testing.assert_allclose(1 - shares, np.asarray(mix.lam)[cut], atol=1e-6)
    assert 0.3 < shares.mean() < 0.4 and top.min() == 0 and bottom.max() == 224
    assert draw(0.0, 1.0).cut.all() and not draw(0.3, 0.0).cut.any()


class TestLive:
    """Against timm and torchvision, if installed."""

    def test_operations(self, monkeypatch):
        policies = pytest.importorskip("timm.data.auto_augment")
        image = smooth_image(np.random.default_rng(0), 37, 48)
        for ours, theirs in TIMM.items():
            for level in (0.0, 0.7, 3.3, 6.1, 9.0, 9.9):
                for negative in (False, True):
                    for kind in ("bilinear", "bicubic"):
                        (chosen,) = augment.INTERPOLATIONS[kind]
                        hparams = {"img_mean": (124, 116, 104), "interpolation": chosen}
                        op = policies.AugmentOp(theirs, 1.0, level, hparams)
                        monkeypatch.setattr(random, "random", lambda n=negative: 0.9 if n else 0.1)
                        expected = np.asarray(op(Image.fromarray(image)))
                        value = augment.value_of(ours, level, negative, True)
                        result = augment.apply(image, [augment.Op(ours, value, chosen)])
                        np.testing.assert_array_equal(result, expected, err_msg=f"{ours} {level}")

    def test_draws(self):
        policies = pytest.importorskip("timm.data.auto_augment")
        policy = policies.rand_augment_transform(RECIPE, {"img_mean": (124, 116, 104)})
        ops = []
        for op in policy.ops:
            op.aug_fn = lambda img, *args, name=op.name, **kwargs: (
                ops.append((OURS[name], args[0] if args else 0, kwargs["resample"])) or img
            )
        for _ in range(10_000):
            policy(None)
        rng = np.random.default_rng(0)
        sampler = augment.rand_augment(RECIPE, "random")
        ours = [(o.name, o.value, o.filter) for _ in range(10_000) for o in sampler.draw(rng)]
        assert abs(len(ours) - len(ops)) < 400
        for name in augment.OPS:
            a, b = (np.sort([v for n, v, _ in shares if n == name]) for shares in (ours, ops))
            assert abs(len(a) - len(b)) < 150, name
            quantiles = np.linspace(0.02, 0.98, 25)
            spread = max(np.ptp(b), 1e-9)
            gap = np.abs(np.quantile(a, quantiles) - np.quantile(b, quantiles)) / spread
            assert np.sort(gap)[-3] < 0.05, (name, gap)  # a jump where the sign changes

    def test_mixing(self, monkeypatch):
        torch = pytest.importorskip("torch")
        Mixup = pytest.importorskip("timm.data.mixup").Mixup
        images, _ = batch(6)
        labels = np.array([0, 4, 2, 2, 1, 3])
        targets = mixup.soft_labels(labels, 5, 0.1)
        for cut in (False, True):
            for own in (0.05, 0.4, 0.93):
                mixer = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, num_classes=5)
                monkeypatch.setattr(np.random, "rand", lambda *_, c=cut: 0.3 if c else 0.7)
                monkeypatch.setattr(np.random, "beta", lambda *_, lam=own: lam)
                monkeypatch.setattr(np.random, "randint", lambda *_, **__: 8)
                x = torch.tensor(images.transpose(0, 3, 1, 2).copy())
                x, y = mixer(x, torch.tensor(labels))
                result, soft = mixed([own], [cut], [[8], [8]], images, targets)
                np.testing.assert_allclose(result, x.numpy().transpose(0, 2, 3, 1), atol=1e-6)
                np.testing.assert_allclose(soft, y.numpy(), atol=1e-6)

    def test_erasing_and_jitter(self):
        pytest.importorskip("timm")
        torch = pytest.importorskip("torch")
        from timm.data.random_erasing import RandomErasing

        eraser = RandomErasing(1.0, mode="pixel", device="cpu")
        random.seed(0)
        shares = []
        for _ in range(1500):
            shares.append(float((eraser(torch.zeros(1, 64, 64)) != 0).float().mean()))
        rng = np.random.default_rng(0)
        boxes = np.array([augment.draw_erased(rng, 64, 1.0) for _ in range(1500)])
        sampler = boxes[:, 2] * boxes[:, 3] / 64**2
        for q in (0.1, 0.5, 0.9):
            assert abs(np.quantile(sampler, q) - np.quantile(shares, q)) < 0.02
        functional = pytest.importorskip("torchvision.transforms.functional")
        image = smooth_image(rng, 20, 24)
        adjust = {"brightness": "brightness", "contrast": "contrast", "color": "saturation"}
        for name, theirs in adjust.items():
            expected = getattr(functional, f"adjust_{theirs}")(Image.fromarray(image), 0.77)
            result = augment.apply(image, [augment.Op(name, 0.77)])
            np.testing.assert_array_equal(result, np.asarray(expected))
