"""Converts weights between layouts and checks that the result computes the same.

    python tools/convert.py RUN DIR --to=timm
    python tools/convert.py RUN DIR --to=hf
    python tools/convert.py RUN FILE.pth --to=digpt         encoder and decoders, official names
    python tools/convert.py D-iGPT_B.pth DIR --to=flax      a checkpoint directory
    python tools/convert.py SRC --keys                      which array is which parameter

SRC is a work directory (its newest checkpoint; RUN/checkpoints/STEP is another), or weights: native
safetensors, the official D-iGPT's .pth, timm's ViT, Hugging Face's ViT, MAE's .pth, DINOv2 (Hugging
Face's, or its own .pth), big_vision's .npz. FILE#KEY selects one of several state dicts in a file,
e.g. model.pth#model_ema. The layout is detected. DST is a directory, or a file for safetensors,
digpt and big_vision, and must not contain weights. A model card is written beside them. Positions,
eps and GELU change only with --image_size, --eps and --activation.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse

import jax

from dgpt_jax import cli
from dgpt_jax.distributed import preemption
from dgpt_jax.models.transformer import ACTIVATIONS
from dgpt_jax.storage import file_limits
from dgpt_jax.weights import card, export, flags, mapping, registry
from dgpt_jax.weights.types import adapt


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("src", type=cli.path, help="work directory, or weights")
    parser.add_argument(
        "dst", type=cli.local_path, nargs="?", help="directory or file; not with --keys alone"
    )
    parser.add_argument("--to", choices=registry.WRITTEN, help="layout to write")
    parser.add_argument(
        "--from",
        dest="source",
        choices=list(registry.LAYOUTS),
        help="SRC's layout; default: detected",
    )
    parser.add_argument(
        "--part", choices=("encoder", "full"), help="default: all that both layouts store"
    )
    parser.add_argument(
        "--pooling", choices=("mean", "cls"),
        help="for a pretraining model's encoder; default: mean for timm, else cls",
    )  # fmt: skip
    parser.add_argument("--image_size", type=int, help="resize positions (bicubic, as in timm)")
    parser.add_argument("--activation", choices=list(ACTIVATIONS), help="change the GELU")
    parser.add_argument("--eps", type=float, help="change the eps of the LayerNorms")
    flags.add_encoder(parser, decoders=True)
    parser.add_argument(
        "--keys", action="store_true", help="print array names, shapes and parameters"
    )
    args = parser.parse_args()
    if args.to and not (args.keys or args.dst):
        parser.error(f"DST is missing: the directory or file to write, --to={args.to}")
    if args.dst and not args.to:
        parser.error(f"--to is missing: the layout of {args.dst}")
    if not (args.keys or args.dst):
        parser.error("DST and --to, or --keys, are required")
    return args


def main() -> None:
    args = arguments()
    preemption.raise_on_sigterm()  # so that partial files are removed
    file_limits.trim_malloc()
    jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator
    target = registry.LAYOUTS[args.to] if args.to else None
    if target is not None and args.dst:
        export.check_target(target, args.dst)
    encoder_only = target is not None and (args.part == "encoder" or not target.full)
    source, weights = registry.read(
        args.src, args.source, heads=args.heads, decoder_heads=args.decoder_heads,
        encoder_only=encoder_only,
    )  # fmt: skip
    if args.keys:
        print(f"{args.src}, layout {source.name}: name  shape  parameter")
        print("\n".join(mapping.describe(source.table(weights), weights.params)))
    if target is None:
        return
    weights = export.prepare(weights, target, args.part, args.pooling)
    weights = adapt(weights, image_size=args.image_size, eps=args.eps, activation=args.activation)
    for note in weights.notes:
        print(note)
    if args.keys:
        print(f"layout {target.name}: name  shape  parameter")
        print("\n".join(mapping.describe(target.table(weights), weights.params)))
    if not args.dst:
        return
    path, verified = export.write(weights, target, args.dst, release=True)
    part = "encoder and decoders" if weights.full else f"encoder with pooling {weights.pooling}"
    print(f"wrote {path}: {part} of {weights.source} in layout {target.name}")
    print(verified)
    print(f"next: load it in Python: {card.loading(weights, target.name, path)[0][1]}")


if __name__ == "__main__":
    cli.run(main)
