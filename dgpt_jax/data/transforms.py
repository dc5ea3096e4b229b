"""What a task makes of a stored picture: everything random hangs on (seed, position)."""

from dataclasses import dataclass

import numpy as np

from dgpt_jax import augment, segments, views
from dgpt_jax.config import Classify, Data, Model

# Streams of random numbers that hang on one position: numpy seeds are (seed, stream, position).
ORDER, VIEW, AUGMENT = 0, 1, 4


def generator(seed: int, stream: int, *position: int) -> np.random.Generator:
    return np.random.default_rng((seed, stream, *position))


def live_view(encoded: bytes, data: Data, size: int, seed: int, position: int) -> np.ndarray:
    """The picture through a view that is drawn for the position: uint8 (size, size, 3)."""
    image = views.Encoded(encoded)
    view = views.draw(
        generator(seed, VIEW, position),
        image.height,
        image.width,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        flip=data.flip,
        clip=data.crop_clip,
    )
    shrink = image.shrink(view, size)
    return views.render(image.decode(shrink), view, size, shrink)


@dataclass(frozen=True)
class Segmented:
    """What pretraining makes of a record: dict of image uint8 (size, size, 3), order int32 (S,),
    and tokens as stored (1+N, C) where a token store is read."""

    with_tokens: bool
    model: Model

    def __call__(self, record: dict, data: Data, seed: int, position: int) -> dict[str, np.ndarray]:
        size = self.model.image_size
        if self.with_tokens:
            image = views.resize(views.decode_picture(record["image"]), size, size)
        else:
            image = live_view(record["image"], data, size, seed, position)
        order = segments.raster_order(self.model.segments)
        if data.order == "random":
            rng = generator(seed, ORDER, position)
            order = segments.sample_order(rng, self.model.segments)
        example = {"image": image, "order": order}
        if self.with_tokens:
            example["tokens"] = record["tokens"]
        return example


@dataclass(frozen=True)
class Labelled:
    """What supervised training makes of a record: dict of image uint8 (size, size, 3), augmented;
    erased int32 (4,), the box that the device is to erase; label int32."""

    size: int
    classify: Classify

    def __call__(self, record: dict, data: Data, seed: int, position: int) -> dict[str, np.ndarray]:
        image = live_view(record["image"], data, self.size, seed, position)
        rng, told = generator(seed, AUGMENT, position), self.classify
        ops = []
        if told.randaugment:
            ops += augment.rand_augment(told.randaugment, told.interpolation).draw(rng)
        ops += augment.draw_jitter(rng, told.jitter)
        erased = augment.draw_erased(rng, self.size, told.erase)
        image, label = augment.apply(image, ops), np.int32(record["label"])
        return {"image": image, "erased": erased, "label": label}
