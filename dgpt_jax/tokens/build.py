"""Builds token stores: views of an image dataset and the teacher's tokens of them.

The teacher runs on exactly the image that is stored, decoded from its stored bytes, so that image
and tokens cannot drift apart. Each process builds its share of the unfinished shards on its own
devices and waits for the others only before the first and after the last.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from etils import epath

from dgpt_jax import invocation
from dgpt_jax._version import __version__
from dgpt_jax.config import TokensConfig
from dgpt_jax.config.data import FIRST
from dgpt_jax.data import teacher_info, token_statistics, token_store
from dgpt_jax.data.teacher_info import as_json
from dgpt_jax.data.token_store import StoredImages, StoreInfo
from dgpt_jax.distributed import multihost
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.tokens import encoding, views, writer
from dgpt_jax.tokens.shard_plan import plan_view
from dgpt_jax.tokens.teacher import Teacher


def build(config: TokensConfig, out: epath.PathLike, *, check: bool = False) -> StoreInfo:
    """Writes the missing shards of a token store, then its metadata. Raises UserError.

    Complete shards are kept, so that a rerun resumes and views can be added later; they are
    verified by size, with `check` also by checksum. The store does not depend on the number of
    processes and devices."""
    directory = epath.Path(out)
    say = progress.Progress().say
    source = tfds_dataset.Split(config.source, config.split)
    teacher = Teacher(config.teacher, config.batch_size, config.tensor)
    for line in (*teacher.notes, *multihost.preflight(directory, teacher.mesh)):
        say(line)
    with ThreadPoolExecutor(config.threads) as pool:
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            array_record_shards.remove_partial_files(directory)
            _check_or_create(config, directory, source, teacher, pool)
        multihost.barrier("begun")
        info = StoreInfo.load(directory)
        planned = [
            shard
            for view in range(config.views)
            for shard in plan_view(directory, info.name, view, len(source), config.shard_size)
        ]
        writer.write_missing(
            directory,
            planned,
            partial(views.render, config, source),
            tfds_dataset.serializer(token_store.features(info, source.label)),
            teacher,
            info.teacher.load_codec(directory),
            info.example_bytes,
            pool,
            say,
            check=check,
            remedy="choose another --out, fewer config.views, or a smaller config.codec",
        )
    multihost.barrier("written")
    if jax.process_index() == 0:
        _finish(config, directory, info, source)
    multihost.barrier("finished")
    return info


def _check_or_create(config: TokensConfig, out: epath.Path, source, teacher: Teacher, pool):
    """Checks that an existing store matches the config, or writes the metadata of a new one."""
    if not token_store.exists(out):
        info, basis = _describe(config, out, source, teacher, pool)
        if basis is not None:
            teacher_info.save_basis(out, basis)
        info.save(out)  # before the shards: another config must not be mixed in
        return
    old = StoreInfo.load(out)
    if "derived" in old.source:
        raise UserError(
            f"{out} was copied from other stores by `{old.command}`: choose another --out"
        )
    if "digest" not in old.source:  # of an earlier version: assume the present source
        old = dataclasses.replace(old, source=old.source | {"digest": source.digest})
    fixed = {
        "codec": (old.teacher.codec, config.codec),
        "image_size": (old.image.height, config.image_size),
        "image_encoding": (old.image.encoding, config.image_encoding),
        "source": (old.source, _source(config, source)),
        "views": (old.views, _views(config)),
    }
    for name, (stored, value) in fixed.items():
        if stored != value:
            raise UserError(
                f"{out} was built with {name} {stored}, not {value}: choose another --out"
            )
    tokens, weights = old.teacher, old.teacher.weights
    if config.pca != (tokens.width if tokens.is_reduced else None):
        raise UserError(
            f"{out} has tokens of width {tokens.width}, but config.pca={config.pca}: choose "
            f"another --out"
        )
    for name in ("hash", "dtype", "tower"):
        if weights[name] != (new := as_json(teacher.describe()))[name]:
            raise UserError(
                f"{out} was built with the teacher {weights['name']} ({name} {weights[name]}), not "
                f"{new['name']} ({name} {new[name]})"
            )


def _describe(
    config: TokensConfig, out: epath.Path, source, teacher: Teacher, pool
) -> tuple[StoreInfo, np.ndarray | None]:
    """Returns (StoreInfo, PCA basis or None), measured on a sample of view 0."""
    sample = token_statistics.sample_of(len(source))
    rendered = list(pool.map(partial(views.render, config, source, 0), sample))
    other = config.codec_from
    measured = encoding.measure(
        FIRST,
        teacher,
        np.stack([view.image for view in rendered]),
        codec=config.codec,
        pca=config.pca,
        codec_from=other,
        other=(StoreInfo.load(other).teacher, other) if other else None,
    )
    image_bytes = float(np.mean([len(view.encoded) for view in rendered]))
    info = StoreInfo(
        name=tfds_dataset.dataset_name(out),
        image=StoredImages(config.image_size, config.image_size, config.image_encoding),
        teacher=measured.info,
        example_bytes=measured.bytes + image_bytes + writer.OVERHEAD,
        source=_source(config, source),
        views=_views(config),
        command=invocation.command_line(),
        code_version=__version__,
    )
    return info, measured.codec.basis


def _source(config: TokensConfig, source: tfds_dataset.Split) -> dict:
    info = tfds_dataset.open_builder(config.source).info
    identity = {"name": info.name, "version": str(info.version), "split": config.split}
    return identity | {"examples": len(source), "digest": source.digest}


def _views(config: TokensConfig) -> dict:
    names = ("seed", "crop_scale", "crop_ratio", "flip", "shard_size")
    return {name: as_json(getattr(config, name)) for name in names}


def _finish(config: TokensConfig, out: epath.Path, info: StoreInfo, source: tfds_dataset.Split):
    """Writes TFDS's metadata and the manifest of the complete store, earlier views included."""
    earlier = 0
    if (out / "dataset_info.json").exists():
        earlier = len(tfds_dataset.open_builder(out).info.splits)
    infos = array_record_shards.shard_infos(out)
    written = {
        token_store.view_split(view): [
            infos[shard.path.name]
            for shard in plan_view(out, info.name, view, len(source), config.shard_size)
        ]
        for view in range(max(earlier, config.views))
    }
    array_record_shards.write_manifest(out, infos)
    features = token_store.features(info, source.label)
    tfds_dataset.write_metadata(out, features, written, info.name)
    token_statistics.measure_store(out, token_store.view_split(0), info.teacher.load_codec(out))
