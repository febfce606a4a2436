"""What decides which student comes out of a run: the config, and the contents of what it reads."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from standins import put_on_hub, write_pairs, write_tokenizer

from kdx.cli import compose
from kdx.config import Config
from kdx.run import identity as identities
from kdx.run.identity import config_identity, content_hash, differences, digest, identity, may_differ, table


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in, with a teacher, a student, rows, a plug-in and a cache of its own."""
    for name in ("teacher", "student"):
        write_tokenizer(tmp_path / name)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "rows").mkdir()
    write_pairs(tmp_path / "rows" / "a.jsonl", 3)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "own_loss.py").write_text("# a loss\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KDX_PLUGINS", "own_loss")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def config(*words: str, data: str = "rows") -> Config:
    base = ["teacher=hf", "teacher.path=teacher", "student=hf", "student.path=student", "data=pairs"]
    return compose([*base, f"data.path={data}", *words])


def differing(was: dict, now: dict) -> list[str]:
    return [key for key, _, _ in differences(was, now)]


def test_what_cannot_change_the_student_is_left_out() -> None:
    free = ["tracking.mode=disabled", "train.log_every=3", "train.save_every=7", "sweep.name=x", "teacher.store=on"]
    free += ["teacher.store_dir=x", "train.keep_checkpoints=true", "teacher.license=mit", "eval.every=3"]
    plain = config_identity(config())
    assert config_identity(config(*free, "student.layers=3")) == plain  # the student is not cut
    other = [
        "train.seed=1",
        "data.take=9",
        "optim.lr=1",
        "optim.weight_decay=1",
        "train.precision=bf16",
        "loss.alpha=1",
    ]
    other += ["teacher.precision=fp32", "teacher.micro_batch_size=4", "data.template.user=x", "train.on_nonfinite=skip"]
    for word in other:
        assert config_identity(config(word)) != plain, word
    best, cut = (config("train.keep=best", "eval.every=3"), compose(["student=cut", "student.layers=2"]))
    assert config_identity(best) != config_identity(config("train.keep=best", "eval.every=4"))
    other_cut = config_identity(compose(["student=cut", "student.layers=3"]))
    assert differing(config_identity(cut), other_cut) == ["student.layers"]


def test_without_distillation_the_rest_of_the_loss_is_not_used() -> None:
    plain = config_identity(config("loss=cross_entropy"))
    assert config_identity(config("loss=jsd", "loss.alpha=0", "loss.temperature=4")) == plain
    assert plain["loss.alpha"] == 0


def test_a_digest_is_the_same_on_any_day_and_for_whole_numbers() -> None:
    """A digest that moves repeats what is done: change this only with what it describes."""
    assert digest({"a": 1.0, "b": [None, "x"]}) == digest({"b": [None, "x"], "a": 1}) == "601e57"


def change(file: str) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(Path(file).read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (change("rows/a.jsonl"), ["data"]),
        (lambda: write_pairs(Path("rows/b.jsonl")), ["data"]),
        (change("teacher/model.safetensors"), ["teacher"]),
        (change("student/config.json"), ["student"]),
        (change("student/tokenizer_config.json"), ["tokenizer"]),
        (change("template.jinja"), ["chat_template"]),
        (change("own_loss.py"), ["plugins"]),
        (lambda: Path("rows/notes.md").write_text("no rows"), []),
    ],
)
def test_contents_are_part_of_it(place: Path, changed: Callable[[], object], key: list[str]) -> None:
    own = config("data.chat_template=template.jinja")
    was = identity(own)
    assert all(was[name] for name in identities.CONTENTS)
    assert identity(own) == was
    changed()
    assert differing(was, identity(own)) == key
    assert "own_loss" not in sys.modules


def test_data_are_known_by_their_contents_however_they_are_named(place: Path) -> None:
    write_pairs(place / "rows" / "b.jsonl", 5)
    named = ("rows", "rows/*.jsonl", "[rows/a.jsonl,rows/b.jsonl]", str(place / "rows"))
    assert len({identity(config(data=data))["data"] for data in named}) == 1
    assert identity(config("data.validation=rows/a.jsonl"))["data"] != identity(config())["data"]
    (place / "saved" / "train").mkdir(parents=True)
    (place / "saved" / "dataset_dict.json").write_text("{}")
    found = []
    for rows in ("old", "new"):
        (place / "saved" / "train" / "data.arrow").write_text(rows)
        found.append(identity(config(data="saved"))["data"])
    assert len({*found}) == 2


def test_what_is_on_the_hub_is_known_by_its_commit_once_it_was_downloaded(place: Path) -> None:
    hub = config("teacher.path=org/name")
    before = identity(hub)
    assert before["teacher"] is None
    put_on_hub(place / "hub", "org/name", place / "teacher")
    after = identity(hub)
    assert after["teacher"] == "0123456789abcdef0123456789abcdef01234567"
    assert differing(before, after) == []  # what was not known is no difference
    (place / "hub/models--org--name/refs/main").write_text("f" * 40)
    assert differing(after, identity(hub)) == ["teacher", "tokenizer"]
    assert identity(config("teacher.path=org/name", f"teacher.revision={'e' * 40}"))["teacher"] == "e" * 40


def test_a_big_file_is_hashed_once_until_its_size_or_time_changes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = place / "big.bin"
    file.write_bytes(bytes(identities.BLOCK + 1))
    first = content_hash(file)
    monkeypatch.setattr("xxhash.xxh3_128", None)  # what reads the file
    assert content_hash(file) == first
    monkeypatch.undo()
    monkeypatch.setenv("KDX_CACHE", str(place / "cache"))
    os.utime(file, (1, 1))
    assert content_hash(file) == first
    file.write_bytes(bytes(identities.BLOCK) + b"x")
    assert content_hash(file) != first


def test_a_run_that_diverged_may_skip_such_steps() -> None:
    assert may_differ("train.on_nonfinite", "skip") and may_differ("train.max_nonfinite", 10)
    assert not may_differ("train.on_nonfinite", "stop") and not may_differ("train.seed", 1)


def test_the_table_has_three_columns() -> None:
    rows = table([("train.seed", 0, 1), ("data", None, "x" * 100)])
    assert rows[:2] == ["  key         was   now", "  train.seed  0     1"]
    assert len(rows[2]) < 90
