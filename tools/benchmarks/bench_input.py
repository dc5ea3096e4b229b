"""Benchmarks the input pipeline, by stage and in batches as training reads it.

    python -m tools.benchmarks.bench_input store [--codecs=float16,int8,int4]
    python -m tools.benchmarks.bench_input live [--data=IMAGES] [--workers=0,2]

`store` writes small token stores of 257 × 1024 tokens and 224² JPEGs and reads random records;
`live` draws random resized crops from an image dataset, or from random JPEGs (500×375). Prints the
rate of each stage (read, parse, decode, crop and resize, transfer to the device) and of batches.
The files fit the page cache, so the figures show CPU time, not disk. With --tensorflow=PYTHON, an
interpreter that has TensorFlow, tf.data does the same work for comparison.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import contextlib
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dgpt_jax import cli
from dgpt_jax.config import DataConfig, HostsConfig, ModelConfig
from dgpt_jax.config.schema import parse
from dgpt_jax.data import dataset, image_ops, loader, token_codec, token_store
from dgpt_jax.data.ingest import importer
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.distributed import multihost
from dgpt_jax.storage import array_record_shards, output_paths, tfds_dataset
from tools.benchmarks.bench import measure_rate

THREADS = (1, 2, 8)
BATCH = 64


def write_store(path: Path, codec: str, examples: int, shard_size: int = 512) -> Path:
    """Writes a store of one view with random tokens and smooth images."""
    width, size = 1024, 224
    info = token_store.StoreInfo(
        name="", image=token_store.StoredImages(size, size, "jpeg95"),
        teacher=TeacherInfo(
            name="", weights={"width": width}, codec=codec, grid=(16, 16), cls=True, width=width,
            channel_scale=() if codec == "float16" else (1.0,) * width, cosine=(1.0, 1.0),
            variance=1.0,
        ),
        source={}, views={}, example_bytes=0.0, command="", code_version="",
    )  # fmt: skip
    features = token_store.features(info, None)
    token_shape: Any = info.teacher.feature().shape
    rng = np.random.default_rng(0)

    def record(index: int) -> bytes:
        coarse = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
        image = image_ops.encode_image(image_ops.resize(coarse, size, size), info.image.encoding)
        tokens = rng.integers(0, 100, token_shape, np.uint8).astype(token_codec.CODECS[codec])
        box = np.zeros(4, np.int32)
        return features.serialize_example(
            {"id": str(index), "image": image, "tokens": tokens, "box": box, "flip": 0}
        )

    path.mkdir(parents=True)
    info.save(path)
    starts = range(0, examples, shard_size)
    shards = {}
    for number, start in enumerate(starts):
        shard = tfds_dataset.shard_path(path, token_store.view_split(0), number, len(starts))
        indices = range(start, min(start + shard_size, examples))
        shards[shard.name] = array_record_shards.write(shard, map(record, indices))
    tfds_dataset.write_metadata(path, features, {token_store.view_split(0): list(shards.values())})
    array_record_shards.write_manifest(path, shards)
    return path


def write_photographs(path: Path, examples: int, width: int, height: int) -> Path:
    """Writes a dataset of smooth random JPEGs; at 500×375 about as large as ImageNet's."""
    rng = np.random.default_rng(0)
    folder = path / "folder"
    folder.mkdir(parents=True)
    for i in range(examples):
        coarse = rng.integers(0, 256, (-(-height // 10), -(-width // 10), 3), np.uint8)
        jpeg = image_ops.encode_image(image_ops.resize(coarse, height, width), "jpeg95")
        (folder / f"{i:06d}.jpg").write_bytes(jpeg)
    importer.import_images(folder, path / "images", say=lambda _: None)
    return path / "images"


def print_header():
    print(f"{'input':8} {'kB':>5}  {'stage':30} {'images/s':>9} {'MB/s':>6} {'images/s/core':>16}")


def print_row(name: str, size: float, stage: str, rate: float, core: float):
    """Prints a row of the table; size: bytes per image."""
    print(
        f"{name:8} {size / 1e3:5.0f}  {stage:30} {rate:9.0f} {rate * size / 1e6:6.0f} {core:16.0f}",
        flush=True,
    )


def bench_store(args: Namespace):
    """Prints the table of reading stores."""
    print_header()
    for codec in args.codecs.split(","):
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            store = write_store(Path(scratch) / "tokens", codec, args.examples)
            size = sum(array_record_shards.sizes(store).values()) / args.examples
            split = tfds_dataset.Split(store, token_store.view_split(0))
            for stage, call in stages(split):
                rate, core = measure_rate(call, args.seconds)
                print_row(codec, size, f"{stage}: {1e6 / rate:.0f} µs", rate, core)
            bench_batches(args, codec, size, {"path": str(store)})
            bench_tensorflow(args, "store", codec, size, split)


def bench_live(args: Namespace):
    """Prints the table of live views."""
    print_header()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        data = args.data or write_photographs(Path(scratch), args.examples, *args.shape)
        split = tfds_dataset.Split(data, args.split)
        size = sum(len(split.raw(i)) for i in range(min(100, len(split)))) / min(100, len(split))
        for stage, call in [*stages(split), crops(split)]:
            rate, core = measure_rate(call, args.seconds)
            print_row("live", size, f"{stage}: {1e6 / rate:.0f} µs", rate, core)
        bench_batches(
            args, "live", size, {"path": str(data), "split": args.split, "targets": "pixels"}
        )
        bench_tensorflow(args, "live", "live", size, split)


def stages(split: tfds_dataset.Split) -> Sequence[tuple[str, Callable[[], object]]]:
    """(name, function) of each stage of reading a random record."""
    rng = np.random.default_rng(0)
    raw = [split.raw(int(i)) for i in rng.integers(len(split), size=100)]
    images = [split.parse(record)["image"] for record in raw]
    return (
        ("read", lambda: split.raw(int(rng.integers(len(split))))),
        ("parse", lambda: split.parse(raw[rng.integers(100)])),
        ("decode", lambda: image_ops.decode_image(images[rng.integers(100)])),
    )


def crops(split: tfds_dataset.Split) -> tuple[str, Callable[[], object]]:
    """(name, function) of the stage from a decoded photograph to the model's input."""
    rng = np.random.default_rng(0)
    data = DataConfig()
    decoded = [image_ops.decode_image(split[i]["image"]) for i in range(min(20, len(split)))]

    def crop():
        image = decoded[rng.integers(len(decoded))]
        view = image_ops.draw_view(
            rng, *image.shape[:2], scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip
        )
        image_ops.render(image, view, 224)

    return "crop and resize", crop


def bench_batches(args: Namespace, name: str, size: float, data: dict[str, Any]):
    """Prints rates of batches by threads and worker processes, and of their transfer."""
    for workers in map(int, args.workers.split(",")):
        for threads in THREADS:
            config = parse(DataConfig, data | {"threads": threads, "workers": workers})
            examples = dataset.open_examples(config, parse(ModelConfig, {}), seed=0)
            rows = np.arange(BATCH)
            stream = loader.train_batches(examples, BATCH, rows=rows, start_step=0)
            with contextlib.closing(stream):
                rate, core = measure_rate(lambda stream=stream: next(stream), args.seconds)
                batch = next(stream)
            if workers:  # CPU time of workers is not measured
                core = np.nan
            stage = f"batches, {workers} workers, {threads} threads"
            print_row(name, size, stage, rate * BATCH, core * BATCH)
    rate, core = measure_rate(lambda: jax.block_until_ready(jax.device_put(batch)), args.seconds)
    print_row(name, size, "transfer of a batch", rate * BATCH, core * BATCH)


def bench_tensorflow(args: Namespace, kind: str, name: str, size: float, split: tfds_dataset.Split):
    """Prints rates of tf.data on the same records, measured in another process."""
    if not args.tensorflow:
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        for i in range(len(split)):
            record = split.parse(split.raw(i))
            (Path(scratch) / f"{i:06d}.jpg").write_bytes(record["image"])
            if kind == "store":
                (Path(scratch) / f"{i:06d}.tokens").write_bytes(
                    np.asarray(record["tokens"]).tobytes()
                )
        words = [args.tensorflow, Path(__file__).with_name("bench_input_tf.py"), scratch, kind]
        words += [f"--seconds={args.seconds}", f"--batch_size={BATCH}"]
        process = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout.splitlines():
        stage, rate, core = line.rsplit(" ", 2)
        print_row(name, size, stage, float(rate), float(core))
    if process.returncode:
        print(
            f"tf.data: not measured, {args.tensorflow} exited with {process.returncode}",
            file=sys.stderr,
        )


def main():
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    store = commands.add_parser("store", help="local token stores")
    store.add_argument("--codecs", default="float16,int8,int4", help="names, comma-separated")
    store.set_defaults(run=bench_store)
    live = commands.add_parser("live", help="live views of photographs")
    live.add_argument(
        "--data", type=cli.path, help="TFDS image dataset; default: random photographs"
    )
    live.add_argument("--split", default="train", help="its split")
    live.add_argument(
        "--shape", type=lambda text: tuple(map(int, text.split("x"))), default=(500, 375),
        metavar="WxH", help="size of random photographs; default: 500x375",
    )  # fmt: skip
    live.set_defaults(run=bench_live)
    for command in (store, live):
        command.add_argument("--examples", type=int, default=2048, help="examples to write")
        command.add_argument("--seconds", type=float, default=3.0, help="seconds per measurement")
        command.add_argument("--workers", default="0", help="worker processes, comma-separated")
        command.add_argument(
            "--tensorflow", type=cli.path, metavar="PYTHON", help="an interpreter with TensorFlow"
        )
        command.add_argument(
            "--platform", default="", help="cpu, gpu or tpu; default: JAX's choice"
        )
        command.add_argument(
            "--dir", type=cli.local_path, help="scratch directory; default: the system's"
        )
    args = parser.parse_args()
    if args.dir:
        output_paths.directory(args.dir)
        args.dir.mkdir(parents=True, exist_ok=True)
    multihost.start(HostsConfig(num_processes=1), args.platform)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
