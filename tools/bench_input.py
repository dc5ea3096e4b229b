"""How fast the input is here, stage by stage and as training reads it.

    python tools/bench_input.py store [--codecs=float16,int8,int4]
    python tools/bench_input.py live [--data=IMAGES] [--workers=0,2]

`store` writes small token stores of 257 × 1024 tokens and 224² JPEGs and reads them at random;
`live` draws random resized crops from a dataset of photographs, or of random JPEGs (500×375). Each
stage (read, parse, decode, crop and resize, transfer to the device), then whole batches. What is
written fits the page cache: these are a processor's figures, not a disk's. --tensorflow=PYTHON
names an interpreter that has TensorFlow, whose tf.data then does the same work beside it.
"""

import dgpt_jax.starting  # noqa: F401

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from bench import timed

from dgpt_jax import (
    batching,
    cli,
    hosts,
    images,
    outputs,
    pipeline,
    records,
    shards,
    token_codec,
    token_store,
    views,
)
from dgpt_jax.config import Data, Hosts, Model
from dgpt_jax.schema import parse

THREADS = (1, 2, 8)
BATCH = 64


def synthetic_store(path: Path, codec: str, examples: int, shard_size: int = 512) -> Path:
    """A store of one view with random tokens and smooth pictures."""
    width, size = 1024, 224
    info = token_store.StoreInfo(
        name="", codec=codec, grid=(16, 16), cls=True, width=width,
        channel_scale=() if codec == "float16" else (1.0,) * width, cosine=(1.0, 1.0),
        variance=1.0, example_bytes=0.0, picture_size=size, picture="jpeg95",
        teacher={"width": width}, source={}, views={}, command="", code_version="",
    )  # fmt: skip
    features = token_store.features(info, None)
    stored = (info.tokens, token_codec.stored_width(codec, width))
    rng = np.random.default_rng(0)

    def record(index: int) -> bytes:
        coarse = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
        picture = views.encode_picture(views.resize(coarse, size, size), info.picture)
        tokens = rng.integers(0, 100, stored, np.uint8).astype(token_codec.CODECS[codec])
        box = np.zeros(4, np.int32)
        return features.serialize_example(
            {"id": str(index), "image": picture, "tokens": tokens, "box": box, "flip": 0}
        )

    path.mkdir(parents=True)
    info.save(path)
    starts = range(0, examples, shard_size)
    known = {}
    for number, start in enumerate(starts):
        shard = records.shard_path(path, token_store.view_split(0), number, len(starts))
        indices = range(start, min(start + shard_size, examples))
        known[shard.name] = shards.write(shard, map(record, indices))
    records.write_metadata(path, features, {token_store.view_split(0): list(known.values())})
    shards.seal(path, known)
    return path


def photographs(path: Path, examples: int, width: int, height: int):
    """An image dataset of smooth random JPEGs; at 500×375 about the bytes of ImageNet's."""
    rng = np.random.default_rng(0)
    folder = path / "folder"
    folder.mkdir(parents=True)
    for i in range(examples):
        coarse = rng.integers(0, 256, (-(-height // 10), -(-width // 10), 3), np.uint8)
        picture = views.encode_picture(views.resize(coarse, height, width), "jpeg95")
        (folder / f"{i:06d}.jpg").write_bytes(picture)
    images.import_images(folder, path / "images", say=lambda _: None)
    return path / "images"


def head():
    print(f"{'what':8} {'kB':>5}  {'how':30} {'images/s':>9} {'MB/s':>6} {'images/s a core':>16}")


def row(what: str, size: float, how: str, rate: float, core: float):
    """A line of the table; `size` in bytes an image."""
    print(
        f"{what:8} {size / 1e3:5.0f}  {how:30} {rate:9.0f} {rate * size / 1e6:6.0f} {core:16.0f}",
        flush=True,
    )


def stored(args):
    """Prints the table of reading stores."""
    head()
    for codec in args.codecs.split(","):
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            store = synthetic_store(Path(scratch) / "tokens", codec, args.examples)
            size = sum(shards.sizes(store).values()) / args.examples
            split = records.Split(store, token_store.view_split(0))
            for stage, call in stages(split):
                rate, core = timed(call, args.seconds)
                row(codec, size, f"{stage}: {1e6 / rate:.0f} µs", rate, core)
            batches(args, codec, size, {"path": str(store)})
            tensorflow(args, "store", codec, size, split)


def live(args):
    """Prints the table of live views."""
    head()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        data = args.data or photographs(Path(scratch), args.examples, *args.shape)
        split = records.Split(data, args.split)
        size = sum(len(split.raw(i)) for i in range(min(100, len(split)))) / min(100, len(split))
        for stage, call in [*stages(split), crops(split)]:
            rate, core = timed(call, args.seconds)
            row("live", size, f"{stage}: {1e6 / rate:.0f} µs", rate, core)
        batches(args, "live", size, {"path": str(data), "split": args.split, "targets": "pixels"})
        tensorflow(args, "live", "live", size, split)


def stages(split):
    """(name, what to call) of the parts of one record's way, each at random."""
    rng = np.random.default_rng(0)
    raw = [split.raw(int(i)) for i in rng.integers(len(split), size=100)]
    pictures = [split.parse(record)["image"] for record in raw]
    return (
        ("read", lambda: split.raw(int(rng.integers(len(split))))),
        ("parse", lambda: split.parse(raw[rng.integers(100)])),
        ("decode", lambda: views.decode_picture(pictures[rng.integers(100)])),
    )


def crops(split):
    """The stage from a decoded photograph to the model's picture."""
    rng = np.random.default_rng(0)
    data = Data()
    decoded = [views.decode_picture(split[i]["image"]) for i in range(min(20, len(split)))]

    def crop():
        image = decoded[rng.integers(len(decoded))]
        view = views.draw(
            rng, *image.shape[:2], scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip
        )
        views.render(image, view, 224)

    return "crop and resize", crop


def batches(args, what: str, size: float, data: dict):
    """Lines of whole batches by threads and worker processes, and of their transfer."""
    for workers in map(int, args.workers.split(",")):
        for threads in THREADS:
            given = parse(Data, data | {"threads": threads, "workers": workers})
            examples = pipeline.open_examples(given, parse(Model, {}), seed=0)
            rows = np.arange(BATCH)
            stream = batching.train_batches(examples, BATCH, rows=rows, start_step=0)
            with contextlib.closing(stream):
                rate, core = timed(lambda stream=stream: next(stream), args.seconds)
                batch = next(stream)
            if workers:  # whose processor time is not this process's
                core = np.nan
            how = f"batches, {workers} workers, {threads} threads"
            row(what, size, how, rate * BATCH, core * BATCH)
    rate, core = timed(lambda: jax.block_until_ready(jax.device_put(batch)), args.seconds)
    row(what, size, "transfer of a batch", rate * BATCH, core * BATCH)


def tensorflow(args, kind: str, what: str, size: float, split):
    """Lines of tf.data doing the same with the same records, in a process of its own."""
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
        ended = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, text=True)
    for line in ended.stdout.splitlines():
        how, rate, core = line.rsplit(" ", 2)
        row(what, size, how, float(rate), float(core))
    if ended.returncode:
        print(
            f"tf.data: not measured, {args.tensorflow} ended with {ended.returncode}",
            file=sys.stderr,
        )


def main():
    made = cli.parser(__doc__)
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    store = commands.add_parser("store", help="reading a token store, near")
    store.add_argument("--codecs", default="float16,int8,int4", help="names, comma-separated")
    store.set_defaults(run=stored)
    views_of = commands.add_parser("live", help="live views of photographs")
    views_of.add_argument(
        "--data", type=cli.path, help="TFDS image dataset; default: random photographs"
    )
    views_of.add_argument("--split", default="train", help="its split")
    views_of.add_argument(
        "--shape", type=lambda text: tuple(map(int, text.split("x"))), default=(500, 375),
        metavar="WxH", help="of random photographs; default: 500x375",
    )  # fmt: skip
    views_of.set_defaults(run=live)
    for one in (store, views_of):
        one.add_argument("--examples", type=int, default=2048, help="examples to write")
        one.add_argument("--seconds", type=float, default=3.0, help="seconds a measurement")
        one.add_argument("--workers", default="0", help="worker processes, comma-separated")
        one.add_argument(
            "--tensorflow", type=cli.path, metavar="PYTHON", help="an interpreter with TensorFlow"
        )
        one.add_argument("--platform", default="", help="cpu, gpu or tpu; default: what JAX finds")
        one.add_argument(
            "--dir", type=cli.local_path, help="where things are written; default: the system's"
        )
    args = made.parse_args()
    if args.dir:
        outputs.directory(args.dir)
        args.dir.mkdir(parents=True, exist_ok=True)
    hosts.start(Hosts(processes=1), args.platform)
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
