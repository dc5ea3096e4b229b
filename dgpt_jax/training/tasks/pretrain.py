"""The pretraining task: D-iGPT on stored tokens, on a live teacher, or iGPT on pixels."""

from dataclasses import asdict, dataclass, replace

import jax
import numpy as np

from dgpt_jax import (
    digpt,
    flops,
    optim,
    pipeline,
    segments,
    token_codec,
    token_store,
    towers,
    vit,
)
from dgpt_jax.config import Train
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.schema import UserError
from dgpt_jax.token_codec import Codec


@dataclass(frozen=True)
class Target:
    """What is predicted: width C, the teacher's square grid, its CLS token; how it is stored."""

    width: int
    grid: tuple[int, int]
    cls: bool
    codec: Codec | None = None

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1] + self.cls


class Pretrain:
    """What pretraining adds to the loop. `frozen` are weights that the step reads, not trains.

    `open_pretrain` makes one with its data, `planned` one without.
    """

    prepare = None
    independent = True
    then = "python -m dgpt_jax.evaluate --config=configs/knn_in1k.py --checkpoint={workdir}"

    def __init__(self, config: Train, target: Target, *, examples=None, teacher=None, notes=()):
        """examples: pipeline.Examples; teacher: a loaded tower that runs within the step."""
        self.config = config
        self.target = target
        self.examples = examples
        self.teacher = teacher
        self.notes = notes
        self.frozen = teacher.params if teacher else {}
        self.given: dict = {}
        self.weights = {name: weight for name, weight in asdict(config.loss).items() if weight}
        self.metric_names = (*self.weights, "loss", "grad_norm")
        self.module = digpt.build(
            config.model, out_width=target.width, decoders=tuple(self.weights), dtype=config.dtype
        )

    def abstract_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        size, target = self.config.model.image_size, self.target
        example = {
            "image": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
            "order": jax.ShapeDtypeStruct((segments.count(self.config.model.segments),), np.int32),
        }
        if self.config.data.targets == "stored":
            dtype = token_codec.CODECS[target.codec.name]
            width = token_codec.stored_width(target.codec.name, target.width)
            example["tokens"] = jax.ShapeDtypeStruct((target.tokens, width), dtype)
        return example

    def init(self, key):
        """Initial parameters, a nested dict."""
        return self.module.init(key, *digpt.dummy_inputs(self.config.model))["params"]

    def optimizer(self, rate):
        """The optimizer of the config at a schedule."""
        return optim.optimizer(self.config.optim, rate)

    def model_flops(self) -> float:
        """FLOPs of an image in a step, by flops.FORMULA."""
        return flops.step_flops(
            self.config.model,
            out_width=self.target.width,
            decoders=tuple(self.weights),
            teacher=self.teacher and self.teacher.tower,
        )

    def told(self) -> dict:
        """What `replayed` needs beside the config."""
        target, codec = self.target, self.target.codec
        metadata = {"width": target.width, "grid": target.grid, "cls": target.cls}
        if codec is not None:
            metadata["codec"] = {"name": codec.name, "scale": codec.scale.tolist()}
        return {"target": metadata}

    def loss(self, params, frozen, batch):
        """(scalar, {"next", "visible", "direct": (B,)}): the weighted sum and its parts."""
        model, pictures, order_BS = self.config.model, batch["image"], batch["order"]
        images = vit.normalise(pictures)
        predictions = self.module.apply({"params": params}, images, order_BS)
        if self.config.data.targets == "pixels":
            parts = digpt.pixel_losses(
                predictions, images, order_BS, patch=model.patch, segment_grid=model.segments
            )
        else:
            parts = digpt.token_losses(
                predictions,
                jax.lax.stop_gradient(self.tokens(frozen, batch)),
                order_BS,
                grid=(model.grid, model.grid),
                segment_grid=model.segments,
                cls=self.target.cls,
            )
        total = sum(weight * parts[name].mean() for name, weight in self.weights.items())
        return total, parts

    def tokens(self, frozen, batch):
        """The teacher's tokens of a batch, (B, [1+]N, C), stored or made."""
        if self.config.data.targets == "online":
            tower, dtype = self.teacher.tower, self.config.teacher.dtype
            return towers.teacher_tokens(tower, frozen, batch["image"], dtype=dtype)
        return self.target.codec.decode(batch["tokens"])

    def heldout(self):
        """(load, length) of the held-out examples: one fixed view and order each."""
        config = self.config
        data = replace(
            config.data, path=config.evals.heldout, split=config.evals.heldout_split, views=None,
            examples=None, workers=0,
        )  # fmt: skip
        examples = pipeline.open_examples(data, config.model, config.seed)
        if data.targets == "stored":
            found = stored_target(replace(config, data=replace(data, source="")), self.target)
            if not found.codec.equals(self.target.codec):
                raise UserError(
                    f"{data.path} (config.evals.heldout) has another codec, scale or basis than "
                    f"{config.data.path}: build it with --config.like={config.data.path}"
                )
        return lambda index: examples(int(index), int(index)), len(examples)


def open_pretrain(config: Train) -> Pretrain:
    """The task with its data and its teacher. Raises UserError where they do not fit the config."""
    examples = pipeline.open_examples(config.data, config.model, config.seed)
    notes: tuple[str, ...] = ()
    teacher = load_teacher(config)
    if config.data.targets == "stored":
        target = stored_target(config)
        stored, size = (
            token_store.StoreInfo.load(config.data.path).picture_size,
            config.model.image_size,
        )
        if stored != size:
            notes = (f"{config.data.path}: pictures of {stored} px are resized to {size}",)
    else:
        target = live_target(config, teacher)
    notes += teacher.notes if teacher else ()
    return Pretrain(config, target, examples=examples, teacher=teacher, notes=notes)


def planned(config: Train) -> Pretrain:
    """The task without its data: what is stored is taken to be what the config expects, as int8."""
    teacher = load_teacher(config)
    if config.data.targets != "stored":
        return Pretrain(config, live_target(config, teacher), teacher=teacher)
    if token_store.exists(config.data.path):
        return Pretrain(config, stored_target(config))
    width, grid = config.teacher.width, config.teacher.grid
    if width is None or grid is None:
        raise UserError(
            f"{config.data.path} is not there: set config.teacher.width and config.teacher.grid, "
            f"what a store of it will hold"
        )
    return Pretrain(config, Target(width, (grid, grid), True, Codec("int8", np.zeros(0))))


def replayed(config: Train, told: dict) -> Pretrain:
    """The task of a step that was written down. Older ones name no codec: their tokens are decoded
    already, which is read as float16's are."""
    target = told["target"]
    codec = target.get("codec", {"name": "float16", "scale": []})
    codec = Codec(codec["name"], np.array(codec["scale"], np.float32))
    target = Target(target["width"], tuple(target["grid"]), target["cls"], codec)
    return Pretrain(config, target, teacher=load_teacher(config))


def load_teacher(config: Train):
    """The loaded tower that runs within the step, or None. Raises UserError."""
    if config.data.targets != "online":
        return None
    return teacher_weights.load_configured(config.teacher)


def live_target(config: Train, teacher) -> Target:
    """The Target of a teacher within the step, or of pixels."""
    if teacher:
        tower = teacher.tower
        return Target(tower.token_width, tower.grid, cls=tower.cls)
    return Target(3 * config.model.patch**2, (config.model.grid,) * 2, cls=False)


def stored_target(config: Train, expected: Target | None = None) -> Target:
    """The Target of the token store of a config, checked against what the config expects."""
    info = token_store.StoreInfo.load(config.data.path)
    wanted = {
        "width": expected.width if expected else config.teacher.width,
        "grid": expected.grid[0] if expected else config.teacher.grid,
    }
    if config.data.source:
        name, _, version = config.data.source.partition(":")
        of = info.source
        if name != of["name"] or version not in ("", of["version"]):
            raise UserError(
                f"{config.data.path} is a store of {of['name']}:{of['version']}, the config "
                f"expects {config.data.source} (config.data.source)"
            )
    found = {"width": info.width, "grid": info.grid[0]}
    for name, value in wanted.items():
        if value is not None and value != found[name]:
            raise UserError(
                f"{config.data.path} holds teacher tokens of {name} {found[name]}, the config "
                f"expects {value} (config.teacher.{name})"
            )
    return Target(info.width, info.grid, info.cls, info.load_codec(config.data.path))
