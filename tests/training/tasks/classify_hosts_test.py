"""Fine-tuning and probes have the same results in two processes and in one."""

import json

import portpicker
import pytest

from dgpt_jax.evals import results
from tests.support import data, processes
from tests.support.classifying import DEEP, untrained

PLAIN = ("randaugment=", "random_erase_prob=0", "mixup=0", "cutmix=0", "drop_path=0",
         "label_smoothing=0")  # fmt: skip
KINDS = {
    "finetune": (),
    "dinov2": (
        *(f"classify.{word}" for word in PLAIN), "classify.trainable=head", "classify.head=dinov2",
        "classify.pooling=cls", "optim.kind=sgd", "optim.layer_decay=1",
        "optim.base_lr_grid=0.1,10",
    ),
    "attentive": (
        *(f"classify.{word}" for word in PLAIN), "classify.trainable=head",
        "classify.head=attentive", "optim.layer_decay=1", "optim.base_lr_grid=0.1,1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(24 images of two classes, an encoder)."""
    root = tmp_path_factory.mktemp("classify_hosts")
    dataset = data.image_dataset(root, per_class=12)
    return dataset, untrained(root / "a.safetensors", "cls", **DEEP)


def run(inputs, workdir, kind: str, hosts: int):
    dataset, encoder = inputs
    fields = [f"model.{name}={value}" for name, value in (data.TINY | DEEP).items()]
    fields += [
        "total=6 steps", "batch_size=8", "log_every=1", f"data.path={dataset}",
        "classify.num_classes=2", "classify.mixup_group_size=4", "classify.resize=18",
        f"init.weights={encoder}", f"evals.heldout={dataset}", "evals.every=3 steps",
        # 23 of 24, ten at a time: divisible neither by batches nor by processes.
        "evals.heldout_split=train[:23]", "evals.batch_size=10", *KINDS[kind],
    ]  # fmt: skip
    argv = ["-m", "dgpt_jax.train", "--config=configs/quickstart_finetune.py"]
    argv += [f"--workdir={workdir}", *(f"--config.{field}" for field in fields)]
    if hosts > 1:
        argv += [f"--config.hosts.coordinator=localhost:{portpicker.pick_unused_port()}"]
        argv += [f"--config.hosts.num_processes={hosts}"]
    started = [
        processes.start(
            argv + ([f"--config.hosts.process_id={i}"] if hosts > 1 else []), devices=2 // hosts
        )
        for i in range(hosts)
    ]
    outputs = processes.outputs_of(started, 500)
    assert all(process.returncode == 0 for process in started), outputs
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_results_of_one(inputs, tmp_path, kind):
    both, one = (run(inputs, tmp_path / str(hosts), kind, hosts) for hosts in (2, 1))
    assert [line.keys() for line in both] == [line.keys() for line in one]
    for ours, theirs in zip(both, one, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (name, ours["step"])
        for name in ours:
            if name.startswith("val/"):
                assert ours[name] == theirs[name]
                assert ours[name] * 23 == pytest.approx(round(ours[name] * 23), abs=1e-9)
    files = [next((tmp_path / str(hosts)).glob("results*.json")) for hosts in (2, 1)]
    rows = [
        [(row["epoch"], row["squash"], row.get("head"), row["correct"], row["test"])
         for row in results.read(file)["results"]]
        for file in files
    ]  # fmt: skip
    assert rows[0] == rows[1] and {row[4] for row in rows[0]} == {23}
