"""What `pretrain` chooses from its options, the images, the teacher and the devices."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpt_jax.commands.pretrain_source import Division, Source
from dgpt_jax.config import ModelConfig, files, schema
from dgpt_jax.config.model import SIZES
from dgpt_jax.errors import UserError, counted
from dgpt_jax.planning import training_choice
from dgpt_jax.planning.training_choice import BatchChoice, Devices
from dgpt_jax.storage import disk_space
from dgpt_jax.tokens import writer

IMAGE_SIZE = 224
FEW_IMAGES = 10_000  # below which a store has 8 views instead of 4
JPEG_BYTES = 0.55  # of a stored image, per pixel (JPEG, quality 95)
CHECKPOINT_BYTES = 12  # per parameter: with both moments of AdamW
CHECKPOINTS = 3  # two are kept, while a third is written
LETTERS = tuple(dict.fromkeys(size.partition("/")[0] for size in SIZES))
# Configs by size; others have the recipe of B/16.
CONFIGS = {"H/14": "pretrain_h14_in21k"}


@dataclass(frozen=True)
class Options:
    """Arguments of `pretrain` that determine its result. None: chosen by the command."""

    folder: str
    teacher: str
    size: str = "S/16"
    epochs: int | None = None
    views: int | None = None
    batch: int | None = None
    image_size: int | None = None
    init: str | None = None
    heldout: str | None = None
    memory: float | None = None

    def __post_init__(self):
        for name in ("epochs", "views", "batch", "image_size", "memory"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UserError(f"{flag(name)}={value} is not a positive number")


def flag(name: str) -> str:
    """Returns the flag of an option."""
    return f"--{name.replace('_', '-')}" if name != "folder" else "FOLDER"


def model_fields(options: Options, teacher_size: int) -> dict[str, Any]:
    """Returns the fields of ModelConfig of a size and an image size. Raises UserError."""
    match = re.fullmatch(r"(\w+)/(\d+)", options.size)
    if not match or match[1] not in LETTERS or int(match[2]) == 0:
        raise UserError(
            f"--size={options.size} is no size: write {', '.join(LETTERS)} with a patch size in "
            f"pixels, as S/16"
        )
    letter, patch = match[1], int(match[2])
    base = options.size if options.size in SIZES else _first_size(letter)
    cell = 2 * patch  # segments are 2 × 2
    image_size = options.image_size
    if image_size is None:
        image_size = max(round(min(IMAGE_SIZE, max(teacher_size, cell)) / cell), 1) * cell
    elif image_size % cell:
        raise UserError(
            f"--image-size={image_size} is not a multiple of {cell}, two patches of "
            f"--size={options.size}: choose {max(round(image_size / cell), 1) * cell}"
        )
    fields: dict[str, Any] = {"size": base, "image_size": image_size}
    if base != options.size:
        fields["patch"] = patch
    width = SIZES[base][0]
    if width < SIZES["B/16"][0]:  # decoders as wide, relative to the encoder, as those of B/16
        fields["decoder_width"] = width * 4 // 3
        fields["decoder_heads"] = width * 4 // 3 // 32
    return fields


def _first_size(letter: str) -> str:
    return next(size for size in SIZES if size.startswith(f"{letter}/"))


@dataclass(frozen=True)
class Setup:
    """Everything that the commands depend on."""

    options: Options
    out: Path
    source: Source
    division: Division
    teacher: dict[str, Any]  # of machine_probe
    devices: Devices
    init: dict[str, Any] | None = None  # of machine_probe

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of ModelConfig that differ from the defaults. Raises UserError if initial weights
        are of another size."""
        fields = model_fields(self.options, self.teacher["image_size"])
        if self.init is None:
            return fields
        model, own = schema.parse(ModelConfig, fields), self.init["model"]
        sizes = {name: own[name] for name in ("width", "depth", "heads", "patch") if name in own}
        if any(getattr(model, name) != value for name, value in sizes.items()):
            text = ", ".join(f"{name} {value}" for name, value in sizes.items())
            raise UserError(f"--init={self.options.init} has {text}: choose its --size")
        others = {name: value for name, value in own.items() if name not in sizes}
        return fields | {n: v for n, v in others.items() if getattr(model, n) != v}

    @property
    def model(self) -> ModelConfig:
        return schema.parse(ModelConfig, self.model_fields)

    @property
    def images(self) -> str:
        """Directory of the image dataset."""
        return self.source.path if self.source.imported else f"{self.out / 'images'}"

    @property
    def views(self) -> int:
        return self.options.views or (8 if self.division.train_images < FEW_IMAGES else 4)

    @property
    def choice(self) -> BatchChoice:
        images, width = self.division.train_images, self.teacher["width"]
        return training_choice.choose(self.model, self.devices, images, width, self.options.batch)

    @property
    def epochs(self) -> int:
        images = self.division.train_images
        return self.options.epochs or training_choice.default_epochs(images, self.choice.batch)

    @property
    def steps(self) -> int:
        return self.epochs * self.division.train_images // self.choice.batch

    def lines(self) -> list[str]:
        """What was chosen, and why. Raises UserError if the training does not fit."""
        choice, model, images = self.choice, self.model, self.division.train_images
        epochs, steps = self.epochs, self.steps
        rate = _base_rate(self.config) * choice.batch / 256
        teacher = self.teacher
        why = "" if self.options.epochs else " (100, or as many as make 10,000 steps, at most 800)"
        resized = ""
        if teacher["image_size"] != model.image_size:
            resized = f", which the teacher sees resized to {teacher['image_size']}"
        return [
            *choice.lines,
            f"peak learning rate {rate:.3g}: {_base_rate(self.config):.3g} × {choice.batch} / 256",
            f"{counted(images, 'training image')}, {counted(epochs, 'epoch')}{why}: "
            f"{counted(steps, 'step')}; {counted(self.views, 'view')} per image",
            f"{self.options.size} on {model.image_size} pixels{resized}",
            self.division.line,
            training_choice.duration_line(model, self.devices, teacher["width"], epochs * images),
        ]

    @property
    def config(self) -> str:
        return CONFIGS.get(self.options.size, "pretrain_b16_in1k")

    def bytes_needed(self) -> dict[str, int]:
        """Returns the bytes that each part of the result will take on the disk."""
        teacher, division = self.teacher, self.division
        record = teacher["tokens"] * teacher["width"] + writer.OVERHEAD  # int8
        record += JPEG_BYTES * self.model.image_size**2
        views = self.views * division.train_images + division.heldout_images
        encoder, decoders = training_choice.parameters(self.model, teacher["width"])
        checkpoints = CHECKPOINTS * CHECKPOINT_BYTES * (encoder + decoders)
        return {
            "images": self.source.num_bytes,
            "tokens": round(record * views),
            "checkpoints": round(checkpoints + 4 * encoder),
        }

    def check_disk(self) -> str:
        """Returns a line with the bytes that will be written. Raises UserError if they do not fit
        beside what the directory has already."""
        needed = self.bytes_needed()
        total, present = sum(needed.values()), _size_of(self.out)
        disk_space.require(
            self.out, max(total - present, 0),
            "choose another --out, fewer --views, a smaller --size, or free some space",
        )  # fmt: skip
        parts = ", ".join(f"{name} {disk_space.size(size)}" for name, size in needed.items())
        free = disk_space.free_bytes(self.out)
        room = f"{disk_space.size(present)} are written, {disk_space.size(free or 0)} free"
        return f"disk: {parts}; {room}"


def _base_rate(config: str) -> float:
    fields: Any = files.load_config(config)
    return fields.optim.blr


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
