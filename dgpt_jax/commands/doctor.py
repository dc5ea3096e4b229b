"""Checks whether this machine can train, and suggests fixes.

    python tools/doctor.py TOKENS IMAGES --workdir=RUN
    python tools/doctor.py --coordinator=HOST:PORT --num_processes=N      # on all N hosts at once

Checks versions of packages, memory, devices and drivers, our kernels on them against XLA, datasets
and token stores, write access to the work directory, and connections from all hosts to process 0.
On all workers of a TPU slice, under srun or in a JobSet, the processes join like in training.
Prints a line per check: ok, warn or fail, with a remedy. Exits with 1 if a check fails.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse
import itertools
import sys
from collections.abc import Iterator

import jax

from dgpt_jax import cli, invocation
from dgpt_jax.commands import next_commands
from dgpt_jax.config import HostsConfig
from dgpt_jax.data import token_store
from dgpt_jax.errors import counted
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.planning import coordinator, doctor


def findings(arguments: argparse.Namespace) -> Iterator[doctor.Finding]:
    """Yields the findings of all checks; those that wait for other hosts come last."""
    yield from doctor.packages()
    yield from doctor.accelerators()
    yield from doctor.memory()
    yield from itertools.chain.from_iterable(map(doctor.data, arguments.data))
    if arguments.workdir:
        yield from doctor.workdir(arguments.workdir)
    if arguments.coordinator:
        yield from coordinator.check(arguments.coordinator, arguments.num_processes, arguments.wait)
    yield from (devices := doctor.devices(HostsConfig(), arguments.platform))
    if devices[-1].level == "ok" and jax.default_backend() != "cpu":
        yield from map(kernel_finding, kernel_check.deviations())


def kernel_finding(deviation: kernel_check.Deviation) -> doctor.Finding:
    """Returns the finding for one kernel."""
    if deviation.ok:
        return doctor.Finding("ok", str(deviation))
    remedy = "train with --config.kernels=xla, and report device and jax version"
    return doctor.Finding("fail", str(deviation), remedy)


def main():
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "data", type=cli.path, nargs="*", help="token stores and image datasets, local or on gs://"
    )
    parser.add_argument("--workdir", type=cli.path, help="work directory of a run")
    parser.add_argument("--platform", default="", help="tpu, gpu or cpu; default: JAX's choice")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 of a run")
    parser.add_argument(
        "--num_processes", type=int, default=2, help="number of hosts; default %(default)s"
    )
    parser.add_argument(
        "--wait", type=float, default=60, help="seconds to wait for hosts; default %(default)s"
    )
    arguments = parser.parse_args()
    failed = 0
    for finding in findings(arguments):
        print(finding, flush=True)
        failed += finding.level == "fail"
    if failed:
        print(f"next: fix the {counted(failed, 'failed check')}, and run this again")
        sys.exit(1)
    if stores := [path for path in arguments.data if token_store.exists(path)]:
        examples = next_commands.store_examples(stores[0])
        print(f"next: {next_commands.train(stores[0], arguments.workdir or 'RUN', examples)}")
    else:
        print(
            f"next: build a token store with {invocation.command('tokens')}, and check it as well"
        )


if __name__ == "__main__":
    cli.run(main)
