"""Benchmarks the token builder.

    python -m tools.benchmarks.bench_tokens [--teacher=H/14 --dtype=bfloat16 --batch_size=64]

Builds a store of random images with a randomly initialized CLIP tower. Prints images per second of
the whole build and of the teacher alone, and the FLOP/s of a matrix product for comparison.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import os
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from etils import epath

from dgpt_jax import cli
from dgpt_jax.config import TokensConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import token_codec, token_store
from dgpt_jax.models.flops import teacher_flops
from dgpt_jax.storage import output_paths, tfds_dataset
from dgpt_jax.tokens import build, views, writer
from dgpt_jax.tokens.shard_plan import ShardPlan
from dgpt_jax.tokens.teacher import Teacher
from dgpt_jax.weights.layouts import clip as clip_weights
from tools.benchmarks.bench import TEACHERS, matmul_rate, measure_rate, random_teacher
from tools.benchmarks.bench_input import write_photographs


def measure(args: Namespace):
    """Builds a store and prints the rates."""
    tower, devices = TEACHERS[args.teacher], jax.local_devices()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        scratch = Path(scratch)
        clip_weights.save(scratch / "teacher", random_teacher(tower), tower)
        settings = {
            "source": str(write_photographs(scratch, args.examples, 500, 375)),
            "teacher": {"weights": str(scratch / "teacher"), "dtype": args.dtype},
            "batch_size": args.batch_size, "codec": args.codec, "threads": args.threads,
        }  # fmt: skip
        config = parse(TokensConfig, settings)
        info = build.build(config, scratch / "tokens")
        teacher = Teacher(config.teacher, config.batch_size)
        peak = matmul_rate(args.dtype, args.seconds) * len(devices)
        codec = info.teacher.load_codec(scratch / "tokens")
        encode = teacher.encoder(codec)
        images = np.random.default_rng(0).integers(
            0, 256, (teacher.batch_size, 224, 224, 3), np.uint8
        )
        calls, _ = measure_rate(lambda: jax.block_until_ready(encode(images)), args.seconds)
        teacher_rate = calls * teacher.batch_size
        with ThreadPoolExecutor(config.threads) as pool:
            shard = ShardPlan(epath.Path(scratch) / "tokens" / "again", 1, range(args.examples))
            source = tfds_dataset.Split(config.source, "train")
            serialize = tfds_dataset.serializer(token_store.features(info, source.label))
            stats = writer.write(
                partial(views.render, config, source), serialize, teacher, codec,
                info.example_bytes, [shard], pool, lambda _: None,
            )  # fmt: skip
    flops = teacher_flops(tower)
    print(
        f"{args.teacher} {args.dtype}, {args.batch_size} images per device, on {len(devices)} × "
        f"{devices[0].device_kind}, {args.threads} threads of {os.cpu_count()} cores\n"
        f"matrix product   {peak / 1e12:8.2f} TFLOP/s\n"
        f"teacher alone    {teacher_rate:8.1f} img/s, {flops / 1e9:.0f} GFLOP each: "
        f"{teacher_rate * flops / peak:.0%} of the matrix product\n"
        f"whole build      {stats['images_per_second']:8.1f} img/s, waiting for "
        + ", ".join(f"{stage} {stats[stage]:.0%}" for stage in ("images", "teacher", "disk"))
    )


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("--teacher", default="B/16", choices=TEACHERS, help="size of the tower")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--codec", default="int8", choices=token_codec.CODECS)
    parser.add_argument("--batch_size", type=int, default=64, help="images per device")
    parser.add_argument("--examples", type=int, default=1024, help="images of the store")
    parser.add_argument("--threads", type=int, default=8, help="threads that decode images")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per measurement")
    parser.add_argument(
        "--dir", type=cli.local_path, help="scratch directory; default: the system's"
    )
    args = parser.parse_args()
    if args.dir:
        output_paths.directory(args.dir)
        args.dir.mkdir(parents=True, exist_ok=True)
    measure(args)


if __name__ == "__main__":
    cli.run(main)
