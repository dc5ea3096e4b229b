"""Views of source images, as a token store stores them."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from dgpt_jax import invocation
from dgpt_jax.config import TokensConfig
from dgpt_jax.data import bad_records, image_ops, transforms
from dgpt_jax.errors import BadRecord, UserError
from dgpt_jax.storage import tfds_dataset


@dataclass(frozen=True)
class RenderedView:
    """An example without its tokens; `image` is decoded from `encoded`."""

    id: str
    label: int | None
    view: image_ops.View
    encoded: bytes
    image: np.ndarray

    def example(self, tokens: np.ndarray) -> dict:
        """Returns the example with its tokens, in the format of token_store.features."""
        example = {
            "id": self.id,
            "image": self.encoded,
            "tokens": tokens,
            "box": np.asarray(self.view.box, np.int32),
            "flip": np.int32(self.view.flip),
        }
        return example if self.label is None else example | {"label": self.label}


def draw(
    config: TokensConfig | SimpleNamespace, index: int, view: int, height: int, width: int
) -> image_ops.View:
    """Draws view number `view` of example `index`, an image of height×width: a function of these
    and of the config's seed, crop_scale, crop_ratio and flip."""
    return image_ops.draw_view(
        transforms.generator(config.seed, transforms.VIEW, index, view),
        height,
        width,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip=config.flip,
    )


def render(config: TokensConfig, source: tfds_dataset.Split, view: int, index: int) -> RenderedView:
    """Renders a view of an example. Raises UserError if its image cannot be decoded."""
    try:
        record = source[index]
        image = bad_records.decode_image(source, index, record)
    except BadRecord as e:
        raise UserError(
            f"{e}. A store needs all examples of its source: import the images with "
            f"`{invocation.command('import')}`, which skips unreadable files"
        ) from None
    drawn = draw(config, index, view, *image.shape[:2])
    crop = image_ops.render(image, drawn, config.image_size)
    encoded = image_ops.encode_image(crop, config.image_encoding)
    decoded = image_ops.decode_image(encoded)
    return RenderedView(record["id"], record.get("label"), drawn, encoded, decoded)
