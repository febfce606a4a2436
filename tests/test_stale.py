"""A done run of which something has changed since: the same command is refused with what it was and is, and touches nothing."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import ended, free_port, in_process, started
from standins import FUSSY, write_dialogpt, write_pairs, write_place

from kdx import cli
from kdx.cli import compose
from kdx.distill import distill

WORDS = [
    "teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs", "data.path=pairs.jsonl",
    "data.max_length=100", "loss.name=fussy", "train.max_steps=1", "tracking.mode=disabled", "hydra.run.dir=run",
]  # fmt: skip


@pytest.fixture
def done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, list[str]]]:
    """A done run in a folder of its own → the same command again."""
    write_place(tmp_path)
    (tmp_path / "fussy_loss.py").write_text(FUSSY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "fussy_loss", raising=False)
    monkeypatch.setenv("KDX_PLUGINS", "fussy_loss")
    code, _, lines = in_process(capfd, *WORDS)
    assert code == 0, lines
    return lambda *words: in_process(capfd, *WORDS, *words)


def whole(folder: Path) -> dict[str, tuple[str, int]]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f): (hashlib.sha256(f.read_bytes()).hexdigest(), f.stat().st_mtime_ns) for f in files}


def other_data() -> None:
    write_pairs(Path("pairs.jsonl"), 41)


def other_teacher() -> None:
    shutil.rmtree("medium")
    write_dialogpt(Path("medium"), 4, 32, pickled=False, seed=7)


def other_student() -> None:
    """Other weights to start from, under the same name."""
    shape = (Path("small") / "config.json").read_bytes()
    shutil.rmtree("small")
    write_dialogpt(Path("small"), 2, 16, pickled=False, seed=8)
    assert (Path("small") / "config.json").read_bytes() == shape


def other_tokenizer() -> None:
    """One that reads these rows as the other did, with another token for an id that none of them has."""
    for name in ("medium", "small"):
        file = Path(name) / "vocab.json"
        vocabulary = json.loads(file.read_text())
        file.write_text(json.dumps({"~~" if token == "~" else token: i for token, i in vocabulary.items()}))


def other_plugin() -> None:
    Path("fussy_loss.py").write_text(FUSSY + "# mended\n")


CHANGES = {
    "data": (other_data, {"fingerprint"}),
    "teacher": (other_teacher, {"teacher_digest"}),
    "student": (other_student, {"student_digest"}),
    "tokenizer": (other_tokenizer, {"tokenizer_digest"}),
    "plug-in": (other_plugin, {"plugins_digest"}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_has_changed_since_is_refused(done, kind):
    change, keys = CHANGES[kind]
    before = whole(Path("run"))
    code, told, lines = done()
    assert (code, lines) == (0, [])
    assert " ".join(told.split()).endswith("run is done already; nothing is run")
    change()
    code, _, lines = done()
    assert code == 2
    first, head, *table = lines
    assert first.startswith(f"kdx: error: {Path().resolve()}/run: was begun with another ")
    assert first.endswith(
        ". Use the same, or another folder: hydra.run.dir=... (run.like= starts a new run from this one's words)"
    )
    assert head.removeprefix("kdx: error:").split() == ["key", "was", "now"]
    kept = json.loads(Path("run/data.json").read_text())
    rows = [re.split(r" {2,}", line.removeprefix("kdx: error:").strip()) for line in table]
    assert keys <= {key for key, _, _ in rows}
    for key, was, now in rows:
        assert was.split(" … ")[0] == str(kept[key])[: len(was.split(" … ")[0])]
        assert was != now
    assert whole(Path("run")) == before
    code, _, lines = done("hydra.run.dir=another")
    assert code == 0, lines


def test_what_cannot_be_told_is_said_and_nothing_is_lost(done):
    before = whole(Path("run"))
    Path("pairs.jsonl").rename("away.jsonl")
    code, told, lines = done()
    assert (code, lines) == (0, [])
    doubt = "cannot be told: data.path: pairs.jsonl does not exist. Did you mean away.jsonl?"
    assert doubt in " ".join(told.split())
    assert whole(Path("run")) == before


def test_a_source_that_fails_for_now_loses_nothing(done, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("connection refused")

    monkeypatch.setattr("kdx.prepare.load_data", fails)
    code, told, lines = done()
    assert (code, lines) == (0, [])
    assert "cannot be told: RuntimeError: connection refused" in " ".join(told.split())


def test_on_another_processor_a_done_run_is_done(done, monkeypatch):
    was = json.loads(Path("run/data.json").read_text())["teacher_precision"]
    other = {"bf16": (torch.float32, "no bf16 here"), "fp32": (torch.bfloat16, "bf16 here")}[was]
    monkeypatch.setattr("kdx.teacher.device_dtype", lambda _: other)
    code, told, lines = done()
    assert (code, lines) == (0, [])
    assert " ".join(told.split()).endswith("run is done already; nothing is run")


def test_a_done_run_without_a_record_of_its_data_is_done(done):
    Path("run/data.json").write_text("[1")
    code, told, _ = done()
    assert code == 0
    assert "cannot be told: " in told
    assert "data.json is missing or damaged" in " ".join(told.split())


def test_in_python_the_files_are_read_each_time(done, tmp_path):
    config = compose([word for word in WORDS if not word.startswith("hydra")])
    first = distill(config, Path("mine"))
    assert distill(config, Path("mine")) == first
    other_data()
    with pytest.raises(Exception, match="was begun with another fingerprint"):
        distill(config, Path("mine"))


def one_of_two(number: int, port: int, elsewhere: str, told: str) -> None:
    """The same command in one of two processes, which may stand where the data cannot be seen."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", KDX_PLUGINS="fussy_loss")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.path.insert(0, os.getcwd())
    os.chdir(elsewhere)
    with open(told, "w", encoding="utf-8") as sys.stderr, open(os.devnull, "w", encoding="utf-8") as sys.stdout:
        sys.argv = ["kdx", *WORDS]
        cli.main()


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_of_several_processes_none_waits_for_one_that_is_refused(done, tmp_path, is_elsewhere):
    other_data()
    (tmp_path / "elsewhere").mkdir()
    before = whole(Path("run"))
    port = free_port()
    told = [tmp_path / "0.err", tmp_path / "1.err"]
    places = [tmp_path, tmp_path / "elsewhere" if is_elsewhere else tmp_path]
    both = [started(one_of_two, i, port, str(places[i]), str(told[i])) for i in range(2)]
    assert [ended(one) for one in both] == [2, 0 if is_elsewhere else 2]
    assert "run: was begun with another fingerprint. Use" in told[0].read_text()
    assert ("was begun with another fingerprint" in told[1].read_text()) != is_elsewhere
    assert whole(Path("run")) == before
