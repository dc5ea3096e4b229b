"""The pretraining task: D-iGPT on stored tokens, on a live teacher, or iGPT on pixels."""

from dataclasses import dataclass, replace

import jax

from dgpt_jax import clip, digpt, pipeline, records, token_codec, vit
from dgpt_jax.config import Train
from dgpt_jax.convert import clip as clip_weights
from dgpt_jax.schema import UserError


@dataclass(frozen=True)
class Target:
    """What is predicted: width C, the teacher's square grid, its CLS token, its channel scale."""

    width: int
    grid: tuple[int, int]
    cls: bool
    channel_scale: tuple[float, ...] = ()


class Pretrain:
    """What pretraining adds to the loop. `frozen` are weights that the step reads, not trains."""

    def __init__(self, config: Train):
        self.config = config
        self.examples = pipeline.open_examples(config.data, config.model, config.seed)
        self.frozen = {}
        self.notes: tuple[str, ...] = ()
        targets = config.data.targets
        if targets == "stored":
            self.target = stored_target(config)
            stored = records.StoreInfo.load(config.data.path).picture_size
            size = config.model.image_size
            if stored != size:
                self.notes = (f"{config.data.path}: pictures of {stored} px are resized to {size}",)
        elif targets == "online":
            self.target = self._load_teacher()
        else:
            grid = (config.model.grid,) * 2
            self.target = Target(3 * config.model.patch**2, grid, cls=False)
        weights = {"next": config.loss.next, "visible": config.loss.visible}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.metric_names = (*self.weights, "loss", "grad_norm")
        self.module = digpt.build(
            config.model,
            out_width=self.target.width,
            decoders=tuple(self.weights),
            dtype=config.dtype,
        )

    def _load_teacher(self) -> Target:
        teacher = self.config.teacher
        loaded = clip_weights.load(
            teacher.weights,
            image_size=teacher.image_size,
            heads=teacher.heads,
            activation=teacher.activation,
        )
        self.notes = loaded.notes
        self.frozen = loaded.params
        self._tower = loaded.tower
        return Target(loaded.tower.out_width, loaded.tower.grid, cls=True)

    def init(self, key):
        """Initial parameters, a nested dict."""
        return self.module.init(key, *digpt.dummy_inputs(self.config.model))["params"]

    def loss(self, params, frozen, batch):
        """(scalar, {"next", "visible": (B,)}): the weighted sum and its parts."""
        model, pictures, order_BS = self.config.model, batch["image"], batch["order"]
        images = vit.normalise(pictures)
        predictions = self.module.apply({"params": params}, images, order_BS)
        if self.config.data.targets == "pixels":
            parts = digpt.pixel_losses(
                predictions, images, order_BS, patch=model.patch, segment_grid=model.segments
            )
        else:
            if self.config.data.targets == "online":
                dtype = self.config.teacher.dtype
                tokens = clip.teacher_tokens(self._tower, frozen, pictures, dtype=dtype)
            else:
                tokens = token_codec.decode(batch["tokens"], self.target.channel_scale)
            parts = digpt.token_losses(
                predictions,
                jax.lax.stop_gradient(tokens),
                order_BS,
                grid=(model.grid, model.grid),
                segment_grid=model.segments,
                cls=self.target.cls,
            )
        total = sum(weight * parts[name].mean() for name, weight in self.weights.items())
        return total, parts

    def heldout(self):
        """(load, length) of the held-out examples: one fixed view and order each."""
        config = self.config
        data = replace(
            config.data, path=config.evals.heldout, split=config.evals.heldout_split, views=None
        )
        examples = pipeline.open_examples(data, config.model, config.seed)
        if data.targets == "stored":
            stored_target(replace(config, data=data), expected=self.target)
        return lambda index: examples(int(index), int(index)), len(examples)


def stored_target(config: Train, expected: Target | None = None) -> Target:
    """The Target of the token store of a config, checked against what the config expects."""
    info = records.StoreInfo.load(config.data.path)
    wanted = {
        "width": expected.width if expected else config.teacher.width,
        "grid": expected.grid[0] if expected else config.teacher.grid,
    }
    found = {"width": info.width, "grid": info.grid[0]}
    for name, value in wanted.items():
        if value is not None and value != found[name]:
            raise UserError(
                f"{config.data.path} holds teacher tokens of {name} {found[name]}, the config "
                f"expects {value} (config.teacher.{name})"
            )
    return Target(info.width, info.grid, info.cls, info.channel_scale)
