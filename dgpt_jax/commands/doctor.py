"""Looks at what training needs of this machine, and says for each thing whether it is well.

    python tools/doctor.py TOKENS IMAGES --workdir=RUN
    python tools/doctor.py --coordinator=HOST:PORT --processes=N      # on all N hosts at once

Packages against the tested versions, devices and their drivers, whether our kernels compute on them
what XLA does, memory; data sets and token stores with their counts; whether the work directory can
be written to; whether the hosts of a run reach process 0. On all workers of a TPU slice, under srun
or in a JobSet the processes join as training does. A line is ok, warn or fail, with the remedy;
exit code 1 if one is fail.
"""

import dgpt_jax.starting  # noqa: F401

import itertools
import sys

import jax

from dgpt_jax import cli, doctor, kernel_check
from dgpt_jax.config import Hosts


def findings(arguments):
    """Finding after finding; what may wait for others comes last."""
    yield from doctor.packages()
    yield from doctor.accelerators()
    yield from doctor.memory()
    yield from itertools.chain.from_iterable(map(doctor.data, arguments.data))
    if arguments.workdir:
        yield from doctor.workdir(arguments.workdir)
    if arguments.coordinator:
        yield from doctor.reach(arguments.coordinator, arguments.processes, arguments.wait)
    yield from (found := doctor.devices(Hosts(), arguments.platform))
    if found[-1].level == "ok" and jax.default_backend() != "cpu":
        yield from kernel_check.kernels()


def main():
    made = cli.parser(__doc__)
    made.add_argument(
        "data", type=cli.path, nargs="*", help="token stores and image datasets, near or on gs://"
    )
    made.add_argument("--workdir", type=cli.path, help="directory of a run")
    made.add_argument("--platform", default="", help="tpu, gpu or cpu; default: what JAX finds")
    made.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0 of a run")
    made.add_argument("--processes", type=int, default=2, help="hosts of it; default %(default)s")
    made.add_argument(
        "--wait", type=float, default=60, help="seconds for them to meet; default %(default)s"
    )
    arguments = made.parse_args()
    failed = 0
    for finding in findings(arguments):
        print(finding, flush=True)
        failed += finding.level == "fail"
    if failed:
        print(f"next: mend the {failed} that fail, and run this again")
        sys.exit(1)
    print(
        "next: python -m dgpt_jax.train --config=configs/… --workdir=RUN --config.data.path=TOKENS"
    )


if __name__ == "__main__":
    cli.run(main)
