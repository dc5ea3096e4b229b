"""Command-line flags for settings that weights without JSON beside them do not store."""

import argparse

from dgpt_jax.config import TeacherConfig, schema


def add_encoder(parser: argparse.ArgumentParser, *, decoders: bool = False) -> None:
    """Adds --heads and, for pretraining models, --decoder_heads."""
    parser.add_argument("--heads", type=int, help="attention heads, if no JSON beside the weights")
    if decoders:
        parser.add_argument(
            "--decoder_heads", type=int, help="heads of the decoders (official layout)"
        )


def add_teacher(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `teacher_config`, without --weights."""
    json = "if no JSON beside the weights has it"
    parser.add_argument("--heads", type=int, help=f"attention heads, {json}")
    parser.add_argument("--activation", help=f"gelu, gelu_tanh or quick_gelu, {json}")
    parser.add_argument("--image_size", type=int, help="input size, if not that of the JSON")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=_channels, metavar="R,G,B", help=f"{name} of images in [0, 1], {json}"
        )


def given_teacher(args: argparse.Namespace) -> list[str]:
    """Returns the names of the flags by `add_teacher` that are given."""
    names = ("heads", "activation", "image_size", "mean", "std")
    return [name for name in names if getattr(args, name) is not None]


def teacher_config(args: argparse.Namespace, **changes) -> TeacherConfig:
    """Returns the TeacherConfig of the flags; `changes` apply to those that are not given. Raises
    UserError."""
    flags = {name: getattr(args, name) for name in ("weights", *given_teacher(args))}
    return schema.parse(TeacherConfig, changes | flags, "config.teacher")


def _channels(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


_channels.__name__ = "R,G,B"  # shown by argparse
