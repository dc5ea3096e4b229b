"""Pretrains an encoder on a folder of images and exports it to timm: one command for all steps.

    python tools/pretrain.py FOLDER --teacher=hf:ORG/NAME --out=RUN
    python tools/pretrain.py FOLDER --teacher=CLIP_DIR --out=RUN --size=B/16 --epochs=300

It imports the images, holds some out, stores the teacher's tokens, trains, measures, exports and
writes a page. Each step is a command of its own; they are printed first, and --dry-run prints only
them. Batch size, micro-batches, recomputation and precision follow from the images and the device.
The same command resumes after Ctrl-C, SIGTERM or a kill; what is done is not run again.

FOLDER is anything that tools/import_images.py reads, or a dataset that it wrote. RUN gets images/,
tokens/, tokens_heldout/, run/ (the work directory), timm/, report/ and logs/.
"""

import dgpt_jax.distributed.early_signals  # noqa: F401

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgpt_jax import cli
from dgpt_jax.commands import jobs, pretrain_jobs, pretrain_source, pretrain_summary
from dgpt_jax.commands.pretrain_setup import Options, Setup, flag, model_fields
from dgpt_jax.distributed import preemption
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import progress
from dgpt_jax.planning import machine_probe
from dgpt_jax.planning.chips import GIB
from dgpt_jax.planning.training_choice import Devices
from dgpt_jax.storage import atomic, gcs, output_paths
from dgpt_jax.weights import hub

SETTINGS, LOCK = "pretrain.json", ".lock"


def pretrain(
    folder: str | os.PathLike,
    teacher: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dry_run: bool = False,
    **options: Any,
) -> Path:
    """Pretrains an encoder on the images in `folder` and returns the directory of its timm export.

    The function of `dgpt pretrain`: it runs the same commands in processes of their own, prints
    their progress, and resumes what an earlier call with the same arguments left. options: size,
    epochs, views, batch, image_size, init, heldout, memory, as the flags of the command. Raises
    UserError, also if the arguments differ from those of an earlier call for `out`.
    """
    names = [field.name for field in dataclasses.fields(Options)][2:]
    if unknown := options.keys() - set(names):
        raise UserError(f"unknown option {min(unknown)}: there are {', '.join(names)}")
    heldout, init = options.get("heldout"), options.get("init")
    options["heldout"] = None if heldout is None else str(heldout)
    options["init"] = init and _location(init)
    settings = Options(_location(folder), _location(teacher), **options)
    directory = Path(os.path.abspath(out))
    saved = _saved(settings, directory)
    if dry_run:
        _show(_prepare(settings, directory, saved))
        return directory / "timm"
    output_paths.directory(directory)
    with _hold(directory):
        _run(settings, directory)
    return directory / "timm"


def _location(path: str | os.PathLike) -> str:
    """Returns a path that names the same file in every process; names on the hub as they are."""
    text = os.fspath(path)
    return text if hub.is_name(text) or gcs.is_remote(text) else os.path.abspath(text)


def _saved(options: Options, out: Path) -> dict[str, Any]:
    """Returns what earlier commands saved in `out`, {} if there are none. Raises UserError if it
    was started with other options, or has other files."""
    path = out / SETTINGS
    if not path.exists():
        if out.is_dir() and any(entry.name[0] != "." for entry in out.iterdir()):
            raise UserError(f"{out} is not empty and not of this command: choose another --out")
        return {}
    saved = atomic.read_json(path, "settings of pretrain")
    for name, value in dataclasses.asdict(options).items():
        if (old := saved["options"].get(name)) != value:
            raise UserError(
                f"{out} was started with {flag(name)}={_text(old)}, not {_text(value)}: repeat the "
                f"first command, or choose another --out"
            )
    return saved


def _text(value: Any) -> str:
    return "the default" if value is None else str(value)


def _prepare(options: Options, out: Path, saved: dict[str, Any]) -> Setup:
    """Returns the setup of a new or an earlier command. Raises UserError."""
    if saved:
        source = pretrain_source.Source.from_json(saved["source"])
    else:
        model_fields(options, 1)  # a size that is none is refused first
        source = pretrain_source.inspect(options.folder, cli.say)
        pretrain_source.divide(source, options.heldout)
        if not hub.is_name(options.teacher) and not Path(options.teacher.split("#")[0]).exists():
            raise UserError(f"no such file or directory: {options.teacher} (--teacher)")
        saved = machine_probe.run(options.teacher, options.init)
        saved |= {"options": dataclasses.asdict(options), "source": vars(source)}
    imported = out / "images"
    if not source.imported and (imported / "dataset_info.json").exists():
        source = pretrain_source.after_import(source, f"{imported}")
    devices = Devices(**saved["devices"])
    if options.memory is not None:
        devices = dataclasses.replace(devices, memory=int(options.memory * GIB))
    if not devices.memory:
        raise UserError(f"the memory of {devices.kind} is unknown: set --memory to its GiB")
    division = pretrain_source.divide(source, options.heldout)
    setup = Setup(options, out, source, division, saved["teacher"], devices, saved["init"])
    setup.lines()  # refuses what does not fit
    if out.is_dir() and not (out / SETTINGS).exists():
        atomic.write_text(out / SETTINGS, json.dumps(saved, indent=1) + "\n")
    return setup


def _show(setup: Setup) -> None:
    for line in (*setup.lines(), setup.check_disk()):
        cli.say(line)
    cli.say("the same as, one after the other:")
    for job in pretrain_jobs.all_jobs(setup):
        cli.say(pretrain_jobs.shown(job))


def _run(options: Options, out: Path) -> None:
    """Runs the commands that are left. Raises UserError."""
    logs, started = out / "logs", time.monotonic()
    setup = _prepare(options, out, _saved(options, out))
    _show(setup)
    commands = pretrain_jobs.all_jobs(setup)
    if commands[0].name == "import" and jobs.pending(commands[:1], logs):
        jobs.run(commands[:1], logs, groups=[[]])
        before = [pretrain_jobs.shown(job) for job in commands]
        setup = _prepare(options, out, _saved(options, out))
        commands = pretrain_jobs.all_jobs(setup)
        if [pretrain_jobs.shown(job) for job in commands] != before:
            cli.say("some files are no readable images; without them:")
            _show(setup)
    if jobs.pending(commands, logs):
        jobs.run(commands, logs, groups=[[]])
        cli.say(f"done in {progress.duration(time.monotonic() - started)}")
    else:
        cli.say(f"{out} is finished: nothing to do")
    for line in pretrain_summary.lines(out):
        cli.say(line)


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """Context in which no other process runs this command for `out`. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {out}: wait until it ends, or choose another --out"
            ) from None
        try:
            yield
        finally:
            if not (out / SETTINGS).exists():  # refused: nothing was started
                (out / LOCK).unlink()
                with contextlib.suppress(OSError):
                    out.rmdir()


def main():
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=cli.path, help="folder, archive, list, pattern or dataset")
    parser.add_argument(
        "--teacher", type=cli.path, required=True,
        help="weights of a CLIP model with their JSON: hf:ORG/NAME[@REVISION], file or directory",
    )  # fmt: skip
    parser.add_argument("--out", type=cli.local_path, required=True, help="output directory")
    parser.add_argument(
        "--size", default="S/16", help="Ti, S, B, L or H, and the patch size; default %(default)s"
    )
    parser.add_argument(
        "--epochs", type=int,
        help="default: 100, or as many as make 10,000 steps, but at most 800",
    )  # fmt: skip
    parser.add_argument("--views", type=int, help="stored crops per image; default: 4, or 8 below "
                        "10,000 images")  # fmt: skip
    parser.add_argument("--batch", type=int, help="images per step; default: by their number")
    parser.add_argument(
        "--image-size", type=int, help="of the encoder, in pixels; default: 224, or the teacher's"
    )
    parser.add_argument("--init", type=cli.path, help="weights to start from; default: random")
    parser.add_argument(
        "--heldout", help="split, or share of the images, that is not trained on; default: the "
        "split val or test, else 0.1",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, metavar="GIB",
        help="memory of each device that training may use; default: what the device reports, of a "
        "CPU half of what is free, at most 16 GB",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args = vars(parser.parse_args())
    preemption.raise_on_sigterm()
    timm = pretrain(args.pop("folder"), args.pop("teacher"), args.pop("out"), **args)
    if args["dry_run"]:
        print("next: run the same command without --dry-run")
        return
    print(f"next: load {timm} in timm; open {timm.parent / 'report/index.html'} in a browser")


if __name__ == "__main__":
    cli.run(main)
