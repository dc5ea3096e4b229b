"""How fast token stores are built and read here.

    python tools/bench_tokens.py build [--teacher=H/14 --dtype=bfloat16 --batch_size=64]

builds a store of random pictures with a CLIP tower of random weights: images a second of the whole
and of the teacher alone, beside the rate of the device's own matrix product.

    python tools/bench_tokens.py read [--examples=2048 --seconds=3 --codecs=float16,int8,int4]

writes small stores of 257 × 1024 tokens and 224² JPEGs under --dir and reads them at random: record
by record (read, parse, decode: µs each), then as training does. They fit the page cache: these are
a processor's figures, not a disk's.
"""

import contextlib
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import (
    build,
    cli,
    images,
    pipeline,
    records,
    shards,
    token_codec,
    token_store,
    token_writer,
    towers,
    views,
)
from dgpt_jax.config import Data, Model, Tokens
from dgpt_jax.convert import clip as clip_weights
from dgpt_jax.convert import layout
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.flops import tower_flops
from dgpt_jax.schema import parse
from dgpt_jax.teacher import Teacher
from dgpt_jax.token_writer import Shard

THREADS = (1, 2, 8)


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


def timed(call, seconds: float) -> tuple[float, float]:
    """Calls a second, and calls a second of processor time (all threads)."""
    call()
    done, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        call()
        done += 1
    return done / (time.perf_counter() - began), done / (time.process_time() - used)


def read(args):
    """Prints the table of reading."""
    print(
        f"{'codec':8} {'kB':>5}  {'how':24} {'records/s':>9} {'MB/s':>6} {'records/s a core':>16}"
    )
    for codec in args.codecs.split(","):
        with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
            store = synthetic_store(Path(scratch) / "tokens", codec, args.examples)
            size = sum(shards.sizes(store).values()) / args.examples

            def row(how, rate, core, codec=codec, size=size):
                print(
                    f"{codec:8} {size / 1e3:5.0f}  {how:24} {rate:9.0f} {rate * size / 1e6:6.0f} "
                    f"{core:16.0f}",
                    flush=True,
                )

            for stage, call in stages(store):
                rate, core = timed(call, args.seconds)
                row(f"{stage}: {1e6 / rate:.0f} µs", rate, core)
            for threads in THREADS:
                row(f"batches, {threads} threads", *batches_a_second(store, threads, args.seconds))


def stages(store):
    """(name, what to call) of the parts of one record's way, each at random."""
    split = records.Split(store, token_store.view_split(0))
    rng = np.random.default_rng(0)
    raw = [split.raw(int(i)) for i in rng.integers(len(split), size=100)]
    pictures = [split.parse(record)["image"] for record in raw]
    return (
        ("read", lambda: split.raw(int(rng.integers(len(split))))),
        ("parse", lambda: split.parse(raw[rng.integers(100)])),
        ("decode", lambda: views.decode_picture(pictures[rng.integers(100)])),
    )


def batches_a_second(store, threads: int, seconds: float, batch_size: int = 64):
    """Records a second, and a second of processor time, through `pipeline.train_batches`."""
    data = parse(Data, {"path": str(store), "threads": threads})
    examples = pipeline.open_examples(data, parse(Model, {}), seed=0)
    rows = np.arange(batch_size)
    stream = pipeline.train_batches(examples, batch_size, rows=rows, start_step=0)
    with contextlib.closing(stream):
        rate, core = timed(lambda: next(stream), seconds)
    return rate * batch_size, core * batch_size


TOWERS = {
    "B/16": towers.Tower(224, 16, 768, 12, 12, 3072, 512, "gelu"),
    "L/14": towers.Tower(224, 14, 1024, 24, 16, 4096, 768, "gelu"),
    "H/14": towers.Tower(224, 14, 1280, 32, 16, 5120, 1024, "gelu"),
}


def photographs(path: Path, examples: int):
    """An image dataset of smooth random JPEGs of 500×375, about the bytes of ImageNet's."""
    rng = np.random.default_rng(0)
    folder = path / "folder"
    folder.mkdir(parents=True)
    for i in range(examples):
        coarse = rng.integers(0, 256, (38, 50, 3), np.uint8)
        picture = views.encode_picture(views.resize(coarse, 375, 500), "jpeg95")
        (folder / f"{i:06d}.jpg").write_bytes(picture)
    images.import_images(folder, path / "images", say=lambda _: None)
    return path / "images"


def matmul_rate(dtype: str, seconds: float) -> float:
    """FLOP/s of one device on square matrices."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    rate, _ = timed(lambda: product(x, x).block_until_ready(), seconds)
    return rate * 2 * side**3


def build_store(args):
    """Prints the lines of building."""
    tower, devices = TOWERS[args.teacher], jax.local_devices()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        scratch = Path(scratch)
        shapes = teacher_weights.parameter_shapes(tower)
        rng = np.random.default_rng(0)
        params = {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
        clip_weights.save(scratch / "teacher", layout.unflatten(params), tower)
        settings = {
            "source": str(photographs(scratch, args.examples)),
            "teacher": {"weights": str(scratch / "teacher"), "dtype": args.dtype},
            "batch_size": args.batch_size, "codec": args.codec, "threads": args.threads,
        }  # fmt: skip
        config = parse(Tokens, settings)
        info = build.build(config, scratch / "tokens")
        teacher = Teacher(config.teacher, config.batch_size)
        peak = matmul_rate(args.dtype, args.seconds) * len(devices)
        codec = info.load_codec(scratch / "tokens")
        start = teacher.encoder(codec)
        pictures = rng.integers(0, 256, (teacher.batch_size, 224, 224, 3), np.uint8)
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
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    building = commands.add_parser("build", help="building a store")
    building.add_argument("--teacher", default="B/16", choices=TOWERS, help="size of the tower")
    building.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    building.add_argument("--codec", default="int8", choices=token_codec.CODECS)
    building.add_argument("--batch_size", type=int, default=64, help="pictures a device")
    building.add_argument("--examples", type=int, default=1024, help="pictures of the store")
    building.add_argument("--threads", type=int, default=8, help="threads for pictures")
    building.add_argument("--seconds", type=float, default=3.0, help="seconds a measurement")
    building.add_argument("--dir", help="where it is written; default: the system's")
    building.set_defaults(run=build_store)
    reading = commands.add_parser("read", help="reading a store, near")
    reading.add_argument("--examples", type=int, default=2048, help="examples a store")
    reading.add_argument("--seconds", type=float, default=3.0, help="seconds a measurement")
    reading.add_argument("--codecs", default="float16,int8,int4", help="names, comma-separated")
    reading.add_argument("--dir", help="where the stores are written; default: the system's")
    reading.set_defaults(run=read)
    args = made.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
