"""Stored records to training examples; random choices depend on (seed, position)."""

from dataclasses import dataclass

import numpy as np

from dgpt_jax.config import ClassificationConfig, DataConfig, ModelConfig
from dgpt_jax.data import augment, image_ops, segments

# Streams of random numbers that depend on a position: numpy seeds are (seed, stream, position).
ORDER, VIEW, AUGMENT = 0, 1, 4


def generator(seed: int, stream: int, *position: int) -> np.random.Generator:
    """Returns the random generator of a stream at a position."""
    return np.random.default_rng((seed, stream, *position))


def live_view(encoded: bytes, data: DataConfig, size: int, seed: int, position: int) -> np.ndarray:
    """Returns an image rendered through the view drawn for a position, uint8 (size, size, 3)."""
    image = image_ops.EncodedImage(encoded)
    view = image_ops.draw_view(
        generator(seed, VIEW, position),
        image.height,
        image.width,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        clip=data.crop_clip,
    )
    shrink = image.shrink(view, size)
    return image_ops.render(image.decode(shrink), view, size, shrink)


@dataclass(frozen=True)
class PretrainTransform:
    """Pretraining example of a record: image uint8 (size, size, 3), segment order int32 (S,), and,
    from a token store, the tokens of teachers as stored (1+N, C).

    stored: True for records of a token store, whose images are crops already. tokens: names of the
    features with the tokens.
    """

    stored: bool
    model: ModelConfig
    tokens: tuple[str, ...] = ()

    def __call__(
        self, record: dict, data: DataConfig, seed: int, position: int
    ) -> dict[str, np.ndarray]:
        size = self.model.image_size
        if self.stored:
            image = image_ops.resize(image_ops.decode_image(record["image"]), size, size)
        else:
            image = live_view(record["image"], data, size, seed, position)
        order = segments.raster_order(self.model.segments)
        if data.order == "random":
            rng = generator(seed, ORDER, position)
            order = segments.sample_order(rng, self.model.segments)
        return {"image": image, "order": order} | {name: record[name] for name in self.tokens}


@dataclass(frozen=True)
class ClassificationTransform:
    """Supervised example of a record: augmented image uint8 (size, size, 3), label int32, and
    erased int32 (4,), the box that is erased on the device."""

    size: int
    classify: ClassificationConfig

    def __call__(
        self, record: dict, data: DataConfig, seed: int, position: int
    ) -> dict[str, np.ndarray]:
        image = live_view(record["image"], data, self.size, seed, position)
        rng, cfg = generator(seed, AUGMENT, position), self.classify
        ops = []
        if cfg.randaugment:
            ops += augment.rand_augment(cfg.randaugment, cfg.interpolation).draw(rng)
        ops += augment.draw_jitter(rng, cfg.jitter)
        erased = augment.draw_erased(rng, self.size, cfg.random_erase_prob)
        label = np.array(record["label"], np.int32)
        return {"image": augment.apply(image, ops), "erased": erased, "label": label}
