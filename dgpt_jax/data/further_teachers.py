"""Further teachers of a token store: the tokens of each in a directory of its own.

`STORE/teachers/NAME` is a TFDS directory with the splits, shard lengths and order of the store;
example i of a split is {id, tokens} of example i of the store. `teacher.json`, FurtherTeacher, is
written before its first shard, TFDS's own metadata after the last.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsInt

import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.config.schema import parse
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import atomic, shard_records, tfds_dataset
from dgpt_jax.storage.gcs import AnyPath

DIRECTORY, FILE = "teachers", "teacher.json"
FORMAT = 3


@dataclass(frozen=True)
class FurtherTeacher:
    """Metadata of a further teacher's directory.

    views: digest of each view of the store that its tokens belong to. example_bytes, command,
    code_version: as in token_store.StoreInfo.
    """

    teacher: TeacherInfo
    views: tuple[str, ...]
    example_bytes: float
    command: str
    code_version: str
    format: int = FORMAT

    def save(self, directory: AnyPath) -> None:
        """Writes the JSON atomically."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        atomic.write_text(epath.Path(directory) / FILE, text)


def path_of(store: AnyPath, name: str) -> epath.Path:
    """Returns the directory of a further teacher."""
    return epath.Path(store) / DIRECTORY / name


def names(store: AnyPath) -> list[str]:
    """Returns the names of a store's further teachers, unfinished ones included, sorted."""
    root = epath.Path(store) / DIRECTORY
    if not root.exists():
        return []
    return sorted(path.name for path in root.iterdir() if (path / FILE).exists())


def load(store: AnyPath, name: str) -> FurtherTeacher:
    """Reads a further teacher's metadata. Raises UserError if there is none, or it is damaged."""
    path = path_of(store, name) / FILE
    if not path.exists():
        known = ", ".join(names(store)) or "none"
        raise UserError(
            f"{store} has no tokens of a teacher {name} (beside its first it has {known}): add "
            f"them with `{invocation.command('tokens')} --config.teachers.{name}.weights=… "
            f"--only={name} --out={store}`"
        )
    values = atomic.read_json(path, "teacher")
    try:
        if values["format"] != FORMAT:
            raise UserError(f"format {values['format']}, this code reads format {FORMAT}")
        info = parse(FurtherTeacher, values, str(path))
    except (UserError, ValueError, TypeError, KeyError) as e:
        reason = e if isinstance(e, UserError) else f"{type(e).__name__}: {one_line(e)}"
        raise UserError(f"{path} is damaged, or written by a newer version: {reason}") from None
    info.teacher.require_scales(path)
    return info


def features(info: FurtherTeacher) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a further teacher's examples."""
    return tfds.features.FeaturesDict(
        {"id": tfds.features.Text(), "tokens": info.teacher.feature()}
    )


def load_finished(store: AnyPath, name: str) -> tuple[TeacherInfo, epath.Path]:
    """Returns (metadata, directory) of a further teacher. Raises UserError if it is absent or, with
    the command that resumes it, unfinished."""
    info, directory = load(store, name), path_of(store, name)
    if not (directory / "dataset_info.json").exists():
        raise UserError(f"{directory} is unfinished; finish it with: {info.command}")
    return info.teacher, directory


def open_directory(store: AnyPath, name: str) -> tuple[TeacherInfo, epath.Path]:
    """Returns what `load_finished` does. Raises UserError also if the tokens are of other contents
    of the store: compares the digests of all views.
    """
    teacher, directory = load_finished(store, name)
    info = load(store, name)
    opened = tfds_dataset.Opened(store)
    views = list(opened.builder.info.splits)[: len(info.views)]
    for view, digest in zip(views, info.views, strict=False):
        if tfds_dataset.Split(store, view, opened).digest != digest:
            raise UserError(
                f"{directory} has the tokens of other contents of {store}, {view}: remove the "
                f"directory, and add the teacher again: {info.command}"
            )
    return teacher, directory


def feature_name(name: str) -> str:
    """Returns the name of a further teacher's tokens in a joined example."""
    return f"tokens_{name}"


class JoinedSplit(tfds_dataset.Split):
    """A split of a token store with the tokens of further teachers.

    An example has `feature_name(NAME)` besides. Raises UserError if the shards of a teacher have
    other lengths than the store's, or an example another id.
    """

    def __init__(self, store: tfds_dataset.Split, teachers: dict[str, tfds_dataset.Split]):
        self.__dict__.update(store.__dict__)
        self._teachers = teachers
        lengths = [shard.take for shard in store.shards]
        for split in teachers.values():
            if [shard.take for shard in split.shards] != lengths:
                raise UserError(f"{split} has shards of other lengths than {store}: build it again")
        self.digest = " ".join(
            [store.digest, *(f"{name} {split.digest}" for name, split in sorted(teachers.items()))]
        )

    def __getitem__(self, index: SupportsInt) -> dict:
        example = super().__getitem__(index)
        for name, split in self._teachers.items():
            other = split[index]
            if other["id"] != example["id"]:
                raise UserError(  # of the whole shard: not a record to skip
                    f"{split}, example {index}: its id is {other['id']}, in the store it is "
                    f"{example['id']}: `{invocation.command('verify')} --teacher={name}` finds the "
                    f"shards that do not belong to the store"
                )
            example[feature_name(name)] = other["tokens"]
        return example

    def files_of(self, shard: int) -> list[shard_records.Shard]:
        """Returns the files that the examples of a shard are read from."""
        return [self.shards[shard], *(split.shards[shard] for split in self._teachers.values())]

    def close(self) -> None:
        """Closes the files once no thread reads from them; the next read opens them again."""
        super().close()
        for split in self._teachers.values():
            split.close()


def join_splits(
    store: AnyPath, splits: Sequence[tfds_dataset.Split], teachers: Sequence[str]
) -> list[JoinedSplit]:
    """Returns the splits (views) of a store with the tokens of further teachers. Raises UserError
    if one of them is absent, unfinished, of other contents, or of fewer views."""
    directories = {name: open_directory(store, name)[1] for name in teachers}
    cache = splits[0].cache or ""  # one for all files of the process
    opened = {name: tfds_dataset.Opened(path, cache) for name, path in directories.items()}
    return [
        JoinedSplit(
            split,
            {
                name: tfds_dataset.Split(path, split.split, opened[name])
                for name, path in directories.items()
            },
        )
        for split in splits
    ]
