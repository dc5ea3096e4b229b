"""Says what a config will need on TPUs that are not there, before they are paid for.

    python tools/plan.py --config=configs/pretrain_b16_in1k.py --topology=v5e:4x4 [--topology=…]

compiles the real step for each topology (a minute or two, on any machine, extra `plan`) and prints
memory, FLOPs, collectives and lower bounds of time, throughput and cost. Exits with 1 where a step
does not fit, after searching for the change that makes it fit. --device=gpu prints what can be said
of GPUs without compiling. --images_a_chip=64 with several topologies shows weak scaling: the batch
grows with the chips; --plot=FILE.png draws it.

    python tools/plan.py --config=configs/linear_in1k.py --topology=v5e:4x4 --width=1280

plans an evaluation on frozen features of this width: their memory, and that of the kNN search or of
the linear fit, for ImageNet-1K or for --examples, --test_examples and --classes.
"""

import dgpt_jax.starting  # noqa: F401

import dataclasses
import json

import jax

from dgpt_jax import chips, cli, flops, outputs, plan, plan_evals, tasks
from dgpt_jax.chips import GIB, Topology
from dgpt_jax.config import Evaluate, Train
from dgpt_jax.schema import UserError

# Flags of an evaluation.
SIZES = {
    "width": "numbers of a feature",
    "examples": "training examples",
    "test_examples": "test examples",
    "classes": "number of classes",
}


def report(made: plan.Plan, run: Train) -> dict:
    """A plan as plain numbers: bytes, FLOPs, seconds; those of one chip, unless named otherwise."""
    bounds = made.bounds
    return {
        "topology": str(made.topology),
        "chips": made.topology.chips,
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
            {"kind": c.kind, "group": c.group, "dcn": c.dcn, "count": c.count, "bytes": c.bytes,
             "wire_bytes": c.wire_bytes}
            for c in made.collectives
        ],
        "bound_seconds": dataclasses.asdict(bounds),
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
        over = f"{c['group']} slices" if c["dcn"] else f"{c['group']}"
        lines.append(
            f"  {c['kind']} over {over}: {c['count']} a step, {c['bytes'] / 1e6:.2f} MB, "
            f"{c['wire_bytes'] / 1e6:.2f} MB sent"
        )
    each = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in found["bound_seconds"].items())
    lines.append(
        f"  at least {max(found['bound_seconds'].values()) * 1e3:.1f} ms a step, bound by "
        f"{found['binding']} ({each} ms): {found['images_a_second_and_chip']:.0f} images/s a chip, "
        f"MFU {found['mfu']:.0%}"
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


def plot(reports: list[dict], title: str, out: str):
    """Throughput of a chip against their number: if communication hides behind the rest of the
    step, and if none of it does."""
    from plot import plt, save

    figure, axis = plt.subplots(figsize=(6, 3.6))
    chip_counts = [found["chips"] for found in reports]
    for name, label in (("hidden", "communication hidden"), ("exposed", "none of it hidden")):
        axis.plot(chip_counts, [plan_rate(r, name) for r in reports], marker="o", label=label)
    axis.set(xscale="log", xlabel="chips", ylabel="images/s a chip, at most", title=title)
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axis.set_xticks(chip_counts, [str(n) for n in chip_counts])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    save(figure, out)


def plan_rate(found: dict, communication: str) -> float:
    """images/s a chip at the bound, communication "hidden" behind the rest or "exposed"."""
    bound = found["bound_seconds"]
    work, wires = max(bound["compute"], bound["memory"]), bound["ici"] + bound["dcn"]
    seconds = max(work, wires) if communication == "hidden" else work + wires
    return found["images_a_chip"] / seconds


def table(reports: list[dict]) -> str:
    """Markdown of weak scaling."""
    lines = [
        "| topology | images a chip | sent, GB a chip | compute, memory, ICI, DCN: ms | images/s a "
        "chip: hidden, exposed |",
        "|---|---|---|---|---|",
    ]
    for found in reports:
        bound = ", ".join(f"{1e3 * s:.1f}" for s in found["bound_seconds"].values())
        sent = sum(c["wire_bytes"] for c in found["collectives"]) / 1e9
        rates = ", ".join(f"{plan_rate(found, name):.0f}" for name in ("hidden", "exposed"))
        lines.append(
            f"| {found['topology']} | {found['images_a_chip']:g} | {sent:.2f} | {bound} | {rates} |"
        )
    return "\n".join(lines)


def on_gpus(run: Train) -> str:
    """What can be said of GPUs without compiling."""
    needed = tasks.planned(run).model_flops()
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


def evaluations(arguments, settings: Evaluate):
    """Prints the plan of an evaluation for each topology. Raises UserError if one does not fit."""
    if arguments.images_a_chip or arguments.plot or arguments.device == "gpu":
        raise UserError("--images_a_chip, --plot and --device=gpu are for training configs")
    if arguments.width is None:
        raise UserError(
            "give the --width of the features: 768 for B/16, 1024 for L/14, 1280 for H/14"
        )
    sizes = {name: getattr(arguments, name) for name in SIZES}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"--{name} must be positive, got {size}")
    sizes = plan_evals.Sizes(**sizes)
    failed = []
    say = (lambda line: None) if arguments.json else print
    for topology in map(chips.topology, arguments.topology):
        try:
            planned = plan_evals.plan_evaluation(settings, sizes, topology)
            numbers = planned.report()
            say(planned)
        except plan.DoesNotFit as e:
            numbers = {"topology": str(topology), "fits": False, "needed_bytes": e.needed}
            failed.append(f"{topology} does not fit: it {e}; {plan_evals.advice(settings)}")
        if arguments.json:
            print(json.dumps(numbers))
    if failed:
        raise UserError("\n".join(failed))


def main():
    made = cli.parser(__doc__, Train)
    made.add_argument("--topology", action="append", default=[], help="v5e:4x4, 2*v5e:16x16, …")
    made.add_argument("--device", choices=["tpu", "gpu"], default="tpu")
    made.add_argument("--images_a_chip", type=int, help="instead of config.batch_size")
    made.add_argument(
        "--plot",
        type=cli.local_path,
        metavar="FILE.png",
        help="draw weak scaling over the topologies",
    )
    made.add_argument("--json", action="store_true", help="print JSON, one line a topology")
    for name, what in SIZES.items():
        made.add_argument(f"--{name}", type=int, help=f"of an evaluation: {what}")
    evaluates = "protocol" in cli.load_config(made.parse_known_args()[0].config)
    arguments, run = cli.parse(made, Evaluate if evaluates else Train)
    if arguments.plot:
        from plot import FORMATS

        outputs.file(arguments.plot, FORMATS)
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on an accelerator
    if arguments.device == "gpu" and not evaluates:
        print(on_gpus(run))
        return
    if not arguments.topology:
        raise UserError("name a --topology, like v5e:4x4 or v5p:4x4x8")
    if evaluates:
        evaluations(arguments, run)
    else:
        trainings(arguments, run)


def trainings(arguments, run: Train):
    """Prints the plan of a training for each topology. Raises UserError if one does not fit."""
    reports, failed = [], []
    say = (lambda line: None) if arguments.json else print
    for topology in map(chips.topology, arguments.topology):
        if arguments.images_a_chip:
            batch_size = arguments.images_a_chip * topology.chips
            run = dataclasses.replace(run, batch_size=batch_size)
        try:
            found = report(plan.plan(run, topology), run)
            reports.append(found)
            say(text(found))
        except plan.DoesNotFit as e:
            found = does_not_fit(run, topology, e, say)
            failed.append(f"{topology} does not fit: it {e}; {found['advice']}")
        if arguments.json:
            print(json.dumps(found))
    if arguments.images_a_chip:
        say(table(reports))
    if arguments.plot:
        plot(reports, f"{run.model.size}, at most (data sheets)", arguments.plot)
    if failed:
        raise UserError("\n".join(failed))


if __name__ == "__main__":
    cli.run(main)
