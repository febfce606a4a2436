"""The folder that a run writes to: whose it is, and what of it a later command obeys."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from kdx.hostile import WRITTEN
from processes import in_process
from standins import write_pairs

from kdx.run import signals

BASE = [
    "teacher=hf", "teacher.path=teacher", "student=hf", "student.path=student", "data=pairs", "data.path=t.jsonl",
    "data.validation=2", "train.max_steps=2", "tracking.mode=disabled", "teacher.store=off", "tracking.samples=false",
    "optim.schedule=constant", "train.keep_checkpoints=true",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(beside_models: Path) -> Path:
    write_pairs(beside_models / "t.jsonl")
    return beside_models


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", WRITTEN)
def test_somebodys_folder_is_left_as_it_is(capfd, name):
    own = Path("own") / name / "kept" if "." not in name else Path("own") / name
    own.parent.mkdir(parents=True)
    own.write_text('{"a": "mine"}')
    if name in ("overrides.yaml", "data.json"):  # these tell a run's folder
        return
    before = content(Path("own"))
    code, _, lines = in_process(capfd, *BASE, "hydra.run.dir=own")
    slash = "/" if "." not in name else ""
    told = f"is no run's, and has a {name}{slash}, which a run would replace. Choose another folder with"
    assert (code, len(lines)) == (2, 1)
    assert told in lines[0]
    assert content(Path("own")) == before


def test_all_that_a_run_writes_is_known(capfd):
    assert in_process(capfd, *BASE, "hydra.run.dir=run", "train.save_every=1", "tracking.samples=true")[0] == 0
    assert {path.name for path in Path("run").iterdir()} <= {*WRITTEN}


@pytest.mark.parametrize("name", ["command.txt", "status.json", "config.yaml", "metrics.jsonl", "kdx.log"])
def test_a_pipe_is_not_waited_for(capfd, name):
    assert in_process(capfd, *BASE, "hydra.run.dir=run")[0] == 0
    Path("run", name).unlink()
    os.mkfifo(Path("run") / name)
    code, _, lines = in_process(capfd, "run.resume=run")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].endswith(f"run/{name}: is neither a file nor a folder. Remove it")


def test_the_folder_of_options_a_run_goes_on_with_is_kept_too(capfd):
    for name in ("one", "two"):
        Path(name, "experiment").mkdir(parents=True)
        Path(name, "experiment", "mine.yaml").write_text("# @package _global_\ntrain: {seed: 5}\n")
    words = [*BASE, "experiment=mine", "hydra.run.dir=run"]
    assert in_process(capfd, "--config-dir", "one", *words)[0] == 0
    shutil.rmtree("one")
    assert in_process(capfd, "run.resume=run")[0] == 2
    assert in_process(capfd, "run.resume=run", "--config-dir", "two", "train.max_steps=3")[0] == 0
    code, told, lines = in_process(capfd, "run.resume=run")
    assert (code, "is done already" in told) == (0, True), lines


def test_the_words_a_run_goes_on_with_are_those_it_is_called_by(capfd):
    assert in_process(capfd, *BASE, "hydra.run.dir=run")[0] == 0
    assert in_process(capfd, "run.resume=run", "train.max_steps=4")[0] == 0
    kept = yaml.safe_load(Path("run/overrides.yaml").read_text())
    assert [word for word in kept if "max_steps" in word] == ["train.max_steps=4"]
    assert json.loads(Path("run/summary.json").read_text())["run"]["steps"] == 4
    code, told, _ = in_process(capfd, "run.resume=run")  # as the run says how to go on
    assert (code, "is done already" in told) == (0, True)
    assert in_process(capfd, "run.resume=run", "train.max_steps=3")[0] == 2  # refused: the words stay
    assert yaml.safe_load(Path("run/overrides.yaml").read_text()) == kept


def test_a_stop_before_the_run_reports_anything_is_one(capfd, monkeypatch):
    """Noted by a process of joblib while the folder was opened: status.json would tell of a run that nobody does."""
    with monkeypatch.context() as at_once:
        at_once.setattr(signals, "_noted", [signal.SIGTERM])
        assert in_process(capfd, *BASE, "hydra.run.dir=run")[0] == 143
    status = json.loads(Path("run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 143)
    assert in_process(capfd, "run.resume=run")[0] == 0
