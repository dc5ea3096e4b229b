"""Initial parameters of a run: those of config.init.weights, adapted to config.model.

They are read when a run starts. A run that resumes has its parameters in its own checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dgpt_jax.config import ModelConfig, TrainConfig
from dgpt_jax.data import class_names, segments
from dgpt_jax.errors import MissingHeads, UserError
from dgpt_jax.weights import files, mapping, mean_std, registry
from dgpt_jax.weights import types as weights_lib
from dgpt_jax.weights.positions import bicubic
from dgpt_jax.weights.types import Weights

# Fields that an encoder and config.model must have in common; of mlp_ratio the MLP's width.
ENCODER_FIELDS = ("width", "depth", "heads", "patch", "mlp_ratio", "eps", "activation")
# The same for decoders that are loaded.
DECODER_FIELDS = ("decoder_width", "decoder_depth", "decoder_heads", "taps")
MAX_SINCOS_ERROR = 1e-5  # of positions that are sin-cos: other code computes them in float64


class InitialWeights(NamedTuple):
    """Nested arrays to use instead of initialized parameters of the same paths.

    source: their origin, for messages. notes: lines to log. identity: {"path", "source", "sha256"}
    of the weights, for the metadata of checkpoints; sha256 as of files.hash_state. None for random
    parameters.
    """

    params: dict[str, Any]
    source: str = "random weights"
    notes: tuple[str, ...] = ()
    identity: Mapping[str, str] | None = None


RANDOM = InitialWeights(
    {}, notes=("config.init.weights is empty: training from random parameters",)
)


def for_classifier(config: TrainConfig, names: Sequence[str] = ()) -> InitialWeights:
    """Encoder and positions of config.init.weights, or none of them. Raises UserError.

    From a classifier with the same pooling also the norm, and the head if it has as many classes
    and, where class names are available on both sides, the same `names`.
    """
    cfg, model = config.classify, config.model
    if not config.init.weights:
        table = segments.sincos_table(model.width, model.grid)
        return RANDOM._replace(params={"pos_embed": table})
    original = _read(config, encoder_only=True)
    weights = weights_lib.encoder(original, cfg.pooling if original.full else None)
    _check_encoder(config, weights)
    params, notes = dict(weights.params), list(weights.notes)
    params["pos_embed"], note = _resized_positions(weights, model)
    notes += note
    same_pooling = weights.pooling == cfg.pooling
    same_classes = weights.num_classes == cfg.num_classes
    if same_classes and (i := class_names.first_difference(weights.classes, names)) is not None:
        same_classes = False
        notes.append(f"head not loaded, its class {i} is {weights.classes[i]!r}, not {names[i]!r}")
    if not (same_pooling and same_classes):
        params = {name: x for name, x in params.items() if not name.startswith("head/")}
    if not same_pooling:
        params = {name: x for name, x in params.items() if not name.startswith("norm/")}
    return _result(config, original, params, notes)


def for_pretraining(
    config: TrainConfig, *, decoders: Sequence[str], out_width: int
) -> InitialWeights:
    """Encoder of config.init.weights, or none; with config.model.positions=learned its positions.

    With config.init.decoders=auto also those of `decoders` that the weights have; out_width: of
    their predictions. A final norm and a head are dropped, with a note. Raises UserError.
    """
    if not config.init.weights:
        return RANDOM
    original = _read(config, encoder_only=config.init.decoders == "fresh")
    weights = weights_lib.encoder(original, None)
    _check_encoder(config, weights)
    params = {name: x for name, x in weights.params.items() if name.startswith("encoder/")}
    notes = list(weights.notes)
    if config.model.positions == "learned":
        params["pos_embed"], note = _resized_positions(weights, config.model)
        notes += note
    else:
        _require_sincos(weights)
    if weights.num_classes:
        notes.append(f"{weights.source}: dropped the classification head")
    if np.any(weights.params["norm/scale"] != 1) or np.any(weights.params["norm/bias"] != 0):
        notes.append(f"{weights.source}: dropped the final norm, which pretraining does not have")
    if original.full and config.init.decoders == "auto":
        if config.teachers:
            raise UserError(
                f"{original.source} has decoders for one teacher, the config has config.teachers: "
                f"start new decoders with --config.init.decoders=fresh"
            )
        loaded = [name for name in decoders if name in original.decoders]
        _check_decoders(config, original, out_width)
        prefixes = tuple(f"{name}/" for name in loaded)
        params |= {name: x for name, x in original.params.items() if name.startswith(prefixes)}
    return _result(config, original, params, notes)


def _read(config: TrainConfig, *, encoder_only: bool) -> Weights:
    """Weights of config.init.weights, with the head counts of config.model if nothing beside them
    specifies any. Raises UserError."""
    path, model = config.init.weights, config.model
    try:
        return registry.read(path, encoder_only=encoder_only)[1]
    except MissingHeads:
        heads, decoder_heads = model.heads, model.decoder_heads
    options = {"heads": heads, "decoder_heads": decoder_heads, "encoder_only": encoder_only}
    weights = registry.read(path, **options)[1]
    note = f"{path} does not specify head counts: using config.model.heads={heads}"
    if weights.full:
        note += f" and decoder_heads={decoder_heads}"
    return replace(weights, notes=(*weights.notes, note))


def _result(
    config: TrainConfig, original: Weights, params: dict[str, np.ndarray], notes: list[str]
) -> InitialWeights:
    """InitialWeights of flat parameters, some of those of `original`."""
    loaded = ", ".join(sorted({name.partition("/")[0] for name in params}))
    identity = {
        "path": config.init.weights,
        "source": original.source,
        "sha256": files.hash_state(original.params),
    }
    notes = [f"initial weights: {original.source}", *notes, f"loaded: {loaded}"]
    return InitialWeights(mapping.unflatten(params), original.source, tuple(notes), identity)


def _resized_positions(weights: Weights, model: ModelConfig) -> tuple[np.ndarray, list[str]]:
    """Positions of an encoder (1, 1+N, D) for the grid of `model`, and notes.

    Resized as in the official code: bicubic, without antialiasing, CLS unchanged.
    """
    positions = weights.params["pos_embed"]
    if weights.model.grid == model.grid:
        return positions, []
    resized = bicubic(positions[0], (model.grid, model.grid), True)
    return resized[None], [f"positions resized from {weights.model.grid}² to {model.grid}² patches"]


def _require_sincos(weights: Weights) -> None:
    """Raises UserError if the positions of an encoder are not the fixed ones of pretraining."""
    table = segments.sincos_table(weights.model.width, weights.model.grid)
    error = float(np.abs(weights.params["pos_embed"] - table).max())
    if not error <= MAX_SINCOS_ERROR:
        raise UserError(
            f"{weights.source} has learned positions (they differ by up to {error:.2g} from "
            f"sin-cos ones), the config has config.model.positions=sincos: set "
            f"--config.model.positions=learned"
        )


def _check_encoder(config: TrainConfig, weights: Weights) -> None:
    """Raises UserError, with the flags to set, if the encoder is not that of config.model, or was
    trained with another mean or std than config.data's."""
    model, theirs = config.model, weights.model
    values = {
        f"model.{name}": (getattr(theirs, name), getattr(model, name))
        for name in ENCODER_FIELDS
        if getattr(theirs, name) != getattr(model, name)
    }
    hidden = [int(theirs.width * ratio) for ratio in (model.mlp_ratio, theirs.mlp_ratio)]
    if hidden[0] == hidden[1]:  # the ratio of a file is that of its array's shape
        values.pop("model.mlp_ratio", None)
    for name in ("mean", "std"):
        pair = getattr(weights.preprocess, name), getattr(config.data, name)
        if not mean_std.same(*pair):
            values[f"data.{name}"] = pair
    _refuse(weights.source, values)


def _check_decoders(config: TrainConfig, weights: Weights, out_width: int) -> None:
    """Raises UserError if the decoders of weights are not those of the config."""
    values = {
        f"model.{name}": (getattr(weights.model, name), getattr(config.model, name))
        for name in DECODER_FIELDS
        if getattr(weights.model, name) != getattr(config.model, name)
    }
    fresh = "or start new decoders with --config.init.decoders=fresh"
    _refuse(weights.source, values, fresh)
    if weights.out_width != out_width:
        raise UserError(
            f"{weights.source} predicts targets of width {weights.out_width}, those of this run "
            f"have width {out_width}: set --config.init.decoders=fresh"
        )


def _refuse(source: str, values: Mapping[str, tuple[Any, Any]], alternative: str = "") -> None:
    """Raises UserError if there are {key: (value of the weights, value of the config)}."""
    if not values:
        return
    pairs = ", ".join(f"{key} {theirs} (config: {ours})" for key, (theirs, ours) in values.items())
    flags = " ".join(f"--config.{key}={_flag(theirs)}" for key, (theirs, _) in values.items())
    more = f", {alternative}" if alternative else ""
    raise UserError(f"{source} has {pairs}: set {flags}{more}")


def _flag(value: Any) -> str:
    """The value as the text of a flag, without spaces."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
