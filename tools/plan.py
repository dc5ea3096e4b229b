"""Says what a training config will need on TPUs that are not there, before they are paid for.

    python tools/plan.py --config=configs/pretrain_b16_in1k.py --topology=v5e:4x4 [--topology=…]

compiles the real step for each topology (a minute or two, on any machine, extra `plan`) and prints
memory, FLOPs, collectives and lower bounds of time, throughput and cost. Exits with 1 where a step
does not fit, after searching for the change that makes it fit. --device=gpu prints what can be said
of GPUs without compiling.
"""

import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: nothing here runs on an accelerator

from dgpt_jax import chips, cli, flops, plan
from dgpt_jax.chips import GIB, Topology
from dgpt_jax.config import Train
from dgpt_jax.schema import UserError
from dgpt_jax.tasks.pretrain import planned


def report(made: plan.Plan, run: Train) -> dict:
    """A plan as plain numbers: bytes, FLOPs, seconds; those of one chip, unless named otherwise."""
    bounds = made.bounds
    return {
        "topology": str(made.topology),
        "fits": True,
        "mesh": made.mesh,
        "images_a_chip": made.images,
        "hbm_bytes": {
            "params": made.params_bytes, "optimizer": made.optimizer_bytes,
            "batch": made.batch_bytes, "temporaries": made.temporary_bytes,
            "code": made.code_bytes, "sum": made.peak_bytes, "available": made.topology.chip.hbm,
        },
        "model_flops_an_image": made.model_flops,
        "compiled_flops_an_image": made.compiled_flops / made.images,
        "moved_bytes": made.moved_bytes,
        "collectives": [
            {"kind": c.kind, "group": c.group, "count": c.count, "bytes": c.bytes,
             "wire_bytes": c.wire_bytes}
            for c in made.collectives
        ],
        "bound_seconds": {"compute": bounds.compute, "memory": bounds.memory, "ici": bounds.ici},
        "binding": bounds.binding,
        "images_a_second_and_chip": made.images / bounds.seconds,
        "mfu": made.mfu,
        "steps": made.steps,
        "chip_hours": made.chip_hours,
        "days": made.steps and made.steps * bounds.seconds / 86400,
        "largest_batch_a_chip_estimated": plan.largest_batch(run, made),
        "compile_seconds": made.compile_seconds,
        "libtpu": plan.libtpu_version(),
    }  # fmt: skip


def text(found: dict) -> str:
    """A report to be read."""
    hbm = {name: f"{size / GIB:.2f}" for name, size in found["hbm_bytes"].items()}
    bound = {name: f"{1e3 * s:.1f}" for name, s in found["bound_seconds"].items()}
    ratio = found["hbm_bytes"]["sum"] / found["hbm_bytes"]["available"]
    lines = [
        f"{found['topology']}, mesh {found['mesh']}, {found['images_a_chip']:g} images a chip",
        f"  fits: {hbm['sum']} of {hbm['available']} GiB a chip ({ratio:.0%}): params "
        f"{hbm['params']}, optimizer {hbm['optimizer']}, batch {hbm['batch']}, temporaries "
        f"{hbm['temporaries']}, code {hbm['code']}; about "
        f"{found['largest_batch_a_chip_estimated']} images a chip would still fit (estimated)",
        f"  FLOPs an image: model {found['model_flops_an_image'] / 1e9:.1f} G, compiled "
        f"{found['compiled_flops_an_image'] / 1e9:.1f} G (without what is inside kernels)",
        f"  HBM traffic: {found['moved_bytes'] / 1e9:.1f} GB a step",
    ]
    for c in found["collectives"]:
        lines.append(
            f"  {c['kind']} over {c['group']}: {c['count']} a step, {c['bytes'] / 1e6:.2f} MB, "
            f"{c['wire_bytes'] / 1e6:.2f} MB sent"
        )
    lines.append(
        f"  at least {max(found['bound_seconds'].values()) * 1e3:.1f} ms a step, bound by "
        f"{found['binding']} (compute {bound['compute']}, memory {bound['memory']}, ici "
        f"{bound['ici']} ms): {found['images_a_second_and_chip']:.0f} images/s a chip, MFU "
        f"{found['mfu']:.0%}"
    )
    if found["steps"]:
        lines.append(
            f"  {found['steps']} steps: at least {found['chip_hours']:.0f} chip-hours, "
            f"{found['days']:.2f} days"
        )
    lines.append(f"  compiled in {found['compile_seconds']:.0f} s by libtpu {found['libtpu']}")
    return "\n".join(lines)


def does_not_fit(run: Train, topology: Topology, error: plan.DoesNotFit, say) -> dict:
    """What to change, found by compiling."""
    say(f"{topology} {error}; looking for a change that fits …")
    found = plan.changes_that_fit(run, topology, say)
    if found is None:
        advice = "and no micro-batches, fsdp or remat make it fit: take more or larger chips"
    else:
        words, made = found
        advice = f"it fits ({made.peak_bytes / GIB:.2f} GiB) with {words}"
    return {
        "topology": str(topology),
        "fits": False,
        "needed_bytes": error.needed,
        "advice": advice,
    }


def on_gpus(run: Train) -> str:
    """What can be said of GPUs without compiling."""
    task = planned(run)
    needed = plan.model_flops(run, task)
    steps = plan.steps_of(run)
    lines = [f"FLOPs an image: model {needed / 1e9:.1f} G ({flops.FORMULA})"]
    for gpu in chips.GPUS.values():
        images = gpu.flops / needed
        line = f"  {gpu.name}: at most {images:.0f} images/s at {gpu.flops / 1e12:.0f} TFLOP/s"
        if steps:
            hours = steps * run.batch_size / images / 3600
            line += (
                f", {steps} steps at least {hours:.0f} GPU-hours, {hours / 0.45:.0f} at 45 % MFU"
            )
        lines.append(line)
    return "\n".join(lines)


def main():
    made = cli.parser(__doc__, Train)
    made.add_argument("--topology", action="append", default=[], help="v5e:4x4, 2*v5e:16x16, …")
    made.add_argument("--device", choices=["tpu", "gpu"], default="tpu")
    made.add_argument("--json", action="store_true", help="print JSON, one line a topology")
    arguments, run = cli.parse(made, Train)
    if arguments.device == "gpu":
        print(on_gpus(run))
        return
    if not arguments.topology:
        raise UserError("name a --topology, like v5e:4x4 or v5p:4x4x8")
    failed = []
    for topology in map(chips.topology, arguments.topology):
        try:
            found = report(plan.plan(run, topology), run)
        except plan.DoesNotFit as e:
            found = does_not_fit(
                run, topology, e, lambda line: None if arguments.json else print(line)
            )
            failed.append(f"{topology} does not fit: it {e}; {found['advice']}")
        if arguments.json:
            print(json.dumps(found))
        elif found["fits"]:
            print(text(found))
    if failed:
        raise UserError("\n".join(failed))


if __name__ == "__main__":
    cli.run(main)
