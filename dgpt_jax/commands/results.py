"""Tabulates results beside published numbers: python tools/results.py RESULTS.json…

The files are results of `python -m dgpt_jax.evaluate`, one per model, and those that fine-tuning
or a probe writes to its work directory; results of the same weights are merged. Without files only
the published numbers are printed.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.evals import report


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("files", type=cli.path, nargs="*", help="results files")
    args = parser.parse_args()
    print(report.report(args.files))
    print(
        "next: add results by python -m dgpt_jax.evaluate, with knn_in1k.py, fewshot_in1k.py, "
        "linear_in1k.py or robustness_in1k.py of configs/"
    )


if __name__ == "__main__":
    cli.run(main)
