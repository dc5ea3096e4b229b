"""What the doctor finds: every fault is named with its remedy, and decides the exit code."""

import json
import socket
import sys
import threading

import pytest
from packaging.requirements import Requirement

from dgpt_jax import cli, doctor
from dgpt_jax.config import Hosts
from tests import stores
from tests.hosts_test import free_address


def test_versions_are_judged():
    jax = Requirement("jax>=0.10.2,<0.12")
    assert doctor.judge(jax, "0.10.2", "0.10.2").level == "ok"
    other = doctor.judge(jax, "0.11.0", "0.10.2")
    assert (other.level, other.text) == ("warn", "jax 0.11.0 was not tested, 0.10.2 was")
    old = doctor.judge(jax, "0.9.0", "0.10.2")
    assert (old.level, old.text) == ("fail", "jax 0.9.0 is not <0.12,>=0.10.2")
    absent = doctor.judge(jax, None, "0.10.2")
    assert absent.level == "fail" and "tools/setup_venv.sh" in absent.remedy
    assert doctor.judge(jax, "0.10.9", None).level == "ok"  # constraints.txt is not there


def test_packages_of_this_environment(tmp_path, monkeypatch):
    first, *_ = doctor.packages()
    assert first.level == "ok" and "packages as tested" in first.text
    text = "# comment\nflax==0.0.1 # another\nJAX==1.0; python_version < '3'\n"
    (tmp_path / "constraints.txt").write_text(text)
    found = doctor.packages(tmp_path / "constraints.txt")
    assert [f.level for f in found if "flax" in f.text] == ["warn"]
    assert not any(f.text.startswith("jax ") for f in found[1:])  # not for this Python
    monkeypatch.setattr(doctor, "_version", {"jax": "0.1"}.get)
    found = [str(finding) for finding in doctor.packages()]
    assert any(line.startswith("fail  jax 0.1 is not") for line in found)
    assert any(line.startswith("fail  flax is not installed: tools/setup") for line in found)


def test_devices_whose_package_is_missing(tmp_path, monkeypatch):
    assert doctor.accelerators(tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    for name in ("accel0", "nvidia0", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    version = tmp_path / "proc/driver/nvidia/version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Oct 2021\n")
    monkeypatch.setattr(doctor, "_version", {}.get)
    found = [str(finding) for finding in doctor.accelerators(tmp_path)]
    assert found == [
        "fail  a TPU, but no libtpu: tools/setup_venv.sh tpu",
        "fail  a GPU, but no CUDA for JAX: tools/setup_venv.sh cuda",
        "fail  NVIDIA driver 470.82: CUDA 12 needs 525 or newer",
    ]
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15\n")
    monkeypatch.setattr(doctor, "_version", lambda name: "1")
    assert [str(f) for f in doctor.accelerators(tmp_path)] == ["ok    NVIDIA driver 550.54"]


def test_data_are_opened_and_counted(tmp_path):
    store = stores.write(tmp_path / "store", (4, 2), views=2)
    (found,) = doctor.data(str(store))
    assert found.level == "ok", found
    assert "token store, 2 view(s) of 6 examples, int8, 5 × 4 of a teacher" in found.text
    shard = sorted(store.glob("*view001*array_record*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    (found,) = doctor.data(str(store))
    assert found.level == "fail" and shard.name in found.text
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 255]) + whole[101:])
    (found,) = doctor.data(str(store))  # its size is right: the first record is read
    assert found.level == "fail" and str(store) in found.text
    shard.write_bytes(whole)
    info = json.loads((store / "token_store.json").read_text())
    (store / "token_store.json").write_text(json.dumps(info | {"codec": "int3"}))
    (found,) = doctor.data(str(store))
    assert found.level == "fail" and "token_store.json" in found.text
    (store / "token_store.json").write_text(json.dumps(info))
    (store / "dataset_info.json").unlink()
    (found,) = doctor.data(str(store))
    assert found.level == "fail" and "is unfinished" in found.text


@pytest.mark.parametrize("name,message", [("absent", "no such directory"), (".", "is not a TFDS")])
def test_data_that_are_none(tmp_path, name, message):
    (found,) = doctor.data(str(tmp_path / name))
    assert found.level == "fail" and message in found.text


def test_the_work_directory_is_tried(tmp_path, monkeypatch):
    (found,) = doctor.workdir(str(tmp_path / "run"))
    assert "is writable" in found.text and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (found,) = doctor.workdir(str(tmp_path / "file/run"))
    assert found.level == "fail" and "cannot be written to (Not a directory)" in found.text
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e30)
    (found,) = doctor.workdir(str(tmp_path))
    assert found.level == "warn" and found.remedy == "make room for checkpoints"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_hosts_that_reach_the_coordinator():
    address, found = free_address(), []

    def look():
        found.extend(doctor.reach(address, 2, 20.0))

    both = [threading.Thread(target=look) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(f.text.replace(address, "A").partition(" within")[0] for f in found) == [
        f"1 of 1 other hosts reached port {address.rpartition(':')[2]} here", "A answers",
    ]  # fmt: skip
    assert {f.level for f in found} == {"ok"}


def test_hosts_that_do_not(monkeypatch):
    address = free_address()
    (alone,) = doctor.reach(address, 3, 0.1)
    assert alone.level == "fail" and alone.text.startswith("0 of 2 other hosts reached port")
    assert "firewall" in alone.remedy
    host, _, port = address.rpartition(":")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind((host, int(port)))
        (refused,) = doctor.reach(address, 2, 0.1)
    assert refused.level == "fail" and "nobody listens: run this on that host" in refused.remedy

    def silent(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    (dropped,) = doctor.reach("192.0.2.1:8476", 2, 0.1)  # an address for documentation
    assert dropped.level == "fail" and "let the firewall pass port 8476" in dropped.remedy
    (wrong,) = doctor.reach("host", 2, 0.1)
    assert wrong.remedy == "write HOST:PORT"


def test_devices_of_this_process():
    (found,) = doctor.devices(Hosts(), "cpu")
    assert found.level == "ok" and "cpu in 1 process(es)" in found.text
    (found,) = doctor.devices(Hosts(processes=2), "cpu")
    assert found.level == "fail" and "config.hosts.processes is 2, JAX found 1" in found.text


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code(monkeypatch, capsys, tmp_path, fails):
    import doctor as tool

    words = [str(tmp_path / "absent")] if fails else []
    monkeypatch.setattr(sys, "argv", ["doctor", *words, f"--workdir={tmp_path}", "--platform=cpu"])
    if fails:
        with pytest.raises(SystemExit) as ended:
            cli.run(tool.main)
        assert ended.value.code == 1
    else:
        cli.run(tool.main)
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"} | ({"fail"} if fails else set())
    assert last.startswith(
        "next: mend the 1 that fail" if fails else "next: python -m dgpt_jax.train"
    )
