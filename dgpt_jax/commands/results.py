"""Tabulates results beside published numbers: python tools/results.py RESULTS.json…

The files are results of `python -m dgpt_jax.evaluate`, one per model, and those that fine-tuning
or a probe writes to its work directory; results of the same weights are merged. Without files only
the published numbers are printed.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli, invocation
from dgpt_jax.evals import report


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("files", type=cli.path, nargs="*", help="results files")
    args = parser.parse_args()
    print(report.report(args.files))
    print(
        f"next: {invocation.command('evaluate')} --config=knn_in1k --checkpoint=RUN; --config=list "
        f"prints the other protocols"
    )


if __name__ == "__main__":
    cli.run(main)
