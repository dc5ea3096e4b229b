"""Converts weights between layouts.

    python tools/convert.py RUN DIR --to=timm          the encoder, for timm and dgpt_jax
    python tools/convert.py RUN FILE.safetensors --to=digpt   encoder and decoders, official names

SRC is a work directory or a weights file. --to=timm writes DIR/model.safetensors and
DIR/config.json (architecture and preprocessing).
"""

import json
from pathlib import Path

from dgpt_jax import cli, load
from dgpt_jax.convert import digpt, files, timm


def main():
    made = cli.parser(__doc__)
    made.add_argument("src", help="work directory, or weights")
    made.add_argument("dst", help="directory (timm) or file (digpt)")
    made.add_argument("--to", required=True, choices=("timm", "digpt"))
    made.add_argument("--pooling", default="mean", choices=("mean", "cls"), help="for timm")
    args = made.parse_args()
    if args.to == "digpt":
        pretrained = load.load_digpt(args.src)
        state = digpt.write(load.to_flat(pretrained.params), pretrained.model)
        files.write_safetensors(args.dst, state, {"format": "pt"})
        print(f"wrote {args.dst}: {len(state)} arrays in the official D-iGPT layout")
        print(f'next: dgpt_jax.load_digpt("{args.dst}")')
        return
    encoder = load.load_encoder(args.src)
    state = timm.write(load.to_flat(encoder.params), encoder.model.depth, args.pooling)
    out = Path(args.dst)
    out.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(out / "model.safetensors", state, {"format": "pt"})
    config = timm.config_json(encoder.model, args.pooling)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    print(f"wrote {out}/model.safetensors and config.json: {encoder.source} in timm's layout")
    print(
        f"next: timm.create_model({config['architecture']!r}, checkpoint_path="
        f"'{out}/model.safetensors', **json.load(open('{out}/config.json'))['model_args'])"
    )


if __name__ == "__main__":
    cli.run(main)
