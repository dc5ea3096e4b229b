"""Plans of training steps as JSON, text and Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dgpt_jax.config import TrainConfig
from dgpt_jax.models import flops
from dgpt_jax.monitoring.progress import duration
from dgpt_jax.planning import chips
from dgpt_jax.planning.chips import GIB
from dgpt_jax.planning.plan import Plan, libtpu_version, steps_of
from dgpt_jax.training import tasks

# {argument of `rate`: label in figures}
COMMUNICATION = {"hidden": "communication hidden", "exposed": "communication exposed"}


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain numbers: bytes, FLOPs, seconds; per chip unless the key says so."""
    bounds = plan.bounds
    return {
        "topology": str(plan.topology),
        "chips": plan.topology.chips,
        "fits": True,
        "mesh": plan.mesh,
        "images_a_chip": plan.images,
        "hbm_bytes": {
            "params": plan.params_bytes, "optimizer": plan.optimizer_bytes,
            "batch": plan.batch_bytes, "temporaries": plan.temporary_bytes,
            "code": plan.code_bytes, "sum": plan.peak_bytes, "available": plan.topology.chip.hbm,
        },
        "model_flops_an_image": plan.model_flops,
        "compiled_flops_an_image": plan.compiled_flops / plan.images,
        "moved_bytes": plan.moved_bytes,
        "collectives": [
            {"kind": c.kind, "group": c.group, "dcn": c.dcn, "count": c.count, "bytes": c.bytes,
             "wire_bytes": c.wire_bytes}
            for c in plan.collectives
        ],
        "bound_seconds": dataclasses.asdict(bounds),
        "binding": bounds.binding,
        "images_a_second_and_chip": plan.images / bounds.seconds,
        "mfu": plan.mfu,
        "steps": plan.steps,
        "chip_hours": plan.chip_hours,
        "days": plan.steps and plan.steps * bounds.seconds / 86400,
        "largest_batch_a_chip_estimated": plan.largest_batch(),
        "compile_seconds": plan.compile_seconds,
        "libtpu": libtpu_version(),
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """Formats a report of `as_dict` as lines of text."""
    hbm = {name: f"{size / GIB:.2f}" for name, size in report["hbm_bytes"].items()}
    ratio = report["hbm_bytes"]["sum"] / report["hbm_bytes"]["available"]
    lines = [
        f"{report['topology']}, mesh {report['mesh']}, {report['images_a_chip']:g} images per chip",
        f"  fits: {hbm['sum']} of {hbm['available']} GiB per chip ({ratio:.0%}): params "
        f"{hbm['params']}, optimizer {hbm['optimizer']}, batch {hbm['batch']}, temporaries "
        f"{hbm['temporaries']}, code {hbm['code']}; about "
        f"{report['largest_batch_a_chip_estimated']} images per chip would fit (estimated)",
        f"  FLOPs per image: model {report['model_flops_an_image'] / 1e9:.1f} G, compiled "
        f"{report['compiled_flops_an_image'] / 1e9:.1f} G (without kernels)",
        f"  HBM traffic: {report['moved_bytes'] / 1e9:.1f} GB per step",
    ]
    for c in report["collectives"]:
        group = f"{c['group']} slices" if c["dcn"] else f"{c['group']}"
        lines.append(
            f"  {c['kind']} over {group}: {c['count']} per step, {c['bytes'] / 1e6:.2f} MB, "
            f"{c['wire_bytes'] / 1e6:.2f} MB sent"
        )
    bounds = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in report["bound_seconds"].items())
    lines.append(
        f"  at least {max(report['bound_seconds'].values()) * 1e3:.1f} ms per step, bound by "
        f"{report['binding']} ({bounds} ms): at most {report['images_a_second_and_chip']:.0f} "
        f"images/s per chip, MFU {report['mfu']:.0%}"
    )
    if report["steps"]:
        lines.append(
            f"  {report['steps']} steps: at least {report['chip_hours']:.0f} chip-hours, "
            f"{report['days']:.2f} days"
        )
    lines.append(f"  compiled in {report['compile_seconds']:.0f} s by libtpu {report['libtpu']}")
    return "\n".join(lines)


def rate(report: dict[str, Any], communication: str) -> float:
    """Returns images/s per chip at the bound, with communication "hidden" behind the rest of the
    step or "exposed"."""
    bound = report["bound_seconds"]
    work, network = max(bound["compute"], bound["memory"]), bound["ici"] + bound["dcn"]
    seconds = max(work, network) if communication == "hidden" else work + network
    return report["images_a_chip"] / seconds


def scaling_table(reports: Sequence[dict[str, Any]]) -> str:
    """Formats weak scaling as a Markdown table."""
    lines = [
        "| topology | images per chip | GB sent per chip | compute, memory, ICI, DCN: ms | "
        "images/s per chip: hidden, exposed |",
        "|---|---|---|---|---|",
    ]
    for report in reports:
        bounds = ", ".join(f"{1e3 * s:.1f}" for s in report["bound_seconds"].values())
        sent = sum(c["wire_bytes"] for c in report["collectives"]) / 1e9
        rates = ", ".join(f"{rate(report, name):.0f}" for name in COMMUNICATION)
        lines.append(
            f"| {report['topology']} | {report['images_a_chip']:g} | {sent:.2f} | {bounds} | "
            f"{rates} |"
        )
    return "\n".join(lines)


def gpu_text(config: TrainConfig) -> str:
    """Formats upper bounds of throughput on GPUs, computed from model FLOPs without compiling."""
    model_flops = tasks.task_without_data(config).model_flops()
    steps = steps_of(config)
    lines = [f"FLOPs per image: model {model_flops / 1e9:.1f} G ({flops.FORMULA})"]
    for gpu in chips.GPUS.values():
        images = gpu.flops / model_flops
        line = f"  {gpu.name}: at most {images:.0f} images/s at {gpu.flops / 1e12:.0f} TFLOP/s"
        if steps:
            seconds = steps * config.batch_size / images
            line += f", {steps} steps at least {duration(seconds)} of one GPU, "
            line += f"{duration(seconds / 0.45)} at 45% MFU"
        lines.append(line)
    return "\n".join(lines)
