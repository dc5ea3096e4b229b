"""Pretraining: D-iGPT on stored tokens or with an online teacher, or iGPT on pixels."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax

from dgpt_jax import invocation
from dgpt_jax.config import TrainConfig
from dgpt_jax.config.data import DataConfig
from dgpt_jax.data import (
    dataset,
    further_teachers,
    segments,
    token_codec,
    token_store,
)
from dgpt_jax.errors import UserError
from dgpt_jax.models import digpt, flops, teacher_vit, vit
from dgpt_jax.training import initial_weights, layerwise, optimizer
from dgpt_jax.training.tasks.base import Batch
from dgpt_jax.training.tasks.targets import (
    Target,
    absent_targets,
    active_teachers,
    from_json,
    loss_weights,
    online_target,
    stored_targets,
    to_json,
)
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
        targets: Mapping[str, Target],
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
        self.targets = targets
        self.examples: Any = examples
        self.teacher = teacher
        self.notes = notes
        self.frozen: dict[str, Any] = teacher.params if teacher else {}
        self.weights = loss_weights(config)
        self.metric_names: tuple[str, ...] = (*self.weights, "loss", "grad_norm")
        self.heads: tuple[str, ...] = tuple(config.loss.by_head())
        widths = {name: target.width for name, target in targets.items()}
        self.out_width: int | None = widths.pop("", None)
        self.further_widths: dict[str, int] = widths
        self.module: Any = digpt.build(
            config.model,
            out_width=self.out_width,
            further=widths,
            decoders=self.heads,
            dtype=config.dtype,
        )

    @property
    def target(self) -> Target:
        """The targets of the first teacher that is trained on."""
        return next(iter(self.targets.values()))

    def abstract_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        size = self.config.model.image_size
        example = {
            "image": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
            "order": jax.ShapeDtypeStruct((segments.count(self.config.model.segments),), np.int32),
        }
        for name, target in self.targets.items():
            if (codec := target.codec) is not None:
                width = token_codec.stored_width(codec.name, target.width)
                shape, dtype = (target.tokens, width), token_codec.CODECS[codec.name]
                example[feature_of(name)] = jax.ShapeDtypeStruct(shape, dtype)
        return example

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, a nested dict."""
        return self.module.init(key, *digpt.dummy_inputs(self.config.model))["params"]

    def initial_weights(self) -> initial_weights.InitialWeights:
        """Reads config.init.weights. Raises UserError."""
        return initial_weights.for_pretraining(
            self.config, decoders=self.heads, out_width=self.out_width or 0
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
            out_width=self.out_width,
            further=tuple(self.further_widths.values()),
            decoders=self.heads,
            teacher=self.teacher and self.teacher.tower,
        )

    def replay_metadata(self) -> dict[str, Any]:
        """The targets, for `task_from_dump`."""
        metadata = {name: to_json(target) for name, target in self.targets.items()}
        return {"targets": metadata}

    def loss(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Batch]:
        """(weighted sum, {prediction: (B,)}): the losses by decoder and teacher."""
        model, order_BS = self.config.model, batch["order"]
        images = vit.normalize(batch["image"], self.config.data.mean, self.config.data.std)
        predictions = self.module.apply({"params": params}, images, order_BS)
        if self.config.data.targets == "pixels":
            losses = digpt.pixel_losses(
                predictions, images, order_BS, patch=model.patch, segment_grid=model.segments
            )
        else:
            losses = {}
            for name, target in self.targets.items():
                by_head = digpt.token_losses(
                    {head: predictions[digpt.join(head, name)] for head in self.heads},
                    jax.lax.stop_gradient(self.tokens(frozen, batch, name)),
                    order_BS,
                    grid=(model.grid, model.grid),
                    segment_grid=model.segments,
                    cls=target.cls,
                )
                losses |= {digpt.join(head, name): loss for head, loss in by_head.items()}
        total: Any = sum(weight * losses[name].mean() for name, weight in self.weights.items())
        return total, losses

    def tokens(self, frozen: Any, batch: Batch, name: str) -> jax.Array:
        """The tokens of a batch by a teacher, (B, [1+]N, C), decoded or computed."""
        if self.teacher is not None:
            tower, dtype = self.teacher.tower, self.config.teacher.dtype
            return teacher_vit.teacher_tokens(tower, frozen, batch["image"], dtype=dtype)
        return self.targets[name].decode(batch[feature_of(name)])

    def heldout(self) -> tuple[Callable[[int], Batch], int]:
        """(load, length) of the held-out examples, with one fixed view and order each.

        Raises UserError if a held-out store has another codec than the training store.
        """
        config = self.config
        data = replace(
            config.data, path=config.evals.heldout, split=config.evals.heldout_split, views=None,
            examples=None, workers=0,
        )  # fmt: skip
        if data.targets == "stored":
            other = replace(config, data=replace(data, source=""))
            for name, heldout in stored_targets(other, self.targets).items():
                codec = self.targets[name].codec
                if heldout.codec is None or codec is None or not heldout.codec.equals(codec):
                    raise UserError(
                        f"{data.path} (config.evals.heldout) has another codec, scale or basis "
                        f"{f'of {name} ' * bool(name)}than {config.data.path}: build it with "
                        f"--config.codec_from={config.data.path}"
                    )
        examples = _open_examples(config, data)
        return lambda index: examples(int(index), int(index)), len(examples)


def open_pretrain(config: TrainConfig) -> PretrainTask:
    """The task with its data and its teacher. Raises UserError if they do not match the config."""
    notes: tuple[str, ...] = ()
    teacher = load_teacher(config)
    examples = _open_examples(config, config.data)
    if config.data.targets == "stored":
        targets = stored_targets(config)
        size = token_store.StoreInfo.load(config.data.path).image.height
        if size != config.model.image_size:
            to = config.model.image_size
            notes = (f"{config.data.path}: images of {size} px are resized to {to}",)
    else:
        targets = {"": online_target(config, teacher)}
    notes += teacher.notes if teacher else ()
    return PretrainTask(config, targets, examples=examples, teacher=teacher, notes=notes)


def _open_examples(config: TrainConfig, data: DataConfig) -> dataset.ExampleDataset:
    """The examples of `data` with the tokens of the config's teachers. Raises UserError."""
    names = list(active_teachers(config)) if data.targets == "stored" else [""]
    return dataset.open_examples(
        data, config.model, config.seed, first="" in names, teachers=[n for n in names if n]
    )


def feature_of(name: str) -> str:
    """Name of a teacher's tokens in an example; "" is the first teacher."""
    return further_teachers.feature_name(name) if name else "tokens"


def task_without_data(config: TrainConfig) -> PretrainTask:
    """The task without its data; an absent store is assumed to hold int8 tokens of the config's
    teacher. Raises UserError if config.teacher.width and grid are needed and not set."""
    teacher = load_teacher(config)
    if config.data.targets != "stored":
        return PretrainTask(config, {"": online_target(config, teacher)}, teacher=teacher)
    exists = token_store.exists(config.data.path)
    return PretrainTask(config, stored_targets(config) if exists else absent_targets(config))


def task_from_dump(config: TrainConfig, metadata: dict[str, Any]) -> PretrainTask:
    """The task of a dumped step. Raises UserError."""
    dumped = metadata.get("targets") or {"": metadata["target"]}  # of one teacher, up to 0.2
    targets = {name: from_json(target) for name, target in dumped.items()}
    return PretrainTask(config, targets, teacher=load_teacher(config))


def load_teacher(config: TrainConfig) -> teacher_loading.Loaded | None:
    """The teacher that runs within the step, or None. Raises UserError."""
    if config.data.targets != "online":
        return None
    return teacher_loading.load_configured(config.teacher)
