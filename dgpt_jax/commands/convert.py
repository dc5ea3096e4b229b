"""Converts weights between layouts, and checks that the result computes the same.

    python tools/convert.py RUN DIR --to=timm
    python tools/convert.py RUN DIR --to=hf
    python tools/convert.py RUN FILE.pth --to=digpt         encoder and decoders, official names
    python tools/convert.py D-iGPT_B.pth DIR --to=flax      a checkpoint directory
    python tools/convert.py SRC --keys                      which array is which parameter

SRC is a work directory (its newest checkpoint; RUN/checkpoints/STEP is another), or weights: our
safetensors, the official D-iGPT's .pth, timm's ViT, Hugging Face's ViT, MAE's .pth, DINOv2 (Hugging
Face's, or its own .pth), big_vision's .npz; FILE#KEY is one of several state dicts in a file, such
as model.pth#model_ema. Which, is found out; DST is a directory, or a file for
safetensors, digpt and big_vision, and must not hold weights yet. A model card is written beside.
Nothing is changed unasked: not positions (--image_size), nor eps or GELU.
"""

import dgpt_jax.starting  # noqa: F401

import jax

from dgpt_jax import cli, open_files, signals
from dgpt_jax.convert import card, export, formats, layout
from dgpt_jax.convert.weights import change
from dgpt_jax.transformer import ACTIVATIONS


def arguments():
    made = cli.parser(__doc__)
    made.add_argument("src", type=cli.path, help="work directory, or weights")
    made.add_argument(
        "dst", type=cli.local_path, nargs="?", help="directory or file; not with --keys alone"
    )
    made.add_argument("--to", choices=formats.WRITTEN, help="layout to write")
    made.add_argument(
        "--from", dest="source", choices=list(formats.LAYOUTS), help="SRC's layout; default: found"
    )
    made.add_argument("--part", choices=("encoder", "full"), help="default: all that both can hold")
    made.add_argument(
        "--pooling", choices=("mean", "cls"),
        help="of a pretraining model's encoder; default: mean for timm, else cls",
    )  # fmt: skip
    made.add_argument("--image_size", type=int, help="resize positions (bicubic, as timm)")
    made.add_argument("--activation", choices=list(ACTIVATIONS), help="take another GELU")
    made.add_argument("--eps", type=float, help="take another eps of the LayerNorms")
    made.add_argument("--heads", type=int, help="attention heads, where nothing beside SRC tells")
    made.add_argument("--decoder_heads", type=int, help="those of the decoders (official layout)")
    made.add_argument("--keys", action="store_true", help="print name, shape, parameter")
    args = made.parse_args()
    if not args.keys and not (args.dst and args.to):
        made.error("give DST and --to, or --keys")
    return args


def main():
    args = arguments()
    signals.raise_on_sigterm()  # nothing half-written is left
    open_files.return_memory()
    jax.config.update("jax_platforms", "cpu")  # a conversion needs no accelerator
    target = formats.LAYOUTS[args.to] if args.to else None
    if args.dst:
        export.check_place(target, args.dst)
    alone = target is not None and (args.part == "encoder" or not target.full)
    source, weights = formats.read(
        args.src, args.source, heads=args.heads, decoder_heads=args.decoder_heads,
        encoder_only=alone,
    )  # fmt: skip
    if args.keys:
        print(f"{args.src}, layout {source.name}: name  shape  parameter")
        print("\n".join(layout.describe(source.table(weights), weights.params)))
    if target is None:
        return
    weights = export.prepare(weights, target, args.part, args.pooling)
    weights = change(weights, image_size=args.image_size, eps=args.eps, activation=args.activation)
    for note in weights.notes:
        print(note)
    if args.keys:
        print(f"layout {target.name}: name  shape  parameter")
        print("\n".join(layout.describe(target.table(weights), weights.params)))
    if not args.dst:
        return
    path, verified = export.write(weights, target, args.dst, release=True)
    what = "encoder and decoders" if weights.full else f"the encoder, pooling {weights.pooling}"
    print(f"wrote {path}: {what} of {weights.source} in layout {target.name}")
    print(verified)
    print(f"next: {card.loading(weights, target.name, path)[0][1]}")


if __name__ == "__main__":
    cli.run(main)
