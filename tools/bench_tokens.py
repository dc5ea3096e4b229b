"""How fast token stores are read here: records and MB a second, and what a record costs.

    python tools/bench_tokens.py read [--examples=2048 --seconds=3 --codecs=float16,int8,int4]

writes small stores of 257 × 1024 tokens and 224² JPEGs under --dir and reads them at random: record
by record (read, parse, decode: µs each), then as training does. They fit the page cache: these are
a processor's figures, not a disk's.
"""

import contextlib
import tempfile
import time
from pathlib import Path

import numpy as np

from dgpt_jax import cli, pipeline, records, shards, token_codec, token_store, views
from dgpt_jax.config import Data, Model
from dgpt_jax.schema import parse

THREADS = (1, 2, 8)


def synthetic_store(path: Path, codec: str, examples: int, shard_size: int = 512) -> Path:
    """A store of one view with random tokens and smooth pictures."""
    width, size = 1024, 224
    info = token_store.StoreInfo(
        name="tokens", codec=codec, grid=(16, 16), cls=True, width=width,
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


def main():
    made = cli.parser(__doc__)
    commands = made.add_subparsers(required=True, metavar="COMMAND")
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
