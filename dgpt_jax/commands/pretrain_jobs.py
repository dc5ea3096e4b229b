"""The single commands that `pretrain` stands for."""

import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from dgpt_jax import invocation
from dgpt_jax.commands.jobs import Job
from dgpt_jax.commands.pretrain_setup import Setup
from dgpt_jax.planning import training_choice

LABEL_FREE = 2048  # held-out images for rank and agreement
EVAL_BATCH = 256
CPU_TEACHER_BATCH = 16
RESIZE = 256 / 224  # shorter side before the center crop of kNN, by the size of the crop


def command(name: str, *words: str, **config: Any) -> tuple[str, ...]:
    """Returns the arguments of `python` that run a command, with fields of its config."""
    return "-m", "dgpt_jax", name, *words, *config_flags(config)


def config_flags(fields: Mapping[str, Any]) -> list[str]:
    """Returns --config.KEY=VALUE for each field; a double underscore in a name is a dot."""
    flags = []
    for name, value in fields.items():
        text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
        flags.append(f"--config.{name.replace('__', '.')}={text}")
    return flags


def shown(job: Job) -> str:
    """Returns the command of a job in the form in which this process was started."""
    name, *words = job.words[2:]
    return f"{invocation.command(name)} {shlex.join(words)}"


def all_jobs(setup: Setup) -> list[Job]:
    """Returns the commands in order, each after the one before it."""
    jobs: list[Job] = []
    for job in _jobs(setup):
        after = tuple(earlier.name for earlier in jobs[-1:])
        jobs.append(dataclasses.replace(job, after=after))
    return jobs


def _jobs(setup: Setup) -> Iterator[Job]:
    out, division = setup.out, setup.division
    if not setup.source.imported:
        words = command("import", setup.source.path, f"--out={setup.images}")
        yield Job("import", "the images become a dataset", out / "images/dataset_info.json", words)
    tokens, heldout = out / "tokens", out / "tokens_heldout"
    yield _token_store(setup, "tokens", split=division.train, views=setup.views)
    yield _token_store(setup, "tokens_heldout", split=division.heldout, views=1, codec_from=tokens)
    verify = command("verify", f"{tokens}", f"--weights={setup.teacher['weights']}")
    yield Job("verify", "stored tokens are computed again", tokens, verify)
    run = out / "run"
    words = command(
        "train", f"--config={setup.config}", f"--workdir={run}", **_train_fields(setup),
        data__path=tokens, evals__heldout=heldout,
    )  # fmt: skip
    yield Job("train", f"pretraining of {setup.options.size}", run / "checkpoints", words)
    timm, page = out / "timm", out / "report/index.html"
    export = command("convert", f"{run}", f"{timm}", "--to=timm")
    yield Job("export", "the encoder for timm", timm, export, replace=True)
    if division.labelled:
        words = command(
            "evaluate", "--config=knn_in1k", f"--checkpoint={run}", data=setup.images,
            train=division.train, test=division.heldout,
            resize=round(setup.model.image_size * RESIZE), batch_size=_eval_batch(setup),
            **_platform(setup),
        )  # fmt: skip
        yield Job("knn", "kNN of the held-out images", run, words)
    report = command("report", f"{run}", f"--out={page}")
    yield Job("report", "a page about the run", page, report)


def _token_store(setup: Setup, name: str, **fields: Any) -> Job:
    settings: dict[str, Any] = {
        "source": setup.images,
        "teacher__weights": setup.teacher["weights"],
        "image_size": setup.model.image_size,
        "threads": min((os.cpu_count() or 1) + 4, 32),
        **fields,
        **_platform(setup),
    }
    if setup.devices.platform == "cpu":
        settings |= {"teacher__dtype": "float32", "batch_size": CPU_TEACHER_BATCH}
    out = setup.out / name
    words = command("tokens", "--config=tokens_in1k_openclip_h14", f"--out={out}", **settings)
    about = "the teacher's tokens of stored views"
    if name != "tokens":
        about = "the teacher's tokens of held-out images"
    return Job(name, about, out / "dataset_info.json", words)


def _train_fields(setup: Setup) -> dict[str, Any]:
    """Fields of TrainConfig that differ from those of the config, data aside."""
    fields: dict[str, Any] = {f"model__{name}": x for name, x in setup.model_fields.items()}
    fields |= {"data__examples": None, "teacher__width": None, "teacher__grid": None}
    choice = training_choice.as_dict(setup.choice)
    fields |= {name.replace(".", "__"): value for name, value in choice.items()}
    fields |= {
        "total": f"{setup.epochs} epochs",
        "optim__warmup": "10%",
        "log_every": min(max(setup.steps // 100, 1), 50),
        "checkpoint__every": "5%",
        "evals__every": "20%",
        "evals__label_free": min(LABEL_FREE, setup.division.heldout_images),
        "evals__batch_size": _eval_batch(setup),
    }
    if setup.init is not None:
        fields |= {
            "init__weights": setup.init["weights"],
            "init__decoders": "fresh",
            "data__mean": setup.init["mean"],
            "data__std": setup.init["std"],
        }
    return fields | _platform(setup)


def _eval_batch(setup: Setup) -> int:
    """Images per step of evaluations: a micro-batch, at most 256."""
    count, micro = setup.devices.count, setup.choice.micro_batch
    return max(min(micro, EVAL_BATCH) // count * count, count)


def _platform(setup: Setup) -> dict[str, str]:
    """The platform, so that a resumed command never falls back to another one."""
    return {"platform": setup.devices.platform}
