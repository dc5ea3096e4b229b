"""The same numbers on every layout of devices and processes."""

import socket
import subprocess

import numpy as np
import pytest

from tests import numbers
from tests.data import image_dataset, random_teacher, token_store
from tests.processes import outputs_of, start


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharding")
    dataset = image_dataset(root, per_class=10)
    return token_store(root, dataset, random_teacher(root / "teacher"), views=2)


def record(out, store, *words, devices: int) -> subprocess.Popen:
    """tests.numbers in a process with so many virtual devices."""
    out.mkdir(exist_ok=True)
    return start(["-m", "tests.numbers", out, store, *words], devices=devices)


def results(out, *processes) -> dict[str, dict]:
    """{layout: what tests.numbers wrote} when the processes have ended."""
    outputs = outputs_of(processes)
    assert all(p.returncode == 0 for p in processes), "\n".join(o[-2000:] for o in outputs)
    return {path.stem: dict(np.load(path)) for path in out.glob("*.npz")}


@pytest.fixture(scope="module")
def one(store, tmp_path_factory):
    """One device."""
    out = tmp_path_factory.mktemp("one")
    found = results(out, record(out, store, "1x1x1", devices=1))["1x1x1"]
    assert found["losses"][-3:].mean() < 0.7 * found["losses"][:3].mean()
    return found


@pytest.mark.parametrize(
    "layouts",
    [("2x2x2",), pytest.param(("8x1x1", "1x8x1", "2x4x1", "2x1x1:2"), marks=pytest.mark.slow)],
    ids=["of_all_axes", "others"],
)
def test_every_layout_gives_the_same_numbers(one, store, tmp_path, layouts):
    found = results(tmp_path, record(tmp_path, store, *layouts, devices=8))
    assert len(found) == len(layouts)
    for layout in found:
        numbers.assert_same(one, found[layout])


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(one, store, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        record(tmp_path, store, "2x4x1", f"--hosts={address},2,{i}", devices=4) for i in range(2)
    ]
    numbers.assert_same(one, results(tmp_path, *processes)["2x4x1"])


@pytest.mark.slow
def test_classification_gives_the_same_numbers(tmp_path):
    """Erased, mixed, dropped and averaged alike on any layout, in micro-batches too."""
    dataset = image_dataset(tmp_path, per_class=10)
    (tmp_path / "one").mkdir()
    alone = record(tmp_path / "one", dataset, "1x1x1", "--task=classify", devices=1)
    expected = results(tmp_path / "one", alone)["1x1x1"]
    layouts = ("8x1x1", "1x8x1", "2x2x2", "2x1x1:2")
    eight = record(tmp_path / "eight", dataset, *layouts, "--task=classify", devices=8)
    found = results(tmp_path / "eight", eight)
    assert len(found) == len(layouts)
    for layout in found:
        numbers.assert_same(expected, found[layout])


@pytest.mark.parametrize("fault", ["gradient", pytest.param("half", marks=pytest.mark.slow)])
def test_planted_mistakes_are_found(one, store, tmp_path, fault):
    out = record(tmp_path, store, "2x1x1", f"--fault={fault}", devices=2)
    (found,) = results(tmp_path, out).values()
    with pytest.raises(AssertionError):
        numbers.assert_same(one, found)
