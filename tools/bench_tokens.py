"""How fast a token store is built here.

    python tools/bench_tokens.py [--teacher=H/14 --dtype=bfloat16 --batch_size=64]

builds a store of random pictures with a CLIP tower of random weights: images a second of the whole
and of the teacher alone, beside the rate of the device's own matrix product.
"""

import dgpt_jax.starting  # noqa: F401

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from bench import TEACHERS, matmul_rate, random_teacher, timed
from bench_input import photographs

from dgpt_jax import build, cli, outputs, records, token_codec, token_writer
from dgpt_jax.config import Tokens
from dgpt_jax.convert import clip as clip_weights
from dgpt_jax.flops import tower_flops
from dgpt_jax.schema import parse
from dgpt_jax.teacher import Teacher
from dgpt_jax.token_writer import Shard


def measure(args):
    """Prints the lines of building."""
    tower, devices = TEACHERS[args.teacher], jax.local_devices()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        scratch = Path(scratch)
        clip_weights.save(scratch / "teacher", random_teacher(tower), tower)
        settings = {
            "source": str(photographs(scratch, args.examples, 500, 375)),
            "teacher": {"weights": str(scratch / "teacher"), "dtype": args.dtype},
            "batch_size": args.batch_size, "codec": args.codec, "threads": args.threads,
        }  # fmt: skip
        config = parse(Tokens, settings)
        info = build.build(config, scratch / "tokens")
        teacher = Teacher(config.teacher, config.batch_size)
        peak = matmul_rate(args.dtype, args.seconds) * len(devices)
        codec = info.load_codec(scratch / "tokens")
        start = teacher.encoder(codec)
        pictures = np.random.default_rng(0).integers(
            0, 256, (teacher.batch_size, 224, 224, 3), np.uint8
        )
        alone, _ = timed(lambda: jax.block_until_ready(start(pictures)), args.seconds)
        alone *= teacher.batch_size
        with ThreadPoolExecutor(config.threads) as pool:
            shard = Shard(scratch / "tokens" / "again", 1, range(args.examples))
            source = records.Split(config.source, "train")
            found = token_writer.write(
                config, source, teacher, info, codec, [shard], pool, lambda _: None
            )
    flops = tower_flops(tower)
    print(
        f"{args.teacher} {args.dtype}, {args.batch_size} pictures a device, on {len(devices)} × "
        f"{devices[0].device_kind}, {args.threads} threads of {os.cpu_count()} cores\n"
        f"matrix product   {peak / 1e12:8.2f} TFLOP/s\n"
        f"teacher alone    {alone:8.1f} img/s, {flops / 1e9:.0f} GFLOP each: "
        f"{alone * flops / peak:.0%} of the matrix product\n"
        f"whole build      {found['images_per_second']:8.1f} img/s, waiting for "
        + ", ".join(f"{what} {found[what]:.0%}" for what in ("pictures", "teacher", "disk"))
    )


def main():
    made = cli.parser(__doc__)
    made.add_argument("--teacher", default="B/16", choices=TEACHERS, help="size of the tower")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    made.add_argument("--codec", default="int8", choices=token_codec.CODECS)
    made.add_argument("--batch_size", type=int, default=64, help="pictures a device")
    made.add_argument("--examples", type=int, default=1024, help="pictures of the store")
    made.add_argument("--threads", type=int, default=8, help="threads for pictures")
    made.add_argument("--seconds", type=float, default=3.0, help="seconds a measurement")
    made.add_argument(
        "--dir", type=cli.local_path, help="where it is written; default: the system's"
    )
    args = made.parse_args()
    if args.dir:
        outputs.directory(args.dir)
        args.dir.mkdir(parents=True, exist_ok=True)
    measure(args)


if __name__ == "__main__":
    cli.run(main)
