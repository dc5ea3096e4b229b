"""Further teachers of a token store: the tokens of each in a directory of its own.

`STORE/teachers/NAME` is a TFDS directory with the splits, shard lengths and order of the store;
example i of a split is {id, tokens} of example i of the store. `teacher.json`, FurtherTeacher, is
written before its first shard, TFDS's own metadata after the last.
"""

import dataclasses
import json
from dataclasses import dataclass

import tensorflow_datasets as tfds
from etils import epath

from dgpt_jax import invocation
from dgpt_jax.config.schema import parse
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.errors import UserError, one_line
from dgpt_jax.storage import atomic, tfds_dataset
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


def require_finished(store: AnyPath, name: str) -> None:
    """Raises UserError, with the command that resumes it, if a teacher's tokens are unfinished."""
    if not (path_of(store, name) / "dataset_info.json").exists():
        command = load(store, name).command
        raise UserError(f"{path_of(store, name)} is unfinished; finish it with: {command}")


def open_directory(store: AnyPath, name: str) -> tuple[TeacherInfo, epath.Path]:
    """Returns (metadata, directory) of a finished further teacher.

    Raises UserError if it is absent, unfinished, or made from other contents of the store.
    """
    info, directory = load(store, name), path_of(store, name)
    require_finished(store, name)
    opened = tfds_dataset.Opened(store)
    views = list(opened.builder.info.splits)[: len(info.views)]
    for view, digest in zip(views, info.views, strict=False):
        if tfds_dataset.Split(store, view, opened).digest != digest:
            raise UserError(
                f"{directory} has the tokens of other contents of {store}, {view}: remove the "
                f"directory, and add the teacher again: {info.command}"
            )
    return info.teacher, directory
