"""Adds the tokens of a further teacher to a finished token store, from its stored images."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from etils import epath

from dgpt_jax import invocation
from dgpt_jax._version import __version__
from dgpt_jax.config import TokensConfig
from dgpt_jax.data import (
    bad_records,
    further_teachers,
    teacher_info,
    token_statistics,
    token_store,
)
from dgpt_jax.data.further_teachers import FurtherTeacher
from dgpt_jax.data.token_store import StoreInfo
from dgpt_jax.distributed import multihost
from dgpt_jax.errors import BadRecord, UserError
from dgpt_jax.monitoring import progress
from dgpt_jax.storage import array_record_shards, tfds_dataset
from dgpt_jax.storage.gcs import AnyPath
from dgpt_jax.tokens import encoding, writer
from dgpt_jax.tokens.shard_plan import ShardPlan
from dgpt_jax.tokens.teacher import Teacher


@dataclass(frozen=True)
class StoredView:
    """A stored example without tokens."""

    id: str
    image: np.ndarray

    def example(self, tokens: np.ndarray) -> dict:
        """Returns the example of the further teacher."""
        return {"id": self.id, "tokens": tokens}


def add(config: TokensConfig, store: AnyPath, name: str, *, check: bool = False):
    """Writes the missing shards of config.teachers.NAME beside those of a finished store, then its
    metadata; resumes like build.build. Returns its FurtherTeacher. Raises UserError."""
    token_store.require_finished(store)
    settings, directory = config.teachers[name], further_teachers.path_of(store, name)
    say = progress.Progress().say
    opened = tfds_dataset.Opened(store)
    splits = [tfds_dataset.Split(store, split, opened) for split in opened.builder.info.splits]
    teacher = Teacher(settings, config.batch_size, config.tensor)
    require_size(StoreInfo.load(store), teacher, name)
    for line in (*teacher.notes, *multihost.preflight(epath.Path(store), teacher.mesh)):
        say(line)
    with ThreadPoolExecutor(config.threads) as pool:
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            array_record_shards.remove_partial_files(directory)
            _check_or_create(config, store, name, splits, teacher, pool)
        multihost.barrier("begun")
        info = further_teachers.load(store, name)
        planned = [
            shard for view, split in enumerate(splits) for shard in _plan(store, name, view, split)
        ]
        writer.write_missing(
            directory,
            planned,
            partial(_stored_view, splits),
            tfds_dataset.serializer(further_teachers.features(info)),
            teacher,
            info.teacher.load_codec(directory),
            info.example_bytes,
            pool,
            say,
            check=check,
            what=f"{name}, ",
            remedy=f"free some, or choose a smaller config.teachers.{name}.codec",
        )
    multihost.barrier("written")
    if jax.process_index() == 0:
        _finish(directory, info, splits, planned)
    multihost.barrier("finished")
    return info


def require_size(info: StoreInfo, teacher: Teacher, name: str) -> None:
    """Raises UserError if stored images are smaller than a teacher's input.

    Larger ones are resized on the device; enlarged pixels would make it another teacher.
    """
    stored, needed = info.image.height, teacher.tower.image_size
    if stored < needed:
        raise UserError(
            f"the stored images have {stored} pixels, {name} takes {needed}: set "
            f"config.teachers.{name}.image_size={stored - stored % teacher.tower.patch}, or build "
            f"a store with config.image_size={needed}"
        )


def _plan(store, name: str, view: int, split: tfds_dataset.Split) -> list[ShardPlan]:
    """The shards of a view, as long as the store's."""
    lengths = [shard.take for shard in split.shards]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    directory = further_teachers.path_of(store, name)
    return [
        ShardPlan(
            tfds_dataset.shard_path(
                directory, token_store.view_split(view), i, len(lengths), name.lower()
            ),
            view,
            range(starts[i], starts[i + 1]),
        )
        for i in range(len(lengths))
    ]


def _stored_view(splits: list[tfds_dataset.Split], view: int, index: int) -> StoredView:
    """A stored example, its image decoded. Raises UserError if it is damaged."""
    try:
        example = splits[view][index]
        return StoredView(example["id"], bad_records.decode_image(splits[view], index, example))
    except BadRecord as e:
        raise UserError(f"{e}: repair the store first, by the command that built it") from None


def _check_or_create(
    config: TokensConfig,
    store: AnyPath,
    name: str,
    splits: list[tfds_dataset.Split],
    teacher: Teacher,
    pool: ThreadPoolExecutor,
) -> None:
    """Checks that existing tokens match the config, or writes the metadata of new ones.

    A store to which views were added since is extended. Raises UserError.
    """
    settings, directory = config.teachers[name], further_teachers.path_of(store, name)
    views = tuple(split.digest for split in splits)
    if not (directory / further_teachers.FILE).exists():
        info, basis = _describe(config, name, splits, teacher, pool, views)
        if basis is not None:
            teacher_info.save_basis(directory, basis)
        info.save(directory)  # before the shards: another teacher must not be mixed in
        return
    old = further_teachers.load(store, name)
    weights, new = old.teacher.weights, teacher_info.as_json(teacher.describe())
    pairs = {f"weights' {key}": (weights[key], new[key]) for key in ("hash", "dtype", "tower")}
    pairs["codec"] = (old.teacher.codec, settings.codec)
    pairs["pca"] = (old.teacher.width if old.teacher.is_reduced else None, settings.pca)
    pairs["views of the store"] = (old.views, views[: len(old.views)])
    for key, (stored, value) in pairs.items():
        if stored != value:
            raise UserError(
                f"{directory} was built with {key} {stored}, not {value}: choose another name, or "
                f"remove that directory"
            )
    if len(views) > len(old.views):
        dataclasses.replace(old, views=views).save(directory)


def _describe(
    config: TokensConfig, name: str, splits, teacher: Teacher, pool, views
) -> tuple[FurtherTeacher, np.ndarray | None]:
    """Returns (metadata, PCA basis or None), measured on a sample of view 0."""
    stored = list(
        pool.map(partial(_stored_view, splits, 0), token_statistics.sample_of(len(splits[0])))
    )
    settings, other = config.teachers[name], config.codec_from
    measured = encoding.measure(
        name,
        teacher,
        np.stack([view.image for view in stored]),
        codec=settings.codec,
        pca=settings.pca,
        codec_from=other,
        other=further_teachers.open_directory(other, name) if other else None,
    )
    size = float(measured.bytes + writer.OVERHEAD)
    command = invocation.command_line()
    return FurtherTeacher(measured.info, views, size, command, __version__), measured.codec.basis


def _finish(
    directory: epath.Path, info: FurtherTeacher, splits: list, planned: list[ShardPlan]
) -> None:
    """Writes TFDS's metadata and the manifest."""
    infos = array_record_shards.shard_infos(directory)
    array_record_shards.write_manifest(directory, infos)
    written = {
        token_store.view_split(view): [infos[s.path.name] for s in planned if s.view == view]
        for view in range(len(splits))
    }
    features = further_teachers.features(info)
    tfds_dataset.write_metadata(directory, features, written, info.teacher.name.lower())
    codec = info.teacher.load_codec(directory)
    token_statistics.measure_store(directory, token_store.view_split(0), codec)
