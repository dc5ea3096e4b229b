"""Describes, extracts, merges and splits token stores, without decoding a record.

python tools/store.py info STORE                        also of an image dataset
python tools/store.py info STORE --sample=24 --out=FILE.png
python tools/store.py extract STORE OUT --fraction=0.1  or --count, --ids or --labels
python tools/store.py merge STORE STORE… OUT            stores of one teacher, codec and config
python tools/store.py split STORE OUT --fraction=0.1    into OUT/train and OUT/heldout

Records are copied unchanged, all views of an image together. --fraction, --count and split choose
by a hash of the id and --seed: an image keeps its side when the store grows, and a smaller fraction
is part of a larger one. An interrupted command resumes when it is run again, and the result is the
same, byte by byte.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import argparse
import functools
import json
import os
import shlex

import jax
from etils import epath

from dgpt_jax import cli
from dgpt_jax.commands import next_commands, store_info
from dgpt_jax.distributed import preemption
from dgpt_jax.errors import UserError, counted
from dgpt_jax.storage import output_paths
from dgpt_jax.tokens import derivations, derive, describe, selection, store_parts
from dgpt_jax.tokens.derive import Derived
from dgpt_jax.tokens.workers import Workers

SELECTIONS = ("ids", "fraction", "count", "labels")
# Flags of each action; others are refused.
FLAGS = {
    "info": ("sample", "out", "json", "check"),
    "extract": (*SELECTIONS, "seed", "check", "threads"),
    "merge": ("check", "threads"),
    "split": ("fraction", "seed", "names", "check", "threads"),
}
PATHS = {"info": "STORE", "extract": "STORE OUT", "merge": "STORE STORE… OUT", "split": "STORE OUT"}
THREADS = 4


def parse() -> argparse.Namespace:
    """The command's flags. Raises UserError."""
    parser = cli.parser(__doc__)
    parser.add_argument("action", choices=tuple(FLAGS))
    parser.add_argument("paths", type=cli.path, nargs="+", help="token stores, then OUT")
    parser.add_argument("--sample", type=int, help="info: images in the figure; default 12")
    parser.add_argument("--out", type=cli.local_path, help="info: figure of stored images (PNG)")
    parser.add_argument("--json", action="store_const", const=True, help="info: print JSON")
    parser.add_argument("--ids", type=cli.path, metavar="FILE", help="extract: one id per line")
    parser.add_argument(
        "--fraction", type=float, metavar="F",
        help="extract: about this fraction of the examples; split: that of the second store",
    )  # fmt: skip
    parser.add_argument("--count", type=int, metavar="N", help="extract: this number of examples")
    parser.add_argument(
        "--labels", metavar="NAME,…", help="extract: examples of these classes (names or numbers)"
    )
    parser.add_argument("--seed", type=int, least=0, help="of the hash of ids; default 0")
    parser.add_argument(
        "--names", metavar="A,B", help="split: directories in OUT; default train,heldout"
    )
    parser.add_argument(
        "--check", action="store_const", const=True,
        help="compare complete shards by checksum; default: by size",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help=f"shards copied at a time; default {THREADS}")
    args = parser.parse_intermixed_args()
    for name, value in vars(args).items():
        if name not in ("action", "paths", *FLAGS[args.action]) and value is not None:
            raise UserError(f"--{name} is no flag of {args.action}: see --help")
    least = {"info": 1, "merge": 3}.get(args.action, 2)
    if len(args.paths) < least or (args.action != "merge" and len(args.paths) > least):
        raise UserError(f"{args.action} takes {PATHS[args.action]} (see --help)")
    _check_selection(args)
    return args


def _check_selection(args: argparse.Namespace) -> None:
    """Raises UserError unless an action has the flags that it needs."""
    selections = [name for name in SELECTIONS if getattr(args, name) is not None]
    if args.action == "extract" and len(selections) != 1:
        flags = ", ".join(f"--{name}" for name in SELECTIONS)
        raise UserError(f"extract takes one of {flags}, not {len(selections)} of them")
    if args.action == "extract" and args.seed is not None and selections[0] in ("ids", "labels"):
        raise UserError(f"--seed has no effect with --{selections[0]}: leave it out")
    if args.action == "split" and args.fraction is None:
        raise UserError("split needs --fraction, as --fraction=0.1 for the second store")
    if args.fraction is not None and not 0 < args.fraction < 1:
        raise UserError(f"--fraction={args.fraction:g} is not between 0 and 1")
    if args.sample is not None and args.out is None:
        raise UserError("--sample needs --out=FILE.png")


def info(args: argparse.Namespace) -> None:
    """Prints the description of a store or dataset; draws a sample."""
    (path,) = args.paths
    if args.out:
        from dgpt_jax.commands import image_grid, plot

        output_paths.file(args.out, plot.FORMATS)
    description = describe.describe(path, check=bool(args.check))
    if args.out:
        rows, captions = store_info.figure(description, args.sample or image_grid.COLUMNS)
        image_grid.grid(rows, args.out, captions)
    if args.json:
        print(json.dumps(description))
    else:
        for line in store_info.lines(description):
            cli.say(line)
        if args.out:
            print(f"wrote {args.out}")
    if problem := description.get("problem"):
        raise UserError(problem)
    if not args.json:
        print(f"next: {store_info.next_command(description)}")


def _select(args: argparse.Namespace, workers: Workers) -> list[Derived]:
    """The store that `extract` writes, or the two of `split`."""
    source, out = args.paths
    store, seed = store_parts.open_store(source), args.seed or 0
    cli.say(f"reading the ids of {counted(len(store), 'example')} of {source}")
    index = store_parts.read_index(store, workers)
    if args.action == "split":
        outs = _sides(out, args.names)
        return list(derivations.division(store, index, outs, args.fraction, seed))
    make = functools.partial(derivations.subset, store, index)
    if args.ids is not None:
        rows = selection.by_ids(store, index, args.ids)
        return [make(rows, out, ids=os.path.basename(args.ids))]
    if args.labels is not None:
        return [make(selection.by_labels(store, index, args.labels), out, labels=args.labels)]
    if args.count is not None:
        return [make(selection.by_count(index, args.count, seed), out, count=args.count, seed=seed)]
    rows = selection.by_fraction(index, args.fraction, seed)
    return [make(rows, out, fraction=args.fraction, seed=seed)]


def _sides(out: str, names: str | None) -> tuple[epath.Path, epath.Path]:
    """Directories of the two stores of `split`. Raises UserError."""
    words = (names or "train,heldout").split(",")
    invalid = any(word in ("", ".", "..") or "/" in word for word in words)
    if invalid or len(words) != 2 or words[0] == words[1]:
        raise UserError(f"--names={names} are not two names of directories, as train,heldout")
    return epath.Path(out) / words[0], epath.Path(out) / words[1]


def _merge(paths: list[str], out: str, workers: Workers) -> Derived:
    """The store that `merge` writes."""
    stores = [store_parts.open_store(path) for path in paths]
    for other in stores[1:]:  # before their ids are read
        derivations.require_same_kind(stores[0], other)
    indices = []
    for store in stores:
        cli.say(f"reading the ids of {counted(len(store), 'example')} of {store.path}")
        indices.append(store_parts.read_index(store, workers))
    return derivations.union(stores, indices, out)


def main() -> None:
    args = parse()
    preemption.raise_on_sigterm()  # so that partial files are removed
    jax.config.update("jax_platforms", "cpu")
    if args.action == "info":
        info(args)
        return
    *sources, out = args.paths
    output_paths.directory(out)
    with Workers(args.threads or THREADS) as workers:
        if args.action == "merge":
            targets = [_merge(sources, out, workers)]
        else:
            targets = _select(args, workers)
        derive.write(targets, workers, check=bool(args.check), say=cli.say)
    for target in targets:
        views = counted(target.views, "view")
        cli.say(f"{target.out}: {views} of {counted(len(target), 'example')}, copied unchanged")
    first, *others = targets
    line = next_commands.train(first.out, examples=len(first))
    heldout = "".join(f" {shlex.quote(f'--config.evals.heldout={t.out}')}" for t in others)
    print(f"next: {line}{heldout}")


if __name__ == "__main__":
    cli.run(main)
