"""Builds a token store from a TFDS image dataset and the weights of a teacher; a rerun continues.

python tools/build_tokens.py --config=configs/tokens_in1k_openclip_h14.py --out=DIR

On several hosts or GPUs, start it on all of them; each builds its part.
"""

import dgpt_jax.starting  # noqa: F401

import shlex

from dgpt_jax import build, cli, hosts, outputs, signals
from dgpt_jax.config import Tokens


def main():
    made = cli.parser(__doc__, Tokens)
    made.add_argument(
        "--out", type=cli.path, required=True, help="directory of the store; made if absent"
    )
    made.add_argument(
        "--check",
        action="store_true",
        help="read complete shards and compare checksums; default: their sizes",
    )
    args, config = cli.parse(made, Tokens)
    outputs.directory(args.out)
    hosts.start(config.hosts, config.platform)
    signals.raise_on_sigterm()
    info = build.build(config, args.out, check=args.check)
    least, mean = info.cosine
    kept = f", {info.variance:.2%} of their variance" if info.is_reduced else ""
    print(
        f"{args.out}: {config.views} view(s) of {info.source['examples']} images, {info.codec} "
        f"tokens {info.tokens}×{info.width}{kept}, cosine to exact tokens {mean:.5f} (least "
        f"{least:.5f})"
    )
    words = shlex.join([args.out, f"--weights={config.teacher.weights}"])
    print(f"next: python tools/verify_tokens.py {words}")


if __name__ == "__main__":
    cli.run(main)
