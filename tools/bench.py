"""Times the real training step on the devices that are here, and a PyTorch peer beside it.

    python tools/bench.py [--size=B/16 --batch=64 --dtype=bfloat16 --targets=stored] [--peer=torch]

The data are random and already on the device: what is timed is the step alone. MFU is model FLOPs
(flops.py) over the data sheet's peak, and over what a large matrix product reaches here and now.
With --peer, steps of both take turns, after it was shown that both compute the same losses.
"""

import dgpt_jax.starting  # noqa: F401

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import bench_peer
import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import chips, cli, hosts, metrics, segments, sharding, state, towers
from dgpt_jax.config import Hosts, Model, Train
from dgpt_jax.convert import digpt, files, layout, timm
from dgpt_jax.convert import teacher as teacher_weights
from dgpt_jax.schema import UserError, parse
from dgpt_jax.sections import SIZES
from dgpt_jax.step import make_train_step
from dgpt_jax.tasks.pretrain import Pretrain, Target
from dgpt_jax.token_codec import Codec

TEACHERS = {
    "B/16": towers.Tower(224, 16, 768, 12, 12, 3072, 512, "gelu"),
    "L/14": towers.Tower(224, 14, 1024, 24, 16, 4096, 768, "gelu"),
    "H/14": towers.Tower(224, 14, 1280, 32, 16, 5120, 1024, "gelu"),
}


def timed(call, seconds: float) -> tuple[float, float]:
    """Calls a second, and calls a second of processor time (all threads)."""
    call()
    done, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        call()
        done += 1
    return done / (time.perf_counter() - began), done / (time.process_time() - used)


def matmul_rate(dtype: str, seconds: float) -> float:
    """FLOP/s of one device on square matrices."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    rate, _ = timed(lambda: product(x, x).block_until_ready(), seconds)
    return rate * 2 * side**3


def random_teacher(tower: towers.Tower, seed: int = 0) -> dict:
    """Nested float32 parameters of a tower."""
    rng = np.random.default_rng(seed)
    shapes = teacher_weights.parameter_shapes(tower)
    return layout.unflatten(
        {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    )


class Ours:
    """The step of dgpt_jax.train on random data."""

    def __init__(self, args):
        config = {
            "model": {"size": args.size, "remat": args.remat}, "batch_size": args.batch,
            "accum_steps": args.accum_steps, "dtype": args.dtype,
            "data": {"path": "random", "targets": args.targets},
            "teacher": {"weights": "random", "dtype": args.dtype},
        }  # fmt: skip
        self.config = parse(Train, config)
        tower, teacher = TEACHERS[args.teacher], None
        if args.targets == "online":
            teacher = teacher_weights.Loaded(tower, random_teacher(tower), "random", "", ())
        width = tower.token_width
        codec = Codec("int8", np.linspace(0.5, 2, width, dtype=np.float32))
        self.task = Pretrain(
            self.config, Target(width, tower.grid, cls=True, codec=codec), teacher=teacher
        )
        self.mesh = sharding.make_mesh(self.config.mesh)
        self.flops = self.task.model_flops()
        tx = self.task.optimizer(lambda step: 1e-4)
        self.state = state.create(self.task.init, tx, self.mesh, seed=0)
        self.local = self._batch()
        self.batch = sharding.global_batch(self.mesh, args.batch, self.local)
        self.frozen = jax.device_put(self.task.frozen, sharding.replicated(self.mesh))
        self.empty = metrics.averages(self.task.metric_names).empty
        self.step = make_train_step(self.task.loss, tx, self.mesh, accum_steps=args.accum_steps)

    def compile(self):
        began = time.perf_counter()
        lowered = self.step.lower(self.state, self.empty(), self.batch, self.frozen)
        self.step = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        print(f"compiled in {self.compile_seconds:.0f} s", file=sys.stderr, flush=True)

    def _batch(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        batch = {}
        for name, like in self.task.abstract_example().items():
            shape = (self.config.batch_size, *like.shape)
            if name == "order":
                batch[name] = np.stack([rng.permutation(shape[1]) for _ in range(shape[0])])
            else:
                low, high = (0, 256) if like.dtype == np.uint8 else (-127, 128)
                batch[name] = rng.integers(low, high, shape)
            batch[name] = batch[name].astype(like.dtype)
        return batch

    def losses(self) -> list[float]:
        """next and visible of the batch in float32, before the first step."""
        exact = Pretrain(dataclasses.replace(self.config, dtype="float32"), self.task.target)

        def parts(params, batch):
            return {name: x.mean() for name, x in exact.loss(params, {}, batch)[1].items()}

        with jax.default_matmul_precision("highest"):
            found = jax.jit(parts)(self.state.params, self.batch)
        return [float(found["next"]), float(found["visible"])]

    def run(self, steps: int) -> list[float]:
        """Seconds of each of so many steps; the device always has the next one waiting."""
        ends, running = [], []
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        for _ in range(steps):
            self.state, done = self.step(self.state, self.empty(), self.batch, self.frozen)
            running.append(done)
            if len(running) > 1:
                jax.block_until_ready(running.pop(0))
                ends.append(time.perf_counter())
        jax.block_until_ready(running)
        ends.append(time.perf_counter())
        return list(np.diff([began, *ends]))

    def peak_memory(self) -> tuple[float, str]:
        """Bytes of one device, and who says so."""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"], "measured"
        said = self.step.memory_analysis()
        return said.argument_size_in_bytes + said.temp_size_in_bytes, "the compiler's"

    def write(self, work: Path):
        """What bench_torch.py needs to do the same."""
        model = self.config.model
        params = {n: np.asarray(x) for n, x in layout.flatten(self.state.params).items()}
        files.write_safetensors(work / "weights.safetensors", digpt.write(params, model), {})
        np.savez(work / "batch.npz", scale=self.task.target.codec.scale, **self.local)
        visible = segments.visible_count(model.segments)
        count = model.segments[0] * model.segments[1]
        told = {
            "model": dataclasses.asdict(model),
            "dtype": self.config.dtype, "timm": timm.NAMES[model.size],
            "tokens": visible * model.grid**2 // count + 1,
        }  # fmt: skip
        (work / "bench.json").write_text(json.dumps(told))


def report(args, ours: Ours, seconds: list[float], ceiling: float, peer: dict) -> dict:
    devices = jax.devices()
    median = statistics.median(seconds)
    rate = args.batch * ours.flops / median / len(devices)
    sheet = chips.of(devices[0].device_kind)
    low, high = np.percentile(seconds, [10, 90])
    memory, who = ours.peak_memory()
    return {
        "size": args.size, "targets": args.targets, "dtype": args.dtype, "batch": args.batch,
        "devices": len(devices), "device": devices[0].device_kind, "jax": jax.__version__,
        "images_per_second": args.batch / median, "ms": 1e3 * median,
        "ms_10_90": [1e3 * low, 1e3 * high], "steps": len(seconds),
        "tflops": rate / 1e12, "gflop_an_image": ours.flops / 1e9,
        "mfu_datasheet": rate / sheet.flops if sheet and args.dtype == "bfloat16" else None,
        "mfu_matmul": rate / ceiling, "matmul_tflops": ceiling / 1e12,
        "compile_seconds": ours.compile_seconds, "peak_memory": memory, "memory_by": who,
    } | peer  # fmt: skip


def show(found: dict) -> str:
    sheet = found["mfu_datasheet"]
    text = (
        "{size} {targets} {dtype}, batch {batch} on {devices} × {device}, jax {jax}\n"
        "  {images_per_second:.4g} images/s, {ms:.4g} ms a step (10-90 %: {low:.4g} to {high:.4g}, "
        "{steps} steps)\n"
        "  {tflops:.4g} model TFLOP/s a device ({gflop_an_image:.4g} GFLOP an image): MFU {sheet}, "
        "{mfu_matmul:.0%} of a matrix product ({matmul_tflops:.4g} TFLOP/s)\n"
        "  peak memory {memory:.2f} GB a device ({memory_by}), compiled in {compile_seconds:.0f} s"
    ).format(
        **found, low=found["ms_10_90"][0], high=found["ms_10_90"][1],
        sheet=f"{sheet:.1%} of the data sheet" if sheet else "of a data sheet unknown",
        memory=found["peak_memory"] / 1e9,
    )  # fmt: skip
    if "peer" in found:
        text += (
            f"\n  peer {found['peer']}: {found['peer_ms']:.4g} ms a step; ratio_vs_peer "
            f"{found['ratio_vs_peer']:.3f} (rounds: {min(found['ratios']):.3f} to "
            f"{max(found['ratios']):.3f})"
        )
    return text


def main():
    made = cli.parser(__doc__)
    made.add_argument("--size", default="B/16", choices=SIZES)
    made.add_argument("--batch", type=int, default=64, help="images a step, over all devices")
    made.add_argument("--accum_steps", type=int, default=1, help="micro-batches of a step")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    made.add_argument("--targets", default="stored", choices=("stored", "online"))
    made.add_argument("--teacher", default="H/14", choices=TEACHERS, help="whose tokens they are")
    made.add_argument("--remat", default=Model.remat, help="none, dots or full")
    made.add_argument("--steps", type=int, default=30, help="steps to time")
    made.add_argument("--peer", choices=("torch", "timm"), help="what to time beside it")
    made.add_argument("--rounds", type=int, default=6, help="turns of ours and the peer's")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--platform", default="", help="cpu, gpu or tpu; default: what JAX finds")
    args = made.parse_args()
    if args.peer:
        # Ours would otherwise take three quarters of a GPU's memory, used or not.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    hosts.start(Hosts(processes=1), args.platform)
    if args.peer and (args.targets != "stored" or len(jax.devices()) > 1):
        raise UserError("--peer is for --targets=stored on one device")

    ours = Ours(args)
    if args.peer:
        seconds, peer = bench_peer.beside(
            ours, args.peer, max(1, args.steps // args.rounds), args.rounds
        )
    else:
        ours.compile()
        ours.run(3)
        seconds, peer = ours.run(args.steps), {}
    found = report(args, ours, seconds, matmul_rate(args.dtype, 3.0), peer)
    print(json.dumps(found) if args.json else show(found))


if __name__ == "__main__":
    cli.run(main)
