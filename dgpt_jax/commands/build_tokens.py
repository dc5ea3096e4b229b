"""Builds a token store from a TFDS image dataset and the weights of a teacher.

python tools/build_tokens.py --config=tokens_in1k_openclip_h14 --out=DIR

On several hosts or GPUs, start it on all of them; each builds its share.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands import next_commands
from dgpt_jax.config import TokensConfig
from dgpt_jax.distributed import multihost, preemption
from dgpt_jax.errors import counted
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.storage import output_paths
from dgpt_jax.tokens import build


def main():
    parser = cli.parser(__doc__, TokensConfig)
    parser.add_argument(
        "--out", type=cli.path, required=True, help="directory of the store, created if missing"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="verify complete shards by checksum; default: by size",
    )
    args, config = cli.parse(parser, TokensConfig)
    output_paths.directory(args.out)
    multihost.start(config.hosts, config.platform)
    preemption.raise_on_sigterm()
    kernel_check.select(config.kernels, cli.say)
    info = build.build(config, args.out, check=args.check)
    teacher = info.teacher
    least, mean = teacher.cosine
    variance = f", {teacher.variance:.2%} of their variance" if teacher.is_reduced else ""
    print(
        f"{args.out}: {counted(config.views, 'view')} of "
        f"{counted(info.source['examples'], 'image')}, {teacher.codec} "
        f"tokens {teacher.tokens}×{teacher.width}{variance}, cosine to exact tokens {mean:.5f} "
        f"(least {least:.5f})"
    )
    print(f"next: {next_commands.verify_tokens(args.out, config.teacher)}")


if __name__ == "__main__":
    cli.run(main)
