"""Config files by name and path, their errors, and the listing of all."""

import re

import pytest

from dgpt_jax import cli
from dgpt_jax.config import EvaluateConfig, TokensConfig, TrainConfig, files, schema
from dgpt_jax.errors import UserError
from tests.support.paths import ROOT

MINE = """
from dgpt_jax.config import TrainConfig, default_config
def get_config(seed="5"):
    config = default_config(TrainConfig)
    config.seed = int(seed)
    return config
"""


def test_config_files_that_fail(tmp_path):
    def load(text):
        (tmp_path / "c.py").write_text(text)
        return files.load_config(str(tmp_path / "c.py"))

    head = "from dgpt_jax.config import TrainConfig, default_config\n"
    default = "default_config(TrainConfig)"
    with pytest.raises(UserError, match=r"c.py:4: unknown config key bacth"):
        load(head + f"def get_config():\n  c = {default}\n  c.bacth = 3\n  return c\n")
    with pytest.raises(UserError, match=r"c.py:2: NameError"):
        load(head + "oops\n")
    with pytest.raises(UserError, match=r"c.py takes no argument, got :v4"):
        (tmp_path / "c.py").write_text(head + f"def get_config():\n  return {default}\n")
        files.load_config(f"{tmp_path / 'c.py'}:v4")


@pytest.mark.parametrize(
    "name,seed",
    [
        ("pretrain_b16_in1k", 0),
        ("pretrain_b16_in1k:v5e-16", 0),
        ("configs/pretrain_b16_in1k.py:v4-32", 0),
        ("pretrain_b16_in1k.py", 5),  # a file of the current directory, as any path
        ("pretrain_b16_in1k.py:7", 7),
        ("./pretrain_b16_in1k.py", 5),
        ("mine.py:9", 9),
    ],
)
def test_names_and_paths(monkeypatch, tmp_path, name, seed):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for file in ("pretrain_b16_in1k.py", "mine.py"):
        (tmp_path / file).write_text(MINE)
    (tmp_path / "pretrain_b16_in1k").write_text("not a config")
    monkeypatch.chdir(tmp_path)
    assert files.load_config(name).seed == seed


@pytest.mark.parametrize(
    "name,message",
    [
        ("pretrain_b16", "no such config: pretrain_b16: did you mean pretrain_b16_in1k?"),
        ("zzz", "no such config: zzz: --config=list prints all"),
        ("mine", "no such config: mine: --config=list prints all"),
        ("knn_in1k.py", "no such config file: knn_in1k.py: did you mean knn_in1k?"),
        (
            "configs/knn_in1k.py",
            "no such config file: configs/knn_in1k.py: did you mean knn_in1k?",
        ),
        ("mien.py", "no such config file: mien.py: did you mean mine.py?"),
        ("../*/mien.py", "no such config file: ../*/mien.py"),
        ("zzz.py", "no such config file: zzz.py"),
        ("", "no such config file: "),
        ("notes", "notes is not a Python file (.py)"),
        ("pretrain_b16_in1k:v9", "the pod of this config must be one of v5e-64, v5e-16, v4-32, "),
        ("knn_in1k:v9", "knn_in1k takes no argument, got :v9"),
        ("mine.py:x", "mine.py:5: ValueError"),
    ],
)
def test_what_is_no_config(monkeypatch, tmp_path, name, message):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "notes").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        files.load_config(name)
    assert "\n" not in str(caught.value)


def test_a_path_is_suggested_from_its_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"did you mean configs/pretrain_b16_in1k\.py\?"):
        files.load_config("configs/pretrain_b16.py")
    (tmp_path / "knn_mine.py").touch()
    with pytest.raises(UserError, match=re.escape(f"did you mean {tmp_path}/knn_mine.py?")):
        files.load_config(f"{tmp_path}/knn_mien.py")


@pytest.mark.parametrize("kind", [TrainConfig, TokensConfig, EvaluateConfig])
def test_the_list_has_the_configs_that_fit(capsys, kind):
    parser = cli.parser("", kind)
    parser.add_argument("--workdir", required=True)  # not needed to see the list
    with pytest.raises(SystemExit) as ended:
        cli.parse(parser, kind, ["--config=list"])
    assert not ended.value.code
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("next: ") and len(lines) < 24
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines]
    assert names == sorted(names) and set(names) <= {p.stem for p in files.CONFIGS.glob("*.py")}
    for line in lines:
        values = re.search(r"  :(\S+)$", line)
        for value in values[1].split("|") if values else ["?"]:
            if values:
                config = files.load_config(f"{line.split()[0]}:{value}")
                assert set(config) == set(schema.default_config(kind))
            else:
                with pytest.raises(UserError, match="takes no argument"):
                    files.load_config(f"{line.split()[0]}:{value}")


def test_every_config_is_in_one_list():
    kinds = ([TrainConfig], [TokensConfig], [EvaluateConfig])
    lines = [line for kind in kinds for line in files.listing(kind)[:-1]]
    assert sorted(line.split()[0] for line in lines) == sorted(
        path.stem for path in (ROOT / "configs").glob("*.py")
    )
    both = files.listing([TrainConfig, EvaluateConfig])  # what tools/plan.py takes
    assert len(both) - 1 == len(lines) - len(files.listing([TokensConfig])[:-1])
