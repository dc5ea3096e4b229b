"""The supervised task: fine-tuning an encoder on labels, by MAE's and BEiT's recipe.

The mean of the patch tokens goes through a fresh norm and a linear head (or CLS through the final
norm); positions, which pretraining has fixed, are learned. Source: the official main_finetune.py,
models_vit.py, engine_finetune.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import class_names, flops, heads, mixing, optim, pipeline, vit
from dgpt_jax.config import Train
from dgpt_jax.convert import formats, layout
from dgpt_jax.convert import weights as weights_lib
from dgpt_jax.convert.teacher import interpolate_positions
from dgpt_jax.schema import UserError

# Of the encoder that is read and the config's, what must be equal.
SAME = ("width", "depth", "heads", "patch", "eps", "activation")


class Start(NamedTuple):
    """What training starts from: nested arrays that take the place of initial ones, where they
    come from, remarks."""

    given: dict[str, Any]
    source: str
    notes: tuple[str, ...]


FRESH = Start({}, "", ())


class Classify:
    """What classification adds to the loop. `given` are nested arrays that it starts from, `heads`
    the names of heads that are trained side by side: none.

    `open_classify` makes one with its data; without, it is a task that is planned or replayed.
    """

    then = "python tools/convert.py {workdir} DIR --to=timm"
    heads: tuple[str, ...] = ()
    independent = True

    def __init__(self, config: Train, *, examples=None, start: Start = FRESH):
        """examples: pipeline.Examples."""
        self.config = config
        self.examples = examples
        self.given, self.source, self.notes = start
        self.frozen = {}
        self.metric_names = ("loss", "grad_norm")
        told = config.classify
        self.module = heads.classifier(
            config.model, told.pooling, told.num_classes, dtype=config.dtype
        )

    def abstract_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        size = self.config.model.image_size
        return {
            "image": jax.ShapeDtypeStruct((size, size, 3), np.uint8),
            "erased": jax.ShapeDtypeStruct((4,), np.int32),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    def init(self, key):
        """Initial parameters, a nested dict."""
        size = self.config.model.image_size
        return self.module.init(key, jnp.zeros((1, size, size, 3)))["params"]

    def optimizer(self, rate):
        """The optimizer of the config at a schedule."""
        return optim.optimizer(
            self.config.optim,
            rate,
            decay=optim.FINE_TUNING_DECAY,
            layers=optim.layer_ids(self.config.model.depth),
        )

    def prepare(self, key, batch):
        """Of a whole batch what the loss gets: images (B, height, width, 3), normalised, erased and
        mixed; soft labels `target` (B, classes); `paths` (B, L, 2) of vit.drop_paths."""
        told, model = self.config.classify, self.config.model
        noise, mix, paths = jax.random.split(key, 3)
        images = vit.normalise(batch["image"])
        if told.erase:
            images = mixing.erase(noise, images, batch["erased"])
        targets = mixing.soft_labels(batch["label"], told.num_classes, told.smoothing)
        if told.mixup or told.cutmix:
            groups = len(images) // told.mix_group
            drawn = mixing.draw(mix, groups, model.image_size, mixup=told.mixup, cutmix=told.cutmix)
            images, targets = mixing.apply(drawn, images, targets)
        prepared = {"image": images.astype(self.config.dtype), "target": targets}
        if told.drop_path:
            prepared["paths"] = vit.drop_paths(paths, len(images), model.depth, told.drop_path)
        return prepared

    def loss(self, params, frozen, batch):
        """(mean, {"loss": (B,)}): cross-entropy to soft labels of a prepared batch."""
        paths_LB2 = batch["paths"].swapaxes(0, 1) if "paths" in batch else None
        logits = self.module.apply({"params": params}, batch["image"], paths_LB2)
        values = optax.softmax_cross_entropy(logits.astype(jnp.float32), batch["target"])
        return values.mean(), {"loss": values}

    def logits(self, params, frozen, pictures):
        """uint8 (B, height, width, 3) to (B, classes) float32, nothing dropped."""
        images = vit.normalise(pictures)
        return self.module.apply({"params": params}, images).astype(jnp.float32)

    def model_flops(self) -> float:
        """FLOPs of an image in a step, by flops.FORMULA."""
        return flops.classifier_flops(self.config.model, self.config.classify.num_classes)

    def told(self) -> dict:
        """What `replayed` needs beside the config."""
        return {}


def open_classify(config: Train, kind: type[Classify]) -> Classify:
    """The task with its data and what it starts from. Raises UserError."""
    examples = pipeline.open_labelled(config.data, config.model, config.classify, config.seed)
    names = examples.sources.splits[0].label.names
    return kind(config, examples=examples, start=starting_weights(config, names))


def starting_weights(config: Train, names: Sequence[str] = ()) -> Start:
    """Encoder and positions; of a classifier pooled alike also its norm, and its head where it is
    of as many classes, and of these `names` where both are known. Raises UserError.

    Positions of another grid are resized as the official code does: bicubic, not antialiased.
    """
    told, model = config.classify, config.model
    if not told.weights:
        table = heads.from_pretrained({}, model)["pos_embed"]
        notes = ("config.classify.weights is empty: from random weights",)
        return Start({"pos_embed": table}, "random weights", notes)
    _, found = formats.read(told.weights, encoder_only=True)
    found = weights_lib.encoder(found, told.pooling if found.full else None)
    _refuse_another(model, found)
    notes = [f"starting from {found.source}", *found.notes]
    params = dict(found.params)
    if found.model.grid != model.grid:
        params["pos_embed"] = interpolate_positions(
            params["pos_embed"][0], (model.grid, model.grid), cls=True, antialias=False
        )[None]
        notes.append(f"positions resized from {found.model.grid}² to {model.grid}² patches")
    if (found.preprocess.mean, found.preprocess.std) != (vit.IMAGENET_MEAN, vit.IMAGENET_STD):
        notes.append(f"{told.weights} expects pictures of another mean and std than ImageNet's")
    alike = found.pooling == told.pooling
    same = found.num_classes == told.num_classes
    if same and (i := class_names.first_difference(found.classes, names)) is not None:
        same = False
        notes.append(f"its head is of other classes: {i} is {found.classes[i]!r}, not {names[i]!r}")
    if not (alike and same):
        params = {name: x for name, x in params.items() if not name.startswith("head/")}
    if not alike:
        params = {name: x for name, x in params.items() if not name.startswith("norm/")}
    kept = ", ".join(sorted({name.partition("/")[0] for name in params}))
    notes.append(f"taken over: {kept}")
    return Start(layout.unflatten(params), found.source, tuple(notes))


def _refuse_another(model, found: weights_lib.Weights):
    """Raises UserError where the encoder is not that of the config."""
    have = replace(found.model, mlp_ratio=int(found.model.width * found.model.mlp_ratio))
    want = replace(model, mlp_ratio=int(model.width * model.mlp_ratio))
    for name in (*SAME, "mlp_ratio"):
        if getattr(have, name) != getattr(want, name):
            shown = getattr(found.model, name)
            raise UserError(
                f"{found.source} has {name} {shown}, the config {getattr(model, name)}: set "
                f"config.model.{name}={shown}"
            )
