"""Token stores: views of an image dataset, and what the teacher makes of them.

The teacher runs on exactly the picture that is stored, decoded again from its stored bytes, so that
picture and tokens cannot drift apart.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from etils import epath

import dgpt_jax
from dgpt_jax import metrics, pipeline, records, token_codec, towers, views
from dgpt_jax.config import Tokens
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.records import StoreInfo
from dgpt_jax.schema import UserError

SAMPLE = 256  # pictures that the channel scale and the stored cosine are measured on


class Teacher:
    """A teacher's tower with its weights on the device: pictures in, tokens out."""

    def __init__(self, config):
        loaded = teacher_weights.load(
            config.weights,
            image_size=config.image_size,
            heads=config.heads,
            activation=config.activation,
        )
        self.tower, self.name, self.hash, self.notes = (
            loaded.tower,
            loaded.name,
            loaded.hash,
            loaded.notes,
        )
        self.dtype = config.dtype
        self._params = jax.device_put(loaded.params)
        self._tokens = jax.jit(
            lambda params, pictures: towers.teacher_tokens(
                self.tower, params, pictures, dtype=config.dtype
            )
        )

    def __call__(self, pictures: np.ndarray, batch_size: int) -> np.ndarray:
        """uint8 (b ≤ batch_size, height, width, 3) to float32 (b, cls+N, C); the tail is padded."""
        missing = batch_size - len(pictures)
        padded = np.concatenate([pictures, np.repeat(pictures[-1:], missing, axis=0)])
        return np.asarray(self._tokens(self._params, padded))[: len(pictures)]

    def describe(self) -> dict:
        tower = dataclasses.asdict(self.tower)
        return {"name": self.name, "hash": self.hash, "dtype": self.dtype, "tower": tower}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One example on its way into the store."""

    id: str
    label: int | None
    view: views.View
    data: bytes
    picture: np.ndarray


def render(config: Tokens, source: records.Split, view: int, index: int) -> Rendered:
    """View number `view` of example `index`: a function of (config.seed, index, view)."""
    record = source[index]
    image = views.decode_picture(record["image"])
    drawn = views.draw(
        pipeline.generator(config.seed, pipeline.VIEW, index, view),
        *image.shape[:2],
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip=config.flip,
    )
    data = views.encode_picture(views.render(image, drawn, config.picture_size), config.picture)
    return Rendered(record["id"], record.get("label"), drawn, data, views.decode_picture(data))


def build(config: Tokens, out) -> StoreInfo:
    """Writes the missing shards of a token store, then its metadata. Raises UserError.

    Finished shards are kept, so a rerun continues, and more views can be added later.
    """
    out = epath.Path(out)
    source = records.Split(config.source, config.split)
    teacher = Teacher(config.teacher)
    say = metrics.Progress().say
    for note in teacher.notes:
        say(note)
    with ThreadPoolExecutor(config.threads) as pool:
        info = _describe(config, source, teacher, pool)
        if records.is_token_store(out):
            info = _same_store(StoreInfo.load(out), info, out)
        features = records.token_features(info, source.label)
        out.mkdir(parents=True, exist_ok=True)
        info.save(out)  # before the shards: a rerun with another config must not mix with them
        shards = -(-len(source) // config.shard_size)
        ranges = [
            range(i * config.shard_size, min((i + 1) * config.shard_size, len(source)))
            for i in range(shards)
        ]
        clock = metrics.Clock(0, config.views * len(source), batch_size=1)
        done = 0
        for view in range(config.views):
            for shard, indices in enumerate(ranges):
                path = records.shard_path(out, records.view_split(view), shard, shards)
                if path.exists() and records.shard_length(path) == len(indices):
                    say(f"{path.name}: complete, kept")
                    clock.restart(done := done + len(indices))
                    continue
                examples = _examples(config, source, teacher, info, pool, view, indices)
                done += records.write_shard(path, features, examples)
                rate = clock.read(done)
                say(
                    f"{path.name}: {len(indices)} examples, "
                    f"{path.stat().length / len(indices) / 1e3:.1f} kB each, "
                    f"{rate['images_per_second']:.0f} img/s, "
                    f"eta {metrics.duration(rate['eta_seconds'])}"
                )
    kept = _existing_views(out, config.views)
    lengths = {records.view_split(v): [len(r) for r in ranges] for v in range(kept)}
    records.write_metadata(out, features, lengths)
    return info


def _existing_views(out, views_built: int) -> int:
    """Views of the store, those that were there before included."""
    if not (out / "dataset_info.json").exists():
        return views_built
    return max(views_built, len(records.open_builder(out).info.splits))


def _examples(config, source, teacher, info, pool, view, indices) -> Iterator[dict]:
    """Stored examples of one shard; rendering runs ahead of the teacher by two batches."""
    starts = range(indices.start, indices.stop, config.batch_size)
    queue: deque = deque()

    def submit(start):
        batch = range(start, min(start + config.batch_size, indices.stop))
        queue.append([pool.submit(render, config, source, view, i) for i in batch])

    for start in starts[:2]:
        submit(start)
    for start in [*starts[2:], *[None] * min(2, len(starts))]:
        batch = [future.result() for future in queue.popleft()]
        if start is not None:
            submit(start)
        tokens = teacher(np.stack([r.picture for r in batch]), config.batch_size)
        stored = token_codec.encode(tokens, info.codec, np.asarray(info.channel_scale))
        for rendered, example_tokens in zip(batch, stored, strict=True):
            example = {
                "id": rendered.id,
                "image": rendered.data,
                "tokens": example_tokens,
                "box": np.asarray(rendered.view.box, np.int32),
                "flip": np.int32(rendered.view.flip),
            }
            yield example if rendered.label is None else example | {"label": rendered.label}


def _describe(config: Tokens, source, teacher: Teacher, pool) -> StoreInfo:
    """The store's metadata; its channel scale and cosine are measured on a sample of view 0."""
    sample = range(0, len(source), max(1, len(source) // SAMPLE))[:SAMPLE]
    pictures = [r.picture for r in pool.map(lambda i: render(config, source, 0, i), sample)]
    size = config.batch_size
    tokens = np.concatenate(
        [teacher(np.stack(pictures[i : i + size]), size) for i in range(0, len(pictures), size)]
    )
    scale = token_codec.channel_scale(tokens) if config.codec == "int8" else np.zeros(0, np.float32)
    decoded = token_codec.decode(token_codec.encode(tokens, config.codec, scale), scale)
    cosine = token_codec.cosines(decoded, tokens)
    info = records.open_builder(config.source).info
    return StoreInfo(
        codec=config.codec,
        grid=teacher.tower.grid,
        cls=teacher.tower.cls,
        width=teacher.tower.token_width,
        channel_scale=tuple(float(s) for s in scale),
        cosine=(float(cosine.min()), float(cosine.mean())),
        picture_size=config.picture_size,
        picture=config.picture,
        teacher=teacher.describe(),
        source={
            "name": info.name,
            "version": str(info.version),
            "split": config.split,
            "examples": len(source),
        },
        views={
            "seed": config.seed,
            "crop_scale": list(config.crop_scale),
            "crop_ratio": list(config.crop_ratio),
            "flip": config.flip,
            "shard_size": config.shard_size,
        },
        code_version=dgpt_jax.__version__,
    )


def _same_store(old: StoreInfo, new: StoreInfo, out) -> StoreInfo:
    """The old metadata, if what is to be added is of the same kind."""
    for name in ("codec", "picture_size", "picture", "source", "views"):
        if getattr(old, name) != getattr(new, name):
            raise UserError(
                f"{out} was built with {name} {getattr(old, name)}, the config has "
                f"{getattr(new, name)}: choose another --out"
            )
    if old.teacher["hash"] != new.teacher["hash"]:
        raise UserError(
            f"{out} was built with the teacher {old.teacher['name']} ({old.teacher['hash']}), the "
            f"config names {new.teacher['name']} ({new.teacher['hash']})"
        )
    return old


def verify(store, config, samples: int = 64, batch_size: int = 16) -> list[dict]:
    """Re-runs the teacher on stored pictures: one row a view with minimum and median cosine.

    `config` is the config.Teacher. Raises UserError where its weights are others than the store's.
    """
    info = StoreInfo.load(store)
    teacher = Teacher(config)
    if teacher.hash != info.teacher["hash"]:
        raise UserError(
            f"{store} was built with the teacher {info.teacher['hash']}, these weights are "
            f"{teacher.hash}"
        )
    rows = []
    for name in records.open_builder(store).info.splits:
        split = records.Split(store, name)
        chosen = range(0, len(split), max(1, len(split) // samples))[:samples]
        found = []
        for start in range(0, len(chosen), batch_size):
            batch = [split[i] for i in chosen[start : start + batch_size]]
            pictures = np.stack([views.decode_picture(r["image"]) for r in batch])
            stored = np.stack([r["tokens"] for r in batch])
            live = teacher(pictures, batch_size)
            cosine = token_codec.cosines(token_codec.decode(stored, info.channel_scale), live)
            found += [
                (float(row.min()), r["id"], tuple(int(x) for x in r["box"]), int(r["flip"]))
                for row, r in zip(cosine, batch, strict=True)
            ]
        worst = min(found)
        rows.append(
            {
                "split": name,
                "examples": len(found),
                "min": worst[0],
                "median": float(np.median([f[0] for f in found])),
                "worst": f"{worst[1]} box {worst[2]} flip {worst[3]}",
            }
        )
    return rows


def threshold(info: StoreInfo) -> float:
    """The least cosine of a sound store: what its codec and its teacher's dtype allow."""
    exact = {"float16": 0.9999, "int8": 0.999}[info.codec]
    return exact if info.teacher["dtype"] == "float32" else min(exact, 0.99)
