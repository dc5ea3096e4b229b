"""Benchmarks the training step on this machine's devices, optionally against PyTorch.

    python -m tools.benchmarks.bench [--size=B/16 --batch=64 --dtype=bfloat16 --targets=stored]
        [--peer=torch]

The data are random and already on the device, so only the step is timed. MFU is model FLOPs
(models/flops.py) relative to the data sheet's peak, and to a large matrix product measured here.
With --peer, the losses of both are compared first, then their steps alternate.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import dataclasses
import json
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgpt_jax import cli
from dgpt_jax.config import HostsConfig, ModelConfig, TrainConfig
from dgpt_jax.config.model import SIZES
from dgpt_jax.config.schema import parse
from dgpt_jax.data import segments
from dgpt_jax.data.token_codec import Codec
from dgpt_jax.distributed import multihost, sharding
from dgpt_jax.errors import UserError
from dgpt_jax.models import teacher_vit
from dgpt_jax.monitoring import metrics
from dgpt_jax.planning import chips
from dgpt_jax.training import train_step
from dgpt_jax.training.tasks.pretrain import PretrainTask
from dgpt_jax.training.tasks.targets import Target
from dgpt_jax.weights import files, mapping
from dgpt_jax.weights import teacher_loading as teacher_weights
from dgpt_jax.weights.layouts import digpt, timm
from tools.benchmarks import bench_peer

TEACHERS = {
    "B/16": teacher_vit.TeacherArchitecture(224, 16, 768, 12, 12, 3072, 512, "gelu"),
    "L/14": teacher_vit.TeacherArchitecture(224, 14, 1024, 24, 16, 4096, 768, "gelu"),
    "H/14": teacher_vit.TeacherArchitecture(224, 14, 1280, 32, 16, 5120, 1024, "gelu"),
}


def measure_rate(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Calls per second, and per second of CPU time of all threads."""
    call()
    count, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start), count / (time.process_time() - cpu_start)


def matmul_rate(dtype: str, seconds: float) -> float:
    """FLOP/s of one device multiplying square matrices."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    rate, _ = measure_rate(lambda: product(x, x).block_until_ready(), seconds)
    return rate * 2 * side**3


def random_teacher(tower: teacher_vit.TeacherArchitecture, seed: int = 0) -> dict:
    """Random float32 parameters of a tower, nested."""
    rng = np.random.default_rng(seed)
    shapes = teacher_weights.parameter_shapes(tower)
    return mapping.unflatten(
        {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    )


class JaxStep:
    """Training step of dgpt_jax.train on random data."""

    def __init__(self, args: Namespace):
        config = {
            "model": {"size": args.size, "remat": args.remat}, "batch_size": args.batch,
            "accum_steps": args.accum_steps, "dtype": args.dtype,
            "data": {"path": "random", "targets": args.targets},
            "teacher": {"weights": "random", "dtype": args.dtype},
        }  # fmt: skip
        self.config = parse(TrainConfig, config)
        tower, teacher = TEACHERS[args.teacher], None
        if args.targets == "online":
            teacher = teacher_weights.Loaded(tower, random_teacher(tower), "random", "", ())
        width = tower.token_width
        self.codec = Codec("int8", np.linspace(0.5, 2, width, dtype=np.float32))
        self.task = PretrainTask(
            self.config,
            {"": Target(width, tower.grid, cls=True, codec=self.codec)},
            teacher=teacher,
        )
        self.mesh = sharding.make_mesh(self.config.mesh)
        self.flops = self.task.model_flops()
        tx = self.task.optimizer(lambda step: 1e-4)
        self.state = train_step.init_state(self.task.init, tx, self.mesh, seed=0)
        self.host_batch = self._random_batch()
        self.batch = sharding.global_batch(self.mesh, args.batch, self.host_batch)
        self.frozen = jax.device_put(self.task.frozen, sharding.replicated(self.mesh))
        self.empty = metrics.averages(self.task.metric_names).empty
        self.step = train_step.make_train_step(
            self.task.loss, tx, self.mesh, accum_steps=args.accum_steps
        )

    def compile(self):
        start = time.perf_counter()
        lowered = self.step.lower(self.state, self.empty(), self.batch, self.frozen)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        print(f"compiled in {self.compile_seconds:.0f} s", file=sys.stderr, flush=True)

    def _random_batch(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        batch = {}
        for name, spec in self.task.abstract_example().items():
            shape = (self.config.batch_size, *spec.shape)
            if name == "order":
                batch[name] = np.stack([rng.permutation(shape[1]) for _ in range(shape[0])])
            else:
                low, high = (0, 256) if spec.dtype == np.uint8 else (-127, 128)
                batch[name] = rng.integers(low, high, shape)
            batch[name] = batch[name].astype(spec.dtype)
        return batch

    def losses(self) -> list[float]:
        """Losses next and visible of the batch in float32; call before the first step."""
        task = PretrainTask(dataclasses.replace(self.config, dtype="float32"), self.task.targets)

        def means(params, batch):
            return {name: x.mean() for name, x in task.loss(params, {}, batch)[1].items()}

        with jax.default_matmul_precision("highest"):
            losses = jax.jit(means)(self.state.params, self.batch)
        return [float(losses["next"]), float(losses["visible"])]

    def run(self, steps: int) -> list[float]:
        """Seconds of each step, with one more step always in flight."""
        ends, in_flight = [], []
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metric_sums = self.compiled(
                self.state, self.empty(), self.batch, self.frozen
            )
            in_flight.append(metric_sums)
            if len(in_flight) > 1:
                jax.block_until_ready(in_flight.pop(0))
                ends.append(time.perf_counter())
        jax.block_until_ready(in_flight)
        ends.append(time.perf_counter())
        return list(np.diff([start, *ends]))

    def peak_memory(self) -> tuple[float, str]:
        """(bytes of one device, their source)"""
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"], "measured"
        memory: Any = self.compiled.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes, "estimated by XLA"

    def save(self, work: Path):
        """Writes weights, batch and settings for bench_torch.py."""
        model = self.config.model
        params = {n: np.asarray(x) for n, x in mapping.flatten(self.state.params).items()}
        files.write_safetensors(work / "weights.safetensors", digpt.write(params, model), {})
        arrays: dict[str, Any] = {"scale": self.codec.scale, **self.host_batch}
        np.savez(work / "batch.npz", **arrays)
        visible = segments.visible_count(model.segments)
        count = model.segments[0] * model.segments[1]
        settings = {
            "model": dataclasses.asdict(model),
            "dtype": self.config.dtype, "timm": timm.NAMES[model.size],
            "tokens": visible * model.grid**2 // count + 1,
        }  # fmt: skip
        (work / "bench.json").write_text(json.dumps(settings))


def report(args: Namespace, step: JaxStep, seconds: list[float], matmul: float) -> dict[str, Any]:
    """Metrics of the steps that took `seconds`; matmul: FLOP/s of a matrix product."""
    devices = jax.devices()
    median = statistics.median(seconds)
    rate = args.batch * step.flops / median / len(devices)
    sheet = chips.of(devices[0].device_kind)
    low, high = np.percentile(seconds, [10, 90])
    memory, source = step.peak_memory()
    return {
        "size": args.size, "targets": args.targets, "dtype": args.dtype, "batch": args.batch,
        "devices": len(devices), "device": devices[0].device_kind, "jax": jax.__version__,
        "images_per_second": args.batch / median, "ms": 1e3 * median,
        "ms_10_90": [1e3 * low, 1e3 * high], "steps": len(seconds),
        "tflops": rate / 1e12, "gflop_per_image": step.flops / 1e9,
        "mfu_datasheet": rate / sheet.flops if sheet and args.dtype == "bfloat16" else None,
        "mfu_matmul": rate / matmul, "matmul_tflops": matmul / 1e12,
        "compile_seconds": step.compile_seconds, "peak_memory": memory, "memory_source": source,
    }  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    mfu = result["mfu_datasheet"]
    mfu = f"{mfu:.1%} of the data sheet" if mfu else "unknown"
    text = (
        "{size} {targets} {dtype}, batch {batch} on {devices} × {device}, jax {jax}\n"
        "  {images_per_second:.4g} images/s, {ms:.4g} ms per step (10-90 %: {ms_10_90[0]:.4g} to "
        "{ms_10_90[1]:.4g}, {steps} steps)\n"
        "  {tflops:.4g} model TFLOP/s per device ({gflop_per_image:.4g} GFLOP per image): MFU "
        "{mfu}, {mfu_matmul:.0%} of a matrix product ({matmul_tflops:.4g} TFLOP/s)\n"
        "  peak memory {gb:.2f} GB per device ({memory_source}), compiled in "
        "{compile_seconds:.0f} s"
    ).format(**result, mfu=mfu, gb=result["peak_memory"] / 1e9)
    if "peer" in result:
        text += (
            f"\n  peer {result['peer']}: {result['peer_ms']:.4g} ms per step; ratio_vs_peer "
            f"{result['ratio_vs_peer']:.3f} (rounds: {min(result['ratios']):.3f} to "
            f"{max(result['ratios']):.3f})"
        )
    return text


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("--size", default="B/16", choices=SIZES)
    parser.add_argument("--batch", type=int, default=64, help="images per step, over all devices")
    parser.add_argument("--accum_steps", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--targets", default="stored", choices=("stored", "online"))
    parser.add_argument("--teacher", default="H/14", choices=TEACHERS, help="size of the teacher")
    parser.add_argument("--remat", default=ModelConfig.remat, help="none, dots or full")
    parser.add_argument("--steps", type=int, default=30, help="steps to time")
    parser.add_argument("--peer", choices=("torch", "timm"), help="implementation to compare with")
    parser.add_argument("--rounds", type=int, default=6, help="alternations with the peer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--platform", default="", help="cpu, gpu or tpu; default: JAX's choice")
    args = parser.parse_args()
    if args.peer:
        # JAX would otherwise reserve three quarters of the GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    multihost.start(HostsConfig(num_processes=1), args.platform)
    if args.peer and (args.targets != "stored" or len(jax.devices()) > 1):
        raise UserError("--peer needs --targets=stored and a single device")

    step = JaxStep(args)
    if args.peer:
        steps = max(1, args.steps // args.rounds)
        seconds, peer = bench_peer.alternate(step, args.peer, steps, args.rounds)
    else:
        step.compile()
        step.run(3)
        seconds, peer = step.run(args.steps), {}
    result = report(args, step, seconds, matmul_rate(args.dtype, 3.0)) | peer
    print(json.dumps(result) if args.json else describe(result))


if __name__ == "__main__":
    cli.run(main)
