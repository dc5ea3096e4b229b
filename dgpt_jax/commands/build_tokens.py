"""Builds a token store from a TFDS image dataset and the weights of a teacher.

python tools/build_tokens.py --config=tokens_in1k_openclip_h14 --out=DIR

On several hosts or GPUs, start it on all of them; each builds its share. Further teachers
(config.teachers.NAME.weights) follow, from the stored images; --only=NAME adds one to a store.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

from dgpt_jax import cli
from dgpt_jax.commands import next_commands
from dgpt_jax.config import TokensConfig
from dgpt_jax.data import further_teachers
from dgpt_jax.data.teacher_info import TeacherInfo
from dgpt_jax.distributed import multihost, preemption
from dgpt_jax.errors import UserError, counted
from dgpt_jax.models.kernels import kernel_check
from dgpt_jax.storage import output_paths
from dgpt_jax.tokens import build, further


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
    parser.add_argument(
        "--only",
        metavar="NAME",
        help="tokens of config.teachers.NAME alone, from the stored images of a finished store",
    )
    args, config = cli.parse(parser, TokensConfig)
    if args.only is not None and args.only not in config.teachers:
        raise UserError(f"--only={args.only}: the config has no config.teachers.{args.only}")
    output_paths.directory(args.out)
    multihost.start(config.hosts, config.platform)
    preemption.raise_on_sigterm()
    kernel_check.select(config.kernels, cli.say)
    if args.only is None:
        info = build.build(config, args.out, check=args.check)
        images = f"{counted(config.views, 'view')} of {counted(info.source['examples'], 'image')}"
        print(f"{args.out}: {images}, {_tokens(info.teacher)}")
    for name in config.teachers if args.only is None else (args.only,):
        teacher = further.add(config, args.out, name, check=args.check).teacher
        print(f"{further_teachers.path_of(args.out, name)}: {_tokens(teacher)}")
    last = args.only or next(reversed(config.teachers), None)
    settings = config.teachers[last] if last else config.teacher
    print(f"next: {next_commands.verify_tokens(args.out, settings, last)}")


def _tokens(teacher: TeacherInfo) -> str:
    """Codec, shape and measured cosine of a teacher's tokens."""
    least, mean = teacher.cosine
    variance = f", {teacher.variance:.2%} of their variance" if teacher.is_reduced else ""
    return (
        f"{teacher.codec} tokens {teacher.tokens}×{teacher.width}{variance}, cosine to exact "
        f"tokens {mean:.5f} (least {least:.5f})"
    )


if __name__ == "__main__":
    cli.run(main)
