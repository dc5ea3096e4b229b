"""How the tokens of a teacher are encoded in a store, measured on a sample of its images."""

from dataclasses import dataclass

import numpy as np

from dgpt_jax.data import token_codec
from dgpt_jax.data.teacher_info import TeacherInfo, as_json
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.tokens import writer
from dgpt_jax.tokens.teacher import Teacher


@dataclass(frozen=True)
class Encoding:
    """Metadata of a teacher's tokens, its codec, and the bytes of the tokens of an example."""

    info: TeacherInfo
    codec: Codec
    bytes: int


def measure(
    name: str,
    teacher: Teacher,
    images: np.ndarray,
    *,
    codec: str,
    pca: int | None,
    codec_from: str = "",
    other: tuple[TeacherInfo, AnyPath] | None = None,
) -> Encoding:
    """Returns the encoding of a teacher's tokens, measured on images, uint8 (n, height, width, 3).

    name: by which configs call the teacher. codec_from: the store whose codec is taken instead of a
    fitted one (config.codec_from); other: metadata and directory of its tokens. Raises UserError if
    its codec, PCA or channels differ, or tokens are not finite.
    """
    tokens = teacher(images)
    writer.require_finite(np.isfinite(tokens).all())
    if other is None:
        fitted, variance = token_codec.fit(tokens, codec, pca)
    else:
        expected = (codec, pca, tokens.shape[-1])
        fitted, variance = _codec_of(codec_from, *other, expected, tokens)
    stored = fitted.encode(tokens)
    cosine = token_codec.cosines(fitted.decode(stored), fitted.project(tokens))
    info = TeacherInfo(
        name=name,
        weights=as_json(teacher.describe()),
        codec=codec,
        grid=teacher.tower.grid,
        cls=teacher.tower.cls,
        width=pca or teacher.tower.token_width,
        channel_scale=tuple(float(s) for s in fitted.scale),
        cosine=(float(cosine.min()), float(cosine.mean())),
        variance=variance,
    )
    return Encoding(info, fitted, stored[0].nbytes)


def _codec_of(
    codec_from: str, other: TeacherInfo, directory: AnyPath, expected: tuple, tokens: np.ndarray
) -> tuple[Codec, float]:
    """Returns (codec of another store, fraction of variance that it keeps of tokens)."""
    actual = (other.codec, other.width if other.is_reduced else None, other.weights["width"])
    if actual != expected:
        raise UserError(
            f"config.codec_from={codec_from} has (codec, pca, channels) of {other.name} {actual}, "
            f"this config {expected}"
        )
    codec = other.load_codec(directory)
    variance = np.square(codec.project(tokens), dtype=np.float64).sum()
    return codec, float(variance / np.square(tokens, dtype=np.float64).sum())
