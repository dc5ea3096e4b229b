"""Pretraining: D-iGPT on stored tokens or with an online teacher, or iGPT on pixels."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from dgpt_jax import invocation
from dgpt_jax.config import TrainConfig
from dgpt_jax.data import dataset, segments, token_codec, token_store
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.errors import UserError
from dgpt_jax.models import digpt, flops, teacher_vit, vit
from dgpt_jax.training import initial_weights, layerwise, optimizer
from dgpt_jax.training.tasks.base import Batch
from dgpt_jax.training.tasks.targets import Target, online_target, stored_target
from dgpt_jax.weights import teacher_loading


class PretrainTask:
    """A base.Task. `open_pretrain` makes one with its data, `task_without_data` one without.

    teacher: computes the targets within the step; None for stored tokens and pixels.
    """

    prepare: None = None
    frozen_identity: Mapping[str, str] | None = None
    independent: bool = True

    def __init__(
        self,
        config: TrainConfig,
        target: Target,
        *,
        examples: dataset.ExampleDataset | None = None,
        teacher: teacher_loading.Loaded | None = None,
        notes: tuple[str, ...] = (),
    ):
        evaluate = f"{invocation.command('evaluate')} --config=knn_in1k"
        self.config = config
        self.next_command = f"{evaluate} --checkpoint={{workdir}} --config.data=IMAGES"
        if examples is not None and examples.sources.splits[0].label is None:  # nothing to score
            export = invocation.command("convert")
            self.next_command = f"{export} {{workdir}} EXPORT --to=timm"
        self.target = target
        self.examples: Any = examples
        self.teacher = teacher
        self.notes = notes
        self.frozen: dict[str, Any] = teacher.params if teacher else {}
        self.weights = config.loss.by_head()
        self.metric_names: tuple[str, ...] = (*self.weights, "loss", "grad_norm")
        self.module: Any = digpt.build(
            config.model, out_width=target.width, decoders=tuple(self.weights), dtype=config.dtype
        )

    @property
    def codec(self) -> Codec:
        """The codec of stored tokens."""
        assert self.target.codec is not None, "there are no stored tokens"
        return self.target.codec

    def abstract_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        size, target = self.config.model.image_size, self.target
        example = {
            "image": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
            "order": jax.ShapeDtypeStruct((segments.count(self.config.model.segments),), np.int32),
        }
        if self.config.data.targets == "stored":
            dtype = token_codec.CODECS[self.codec.name]
            width = token_codec.stored_width(self.codec.name, target.width)
            example["tokens"] = jax.ShapeDtypeStruct((target.tokens, width), dtype)
        return example

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, a nested dict."""
        return self.module.init(key, *digpt.dummy_inputs(self.config.model))["params"]

    def initial_weights(self) -> initial_weights.InitialWeights:
        """Reads config.init.weights. Raises UserError."""
        return initial_weights.for_pretraining(
            self.config, decoders=tuple(self.weights), out_width=self.target.width
        )

    def optimizer(
        self, rate: optax.Schedule, freeze_steps: int = 0
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the config with a learning-rate schedule."""
        config = self.config
        layers = layerwise.layer_ids(config.model.depth) if config.optim.layer_decay != 1 else None
        frozen = layerwise.frozen_by_config(config, freeze_steps)
        return optimizer.optimizer(config.optim, rate, layers=layers, frozen=frozen)

    def model_flops(self) -> float:
        """FLOPs per image of a train step, by flops.FORMULA."""
        return flops.step_flops(
            self.config.model,
            out_width=self.target.width,
            decoders=tuple(self.weights),
            teacher=self.teacher and self.teacher.tower,
        )

    def replay_metadata(self) -> dict[str, Any]:
        """The Target, for `task_from_dump`."""
        target, codec = self.target, self.target.codec
        metadata = {"width": target.width, "grid": target.grid, "cls": target.cls}
        if codec is not None:
            metadata["codec"] = {"name": codec.name, "scale": codec.scale.tolist()}
        return {"target": metadata}

    def loss(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Batch]:
        """(weighted sum, {"next", "visible", "direct": (B,)}): the losses by decoder."""
        model, order_BS = self.config.model, batch["order"]
        images = vit.normalize(batch["image"], self.config.data.mean, self.config.data.std)
        predictions = self.module.apply({"params": params}, images, order_BS)
        if self.config.data.targets == "pixels":
            losses = digpt.pixel_losses(
                predictions, images, order_BS, patch=model.patch, segment_grid=model.segments
            )
        else:
            losses = digpt.token_losses(
                predictions,
                jax.lax.stop_gradient(self.tokens(frozen, batch)),
                order_BS,
                grid=(model.grid, model.grid),
                segment_grid=model.segments,
                cls=self.target.cls,
            )
        total: Any = sum(weight * losses[name].mean() for name, weight in self.weights.items())
        return total, losses

    def tokens(self, frozen: Any, batch: Batch) -> jax.Array:
        """The teacher's tokens of a batch, (B, [1+]N, C), decoded or computed."""
        if self.teacher is not None:
            tower, dtype = self.teacher.tower, self.config.teacher.dtype
            return teacher_vit.teacher_tokens(tower, frozen, batch["image"], dtype=dtype)
        return self.codec.decode(batch["tokens"])

    def heldout(self) -> tuple[Callable[[int], Batch], int]:
        """(load, length) of the held-out examples, with one fixed view and order each.

        Raises UserError if a held-out store has another codec than the training store.
        """
        config = self.config
        data = replace(
            config.data, path=config.evals.heldout, split=config.evals.heldout_split, views=None,
            examples=None, workers=0,
        )  # fmt: skip
        examples = dataset.open_examples(data, config.model, config.seed)
        if data.targets == "stored":
            heldout = stored_target(replace(config, data=replace(data, source="")), self.target)
            if heldout.codec is None or not heldout.codec.equals(self.codec):
                raise UserError(
                    f"{data.path} (config.evals.heldout) has another codec, scale or basis than "
                    f"{config.data.path}: build it with --config.codec_from={config.data.path}"
                )
        return lambda index: examples(int(index), int(index)), len(examples)


def open_pretrain(config: TrainConfig) -> PretrainTask:
    """The task with its data and its teacher. Raises UserError if they do not match the config."""
    examples = dataset.open_examples(config.data, config.model, config.seed)
    notes: tuple[str, ...] = ()
    teacher = load_teacher(config)
    if config.data.targets == "stored":
        target = stored_target(config)
        size = token_store.StoreInfo.load(config.data.path).image.height
        if size != config.model.image_size:
            to = config.model.image_size
            notes = (f"{config.data.path}: images of {size} px are resized to {to}",)
    else:
        target = online_target(config, teacher)
    notes += teacher.notes if teacher else ()
    return PretrainTask(config, target, examples=examples, teacher=teacher, notes=notes)


def task_without_data(config: TrainConfig) -> PretrainTask:
    """The task without its data; an absent store is assumed to hold int8 tokens of the config's
    teacher. Raises UserError if config.teacher.width and grid are needed and not set."""
    teacher = load_teacher(config)
    if config.data.targets != "stored":
        return PretrainTask(config, online_target(config, teacher), teacher=teacher)
    if token_store.exists(config.data.path):
        return PretrainTask(config, stored_target(config))
    width, grid = config.teacher.width, config.teacher.grid
    if width is None or grid is None:
        raise UserError(
            f"{config.data.path} does not exist: set config.teacher.width and config.teacher.grid "
            f"to those of the tokens that it will hold"
        )
    return PretrainTask(config, Target(width, (grid, grid), True, Codec("int8", np.zeros(0))))


def task_from_dump(config: TrainConfig, metadata: dict[str, Any]) -> PretrainTask:
    """The task of a dumped step. Old dumps have no codec: their tokens are decoded floats, which
    the float16 codec passes through."""
    target = metadata["target"]
    codec = target.get("codec", {"name": "float16", "scale": []})
    codec = Codec(codec["name"], np.array(codec["scale"], np.float32))
    target = Target(target["width"], tuple(target["grid"]), target["cls"], codec)
    return PretrainTask(config, target, teacher=load_teacher(config))


def load_teacher(config: TrainConfig) -> teacher_loading.Loaded | None:
    """The teacher that runs within the step, or None. Raises UserError."""
    if config.data.targets != "online":
        return None
    return teacher_loading.load_configured(config.teacher)
