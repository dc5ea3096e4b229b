"""Batch size, micro-batches, recomputation and precision of a pretraining on the devices found.

Memory of a step is computed from the model, not compiled: 16 bytes per parameter (parameter,
gradient, both moments of AdamW) and bytes per activation that were fitted to the peak memory of
B/16, S/16 and L/14 on a GPU (docs/results/gpu.md: within 6 %).
"""

import math
from dataclasses import dataclass
from typing import Any

from dgpt_jax.config import ModelConfig
from dgpt_jax.data import segments
from dgpt_jax.errors import UserError, counted
from dgpt_jax.models import flops
from dgpt_jax.planning import chips
from dgpt_jax.planning.chips import GIB

STATE_BYTES = 16  # per parameter
ENCODER_BYTES, DECODER_BYTES = 38, 66  # per token, channel and block, in bfloat16
SCORE_BYTES = 8  # per attention score, in bfloat16, where XLA stores them
FULL_REMAT = 0.35  # of the activations that remain: B/16, docs/results/gpu.md
MARGIN = 1.2  # on computed activations
USABLE = 0.9  # of a device's memory: the rest is fragmentation and programs
SATURATED = 32  # images per device in a micro-batch from which more are hardly faster
MAX_BATCH, MIN_BATCH = 4096, 16
STEPS_PER_EPOCH = 40  # at least, of batches above 256
MIN_STEPS, EPOCHS = 10_000, (100, 800)
MFU = 0.35  # of a GPU's or TPU's peak, for an expected duration
REMEDY = "choose a smaller --size or --image-size, or more devices"


@dataclass(frozen=True)
class Devices:
    """The accelerators, or the CPU, of this machine. memory: bytes that a program can use, each."""

    platform: str
    kind: str
    count: int
    memory: int

    def __str__(self) -> str:
        return f"{self.count} × {self.kind}, {self.memory / GIB:.1f} GiB each"


@dataclass(frozen=True)
class BatchChoice:
    """How a batch is computed. lines: what was chosen, and why."""

    batch: int
    accum_steps: int
    remat: str
    fsdp: int
    dtype: str
    lines: tuple[str, ...]

    @property
    def micro_batch(self) -> int:
        """Images of all devices in a micro-batch."""
        return self.batch // self.accum_steps


def parameters(model: ModelConfig, token_width: int) -> tuple[int, int]:
    """Returns the numbers of parameters of the encoder and of both decoders, without biases."""
    width, wide = model.width, model.decoder_width
    block = 4 + 2 * model.mlp_ratio
    encoder = model.depth * block * width**2 + 3 * model.patch**2 * width
    cross = 2 * wide**2 + 2 * len(model.taps) * width * wide
    decoder = model.decoder_depth * (block * wide**2 + cross) + wide * token_width
    return round(encoder), round(2 * decoder)


def activation_bytes(model: ModelConfig, *, dtype: str, kernels: bool) -> float:
    """Returns the bytes per image that the backward pass needs without recomputation.

    kernels: attention scores are not stored (ours for GPUs and TPUs).
    """
    shape = model.segments
    tokens = segments.visible_count(shape) * model.grid**2 // segments.count(shape) + 1
    encoder = tokens * model.width * model.depth
    decoder = tokens * model.decoder_width * 2 * model.decoder_depth
    size = ENCODER_BYTES * encoder + DECODER_BYTES * decoder
    if not kernels:
        maps = model.depth * model.heads + 4 * model.decoder_depth * model.decoder_heads
        size += SCORE_BYTES * maps * tokens**2
    return size * (2 if dtype == "float32" else 1)


def small_batch(images: int) -> int:
    """Returns a batch size for few images: the largest power of two that makes four steps per
    epoch, but from 16 to 256, and never more than the images."""
    return _power_of_two(min(max(images // 4, MIN_BATCH), 256, images))


def default_batch(images: int) -> int:
    """Returns `small_batch`, or with more images the largest power of two that makes 40 steps per
    epoch, at most 4096."""
    large = _power_of_two(min(max(images // STEPS_PER_EPOCH, 1), MAX_BATCH))
    return max(small_batch(images), large)


def default_epochs(images: int, batch: int) -> int:
    """Returns 100 epochs, or as many as make 10,000 steps, but at most 800."""
    least, most = EPOCHS
    return min(max(least, math.ceil(MIN_STEPS * batch / images)), most)


def choose(
    model: ModelConfig, devices: Devices, images: int, token_width: int, batch: int | None = None
) -> BatchChoice:
    """Chooses how to train `model` on `images` training images; batch: requested.

    In this order: the whole batch at once; micro-batches; recomputed activations (a quarter
    slower); parameters sharded over the devices. Raises UserError if nothing fits.
    """
    dtype = "float32" if devices.platform == "cpu" else "bfloat16"
    lines = [f"device: {devices}; matmuls in {dtype}"]
    batch = _whole_batch(devices, images, batch, lines)
    rows, count = batch // devices.count, sum(parameters(model, token_width))
    per_image = MARGIN * activation_bytes(model, dtype=dtype, kernels=devices.platform != "cpu")
    budget, fewest = USABLE * devices.memory, min(rows, SATURATED)
    for fsdp in dict.fromkeys((1, devices.count)):
        state = STATE_BYTES * count / fsdp
        for remat, share, least in (("none", 1, fewest), ("full", FULL_REMAT, 1)):
            fitting = int((budget - state) // (share * per_image))
            if fitting < least:
                continue
            micro = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= fitting)
            used = state + micro * share * per_image
            splits = counted(rows // micro, "micro-batch", "micro-batches")
            shard = f", parameters sharded over {fsdp} devices" if fsdp > 1 else ""
            lines.append(
                f"{splits} of {micro} per device, remat {remat}{shard}: about {used / GIB:.1f} GiB "
                f"of {budget / GIB:.1f} per device (computed)"
            )
            return BatchChoice(batch, rows // micro, remat, fsdp, dtype, tuple(lines))
    raise UserError(
        f"a training step of {counted(1, 'image')} needs about "
        f"{(STATE_BYTES * count / devices.count + FULL_REMAT * per_image) / GIB:.1f} GiB per "
        f"device, there are {budget / GIB:.1f} ({devices}): {REMEDY}"
    )


def _whole_batch(devices: Devices, images: int, batch: int | None, lines: list[str]) -> int:
    """Returns the batch size, a multiple of the number of devices; adds the reason to lines."""
    count = devices.count
    if count > images:
        raise UserError(f"{counted(images, 'image')} for {count} devices: use fewer devices")
    if batch is None:
        chosen = max(default_batch(images) // count * count, count)
        lines.append(f"batch {chosen}, by the number of training images ({images})")
        return chosen
    if batch > images:
        chosen = max(_power_of_two(images) // count * count, count)
        lines.append(f"batch {chosen} instead of {batch}: there are {images} training images")
        return chosen
    if batch % count:
        raise UserError(
            f"--batch={batch} is not divisible by the {count} devices: choose "
            f"{max(batch // count, 1) * count}"
        )
    lines.append(f"batch {batch}, as requested")
    return batch


def duration_line(model: ModelConfig, devices: Devices, token_width: int, images: int) -> str:
    """Returns a line about the expected duration of training on `images`, all epochs counted."""
    measured = "the progress line shows the time left, measured"
    chip = chips.of(devices.kind)
    if chip is None:
        return f"duration: {measured} after the first steps"
    seconds = images * flops.step_flops(
        model, out_width=token_width, decoders=("next", "visible"), teacher=None
    )
    seconds /= MFU * chip.flops * devices.count
    return (
        f"duration: about {seconds / 3600:.1f} h of training, computed at {MFU:.0%} of the "
        f"{chip.name}'s peak; {measured}"
    )


def as_dict(choice: BatchChoice) -> dict[str, Any]:
    """Returns the fields of TrainConfig; recomputation, precision and mesh if not by default."""
    fields: dict[str, Any] = {"batch_size": choice.batch, "accum_steps": choice.accum_steps}
    if choice.dtype != "bfloat16":
        fields["dtype"] = choice.dtype
    if choice.remat != "none":
        fields["model.remat"] = choice.remat
    if choice.fsdp > 1:
        fields["mesh.fsdp"] = choice.fsdp
    return fields


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)
