"""Results of models beside published numbers, as Markdown: python tools/report.py RESULTS.json…

The files are those that `python -m dgpt_jax.evaluate` adds its results to, one a model, and those
that a fine-tuning or a probe leaves in its work directory; what is about the same weights is put
together. Without any the published numbers are printed alone.
"""

import dgpt_jax.starting  # noqa: F401

from dgpt_jax import cli, report


def main():
    made = cli.parser(__doc__)
    made.add_argument("files", type=cli.path, nargs="*", help="files of results")
    args = made.parse_args()
    print(report.report(args.files))
    print(
        "next: python -m dgpt_jax.evaluate --config=configs/knn_in1k.py --checkpoint=RUN, and the "
        "other protocols in configs/"
    )


if __name__ == "__main__":
    cli.run(main)
