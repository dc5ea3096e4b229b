"""Estimates memory, speed and cost of a config on TPUs, without TPUs.

    python tools/plan.py --config=pretrain_b16_in1k --topology=v5e:4x4 [--topology=…]

compiles the training step for each topology (a minute or two, on any machine, extra `plan`) and
prints memory, FLOPs, collectives and bounds of time, throughput and cost. If a step does not fit,
it searches for a change that makes it fit, and exits with 1. --device=gpu prints bounds for GPUs,
computed without compiling. --images_a_chip=64 with several topologies shows weak scaling, with a
batch that grows with the number of chips; --plot=FILE.png plots it.

    python tools/plan.py --config=linear_in1k --topology=v5e:4x4 --width=1280

plans an evaluation on frozen features of this width: their memory, and that of the kNN search or
the linear fit, for ImageNet-1K or for --examples, --test_examples and --classes.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax

from dgpt_jax import cli, invocation
from dgpt_jax.config import EvaluateConfig, TrainConfig
from dgpt_jax.errors import UserError
from dgpt_jax.planning import chips, fit_search, plan_evals, report
from dgpt_jax.planning.chips import GIB, Topology
from dgpt_jax.planning.plan import DoesNotFit, plan_training
from dgpt_jax.storage import output_paths

# Flags for evaluation configs.
SIZES = {
    "width": "width of the features",
    "examples": "number of training examples",
    "test_examples": "number of test examples",
    "classes": "number of classes",
}


def report_misfit(
    config: TrainConfig, topology: Topology, error: DoesNotFit, say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the report of a step that does not fit, with a change that makes it fit."""
    say(f"{topology} {error}; searching for a change that fits …")
    fitting = fit_search.first_fitting_change(config, topology, say)
    if fitting is None:
        advice = "and no micro-batches, fsdp or remat make it fit: use more or larger chips"
    else:
        flags, plan = fitting
        advice = f"it fits ({plan.peak_bytes / GIB:.2f} GiB) with {flags}"
    return {
        "topology": str(topology),
        "fits": False,
        "needed_bytes": error.needed,
        "advice": advice,
    }


def plan_trainings(arguments: argparse.Namespace, config: TrainConfig):
    """Prints the plan of the training step for each topology. Raises UserError if one does not
    fit."""
    reports, failed = [], []
    say = (lambda line: None) if arguments.json else print
    for topology in map(chips.topology, arguments.topology):
        if arguments.images_a_chip:
            batch_size = arguments.images_a_chip * topology.chips
            config = dataclasses.replace(config, batch_size=batch_size)
        try:
            numbers = report.as_dict(plan_training(config, topology))
            reports.append(numbers)
            say(report.as_text(numbers))
        except DoesNotFit as e:
            numbers = report_misfit(config, topology, e, say)
            failed.append(f"{topology} does not fit: it {e}; {numbers['advice']}")
        if arguments.json:
            print(json.dumps(numbers))
    if arguments.images_a_chip:
        say(report.scaling_table(reports))
    if arguments.plot:
        from dgpt_jax.commands import charts

        rates = {
            label: [report.rate(numbers, name) for numbers in reports]
            for name, label in report.COMMUNICATION.items()
        }
        chip_counts = [numbers["chips"] for numbers in reports]
        title = f"{config.model.size}, at most (data sheets)"
        charts.scaling(chip_counts, rates, arguments.plot, title)
    if failed:
        raise UserError("\n".join(failed))


def plan_evaluations(arguments: argparse.Namespace, config: EvaluateConfig):
    """Prints the plan of an evaluation for each topology. Raises UserError if one does not fit."""
    if arguments.images_a_chip or arguments.plot or arguments.device == "gpu":
        raise UserError("--images_a_chip, --plot and --device=gpu are for training configs")
    if arguments.width is None:
        raise UserError(
            "--width of the features is missing: 768 for B/16, 1024 for L/14, 1280 for H/14"
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
            plan = plan_evals.plan_evaluation(config, sizes, topology)
            numbers = plan.report()
            say(str(plan))
        except DoesNotFit as e:
            numbers = {"topology": str(topology), "fits": False, "needed_bytes": e.needed}
            failed.append(f"{topology} does not fit: it {e}; {plan_evals.advice(config)}")
        if arguments.json:
            print(json.dumps(numbers))
    if failed:
        raise UserError("\n".join(failed))


def main():
    parser = cli.parser(__doc__ or "", TrainConfig, EvaluateConfig)
    parser.add_argument("--topology", action="append", default=[], help="v5e:4x4, 2*v5e:16x16, …")
    parser.add_argument("--device", choices=["tpu", "gpu"], default="tpu")
    parser.add_argument("--images_a_chip", type=int, help="instead of config.batch_size")
    parser.add_argument(
        "--plot",
        type=cli.local_path,
        metavar="FILE.png",
        help="plot weak scaling over the topologies",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line per topology")
    for name, description in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"of an evaluation: {description}")
    evaluates = "protocol" in cli.load_config(parser.parse_known_args()[0].config)
    arguments, config = cli.parse(parser, EvaluateConfig if evaluates else TrainConfig)
    if arguments.plot:
        from dgpt_jax.commands.plot import FORMATS

        output_paths.file(arguments.plot, FORMATS)
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on an accelerator
    if arguments.device == "gpu" and not evaluates:
        print(report.gpu_text(config))
    elif not arguments.topology:
        raise UserError("--topology is missing: v5e:4x4 or v5p:4x4x8, for example")
    elif evaluates:
        plan_evaluations(arguments, config)
    else:
        plan_trainings(arguments, config)
    if not arguments.json:
        name = "evaluate" if evaluates else "train"
        command = invocation.command(name)
        print(f"next: run {command} with the same config flags on these devices")


if __name__ == "__main__":
    cli.run(main)
