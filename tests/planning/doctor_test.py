"""Findings of the doctor: level, remedy and exit code."""

import json
import sys

import pytest
from packaging.requirements import Requirement

from dgpt_jax import cli
from dgpt_jax.config import HostsConfig
from dgpt_jax.planning import doctor
from tests.support import stores


def test_versions_are_checked():
    jax = Requirement("jax>=0.10.2,<0.12")
    assert doctor.check_version(jax, "0.10.2", "0.10.2").level == "ok"
    other = doctor.check_version(jax, "0.11.0", "0.10.2")
    assert other.level == "warn" and "jax 0.11.0" in other.text and "0.10.2" in other.text
    old = doctor.check_version(jax, "0.9.0", "0.10.2")
    assert old.level == "fail" and "jax 0.9.0" in old.text and "<0.12,>=0.10.2" in old.text
    absent = doctor.check_version(jax, None, "0.10.2")
    assert absent.level == "fail" and "tools/setup_venv.sh" in absent.remedy
    assert doctor.check_version(jax, "0.10.9", None).level == "ok"  # no constraints.txt


def test_packages_of_this_environment(tmp_path, monkeypatch):
    first, *_ = doctor.packages()
    assert first.level == "ok" and "as tested" in first.text
    text = "# comment\nflax==0.0.1 # another\nJAX==1.0; python_version < '3'\n"
    (tmp_path / "constraints.txt").write_text(text)
    findings = doctor.packages(tmp_path / "constraints.txt")
    assert [f.level for f in findings if "flax" in f.text] == ["warn"]
    assert not any(f.text.startswith("jax ") for f in findings[1:])  # not for this Python
    monkeypatch.setattr(doctor, "_version", {"jax": "0.1"}.get)
    lines = [str(finding) for finding in doctor.packages()]
    assert any(line.startswith("fail  jax 0.1 ") for line in lines)
    assert any(line.startswith("fail  flax ") and "tools/setup_venv" in line for line in lines)


def test_missing_packages_for_devices(tmp_path, monkeypatch):
    assert doctor.accelerators(tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    for name in ("accel0", "nvidia0", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    version = tmp_path / "proc/driver/nvidia/version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Oct 2021\n")
    monkeypatch.setattr(doctor, "_version", {}.get)
    lines = [str(finding) for finding in doctor.accelerators(tmp_path)]
    keys = [("libtpu", "setup_venv.sh tpu"), ("CUDA", "setup_venv.sh cuda"), ("470.82", "525")]
    for line, texts in zip(lines, keys, strict=True):
        assert line.startswith("fail ") and all(text in line for text in texts)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15\n")
    monkeypatch.setattr(doctor, "_version", lambda name: "1")
    assert [str(f) for f in doctor.accelerators(tmp_path)] == ["ok    NVIDIA driver 550.54"]


def test_data_is_opened_and_counted(tmp_path):
    store = stores.write(tmp_path / "store", (4, 2), views=2)
    (finding,) = doctor.data(str(store))
    assert finding.level == "ok", finding
    assert "token store, 2 views of 6 examples, int8, 5 × 4 of a teacher" in finding.text
    shard = sorted(store.glob("*view001*array_record*"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    (finding,) = doctor.data(str(store))
    assert finding.level == "fail" and shard.name in finding.text
    shard.write_bytes(content[:100] + bytes([content[100] ^ 255]) + content[101:])
    (finding,) = doctor.data(str(store))  # the size is right, so the first record is read
    assert finding.level == "fail" and str(store) in finding.text
    shard.write_bytes(content)
    info = json.loads((store / "token_store.json").read_text())
    (store / "token_store.json").write_text(
        json.dumps(info | {"teacher": info["teacher"] | {"codec": "int3"}})
    )
    (finding,) = doctor.data(str(store))
    assert finding.level == "fail" and "token_store.json" in finding.text
    (store / "token_store.json").write_text(json.dumps(info))
    (store / "dataset_info.json").unlink()
    (finding,) = doctor.data(str(store))
    assert finding.level == "fail" and "is unfinished" in finding.text


@pytest.mark.parametrize("name,message", [("absent", "no such directory"), (".", "is not a TFDS")])
def test_paths_without_data(tmp_path, name, message):
    (finding,) = doctor.data(str(tmp_path / name))
    assert finding.level == "fail" and message in finding.text


def test_the_work_directory_is_checked(tmp_path, monkeypatch):
    (finding,) = doctor.workdir(str(tmp_path / "run"))
    assert "is writable" in finding.text and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (finding,) = doctor.workdir(str(tmp_path / "file/run"))
    assert finding.level == "fail" and "Not a directory" in finding.text
    assert "--workdir" in finding.remedy
    monkeypatch.setattr(doctor, "MIN_DISK", 1e30)
    (finding,) = doctor.workdir(str(tmp_path))
    assert finding.level == "warn" and "checkpoints" in finding.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_devices_of_this_process():
    (finding,) = doctor.devices(HostsConfig(), "cpu")
    assert finding.level == "ok" and "cpu in 1 process" in finding.text
    (finding,) = doctor.devices(HostsConfig(num_processes=2), "cpu")
    assert finding.level == "fail" and "config.hosts.num_processes is 2" in finding.text


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code(monkeypatch, capsys, tmp_path, fails):
    from dgpt_jax.commands import doctor as tool

    words = [str(tmp_path / "absent")] if fails else []
    monkeypatch.setattr(sys, "argv", ["doctor", *words, f"--workdir={tmp_path}", "--platform=cpu"])
    if fails:
        with pytest.raises(SystemExit) as error:
            cli.run(tool.main)
        assert error.value.code == 1
    else:
        cli.run(tool.main)
    *lines, last = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"} | ({"fail"} if fails else set())
    assert last.startswith(
        "next: fix the 1 failed check, " if fails else "next: build a token store"
    )
