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
        f"next: add results by {invocation.command('evaluate')}, with --config=knn_in1k, "
        f"fewshot_in1k, linear_in1k or robustness_in1k"
    )


if __name__ == "__main__":
    cli.run(main)
