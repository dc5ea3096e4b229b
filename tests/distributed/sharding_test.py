"""Equal results on every layout of devices and processes."""

import socket
import subprocess

import numpy as np
import pytest

from tests.support import step_numbers as numbers
from tests.support.data import image_dataset, random_teacher, token_store
from tests.support.processes import outputs_of, start


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharding")
    dataset = image_dataset(root, per_class=10)
    return token_store(root, dataset, random_teacher(root / "teacher"), views=2)


def record(out, store, *words, devices: int) -> subprocess.Popen:
    """Starts tests.support.step_numbers with `devices` virtual devices."""
    out.mkdir(exist_ok=True)
    return start(["-m", "tests.support.step_numbers", out, store, *words], devices=devices)


def results(out, *processes) -> dict[str, dict]:
    """{layout: arrays of tests.support.step_numbers}, after the processes have ended."""
    outputs = outputs_of(processes)
    assert all(p.returncode == 0 for p in processes), "\n".join(o[-2000:] for o in outputs)
    return {path.stem: dict(np.load(path)) for path in out.glob("*.npz")}


@pytest.fixture(scope="module")
def one_device(store, tmp_path_factory):
    """Results of one device."""
    out = tmp_path_factory.mktemp("one")
    arrays = results(out, record(out, store, "1x1x1", devices=1))["1x1x1"]
    assert arrays["losses"][-3:].mean() < 0.7 * arrays["losses"][:3].mean()
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [("2x2x2",), ("8x1x1", "1x8x1", "2x4x1", "2x1x1:2")],
    ids=["all_axes", "others"],
)
def test_every_layout_gives_the_same_numbers(one_device, store, tmp_path, layouts):
    by_layout = results(tmp_path, record(tmp_path, store, *layouts, devices=8))
    assert len(by_layout) == len(layouts)
    for arrays in by_layout.values():
        numbers.assert_same(one_device, arrays)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(one_device, store, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        record(tmp_path, store, "2x4x1", f"--hosts={address},2,{i}", devices=4) for i in range(2)
    ]
    numbers.assert_same(one_device, results(tmp_path, *processes)["2x4x1"])


@pytest.mark.slow
def test_classification_gives_the_same_numbers(tmp_path):
    """With random erasing, mixup, drop path and EMA, and with micro-batches."""
    dataset = image_dataset(tmp_path, per_class=10)
    (tmp_path / "one").mkdir()
    single = record(tmp_path / "one", dataset, "1x1x1", "--task=classify", devices=1)
    expected = results(tmp_path / "one", single)["1x1x1"]
    layouts = ("8x1x1", "1x8x1", "2x2x2", "2x1x1:2")
    eight = record(tmp_path / "eight", dataset, *layouts, "--task=classify", devices=8)
    by_layout = results(tmp_path / "eight", eight)
    assert len(by_layout) == len(layouts)
    for arrays in by_layout.values():
        numbers.assert_same(expected, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gradient", "half"])
def test_planted_faults_are_detected(one_device, store, tmp_path, fault):
    process = record(tmp_path, store, "2x1x1", f"--fault={fault}", devices=2)
    (arrays,) = results(tmp_path, process).values()
    with pytest.raises(AssertionError):
        numbers.assert_same(one_device, arrays)
