"""kdx check: what a run would be, without running it."""

from pathlib import Path

import pytest
import torch
from kdx.prepare import bytes_on_disk, prepare
from processes import in_process
from standins import write_chats, write_dialogpt
from transformers import AutoTokenizer

from kdx.check import Cost, check, marked, minutes, time_line
from kdx.cli import compose
from kdx.data.batches import Row
from kdx.distill import distill
from kdx.errors import DataError
from kdx.optim import state_bytes
from kdx.run import checkpoint, typed
from kdx.run.launch import build_accelerator
from kdx.store import count_rows
from kdx.teacher import Teacher


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("check")
    write_dialogpt(place / "teacher", 4, 32, pickled=False)
    write_dialogpt(place / "student", 2, 16, pickled=False, seed=1)
    write_chats(place / "chats.jsonl")
    words = ["teacher=hf", f"teacher.path={place}/teacher", "student=hf", f"student.path={place}/student"]
    return [*words, "data=messages", f"data.path={place}/chats.jsonl", "data.validation=8", "train.max_steps=4"]


def test_it_says_what_would_be_trained_and_trains_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(compose([*words, "train.save_every=2", "train.precision=fp32", "teacher.precision=fp32"]), Path("run"))
    told = capsys.readouterr().out
    for part in (
        "objective",
        "padding",
        "⟦",
        "⟧",
        "together",
        "optim=adamw_8bit",
        "tokens in 4 steps",
        "for 2 held-out measures",
        "checkpoints",
        "free",
    ):
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_savings_that_are_taken_are_not_offered(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    offered = ["train.gradient_checkpointing=true", "optim=adamw_8bit", "train.micro_batch_size=1"]
    check(compose(words), Path())
    told = capsys.readouterr().out
    assert all(word in told for word in offered)
    check(compose([*words, *offered]), Path())
    told = capsys.readouterr().out
    assert not any(word in told for word in offered)


def test_time_is_that_of_steps_and_of_measures(words: list[str]) -> None:
    config = compose([*words, "train.max_steps=5", "train.eval_every=2", "train.batch_size=8"])
    run = prepare(config, build_accelerator(config), owner="check")
    tokens = sum(len(run.rows[i].tokens) for _, batch in run.batches.plan(0, 5) for i in batch)
    held_out = sum(len(row.tokens) for row in run.held_out_rows)
    told = time_line(run, Cost(0.0, 1.0, 2.0, 4.0))
    assert f"about {minutes(3 * tokens)} for {tokens:,} tokens in 5 steps" in told
    assert f"{minutes((1 + 4 * 4) * held_out)} for 4 held-out measures" in told
    assert [minutes(s) for s in (7.4, 99, 100, 5990, 36_000)] == ["7 s", "99 s", "2 min", "100 min", "10.0 h"]


def test_all_data_faults_are_told(words: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": "oops"}\n{"messages": []}\n{"nothing": 1}\n')
    with pytest.raises(DataError) as error:
        check(compose([word for word in words if not word.startswith("data.path")] + [f"data.path={bad}"]), Path())
    assert [f"{bad}:{line}" in "\n".join(error.value.lines) for line in (1, 2, 3)] == [True] * 3


def test_what_counts_is_marked(words: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words[1].partition("=")[2])
    tokens = tokenizer("Hello there, how are you today?")["input_ids"]
    half = len(tokens) // 2
    row = Row("a", tokens, [False] * half + [True] * (len(tokens) - half))
    first, rest = tokenizer.decode(tokens[:half]), tokenizer.decode(tokens[half:])
    assert marked(tokenizer, row) == f"{first}⟦{rest}⟧"
    assert torch.is_grad_enabled()


def test_it_is_of_the_run_that_is_recalled(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the words and the folder that run.like and run.resume name; `store fill` asks that run's teacher."""
    monkeypatch.chdir(tmp_path)
    store = tmp_path / "store"
    typed.keep(tmp_path / "old", [*words, "train.max_steps=3", f"teacher.store_dir={store}"], [])
    for asked in ("run.like=old", "run.resume=old"):
        code, told, _ = in_process(capfd, "check", asked)
        assert code == 0
        assert "tokens in 3 steps" in told
    code, told, _ = in_process(capfd, "store", "fill", "run.like=old")
    assert code == 0
    assert f"{words[1].rpartition('/')[2]}" in next(store.glob("*/teacher.json")).read_text()


def test_a_disk_that_is_too_small_is_told_as_the_run_would(
    words: list[str],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if not small_disk.is_mount():
        pytest.skip("mounting is not allowed")
    (small_disk / "taken").write_bytes(bytes(800_000))
    words = [*words, "train.save_every=1", "tracking.mode=disabled", f"hydra.run.dir={small_disk}/run"]
    checked, told, (line,) = in_process(capfd, "check", *words)
    assert "kB free" in told
    assert "held-out measures" in told
    code, _, lines = in_process(capfd, *words)
    assert (checked, code) == (3, 3)
    assert lines[-1].split(" bytes, and ")[0] == line.split(" bytes, and ")[0]
    assert "checkpoints need" in line


def test_the_live_teacher_is_timed_and_no_row_is_kept(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In both passes; once the store is filled the run reads it, and so does check."""
    asked = []
    live = Teacher.live
    monkeypatch.setattr(Teacher, "live", lambda self, batch: asked.append(1) or live(self, batch))
    words = [*words, "teacher.store=on", f"teacher.store_dir={tmp_path}/store"]
    assert in_process(capfd, "check", *words)[0] == 0
    assert len(asked) == 2
    (folder,) = (file.parent for file in tmp_path.glob("store/*/teacher.json"))
    assert count_rows(folder, is_verify=True) == (0, 0)
    assert in_process(capfd, "store", "fill", *words)[0] == 0
    asked.clear()
    assert in_process(capfd, "check", *words)[0] == 0
    assert asked == []


@pytest.mark.parametrize(
    ("choice", "per_weight"),
    [
        (["optim=adamw"], 8),
        (["optim=adamw_8bit"], 2),
        (["optim=lion_8bit"], 1),
        (["optim.name=torch.SGD", "~optim.betas"], 0),
        (["optim.name=torch.SGD", "~optim.betas", "+optim.momentum=0.9"], 4),
    ],
)
def test_what_an_optimizer_keeps_is_measured(choice: list[str], per_weight: int) -> None:
    assert state_bytes(compose(choice).optim, torch.zeros(1)) == per_weight


@pytest.mark.parametrize("choice", [[], ["train.keep=best"], ["optim.name=torch.SGD", "~optim.betas"]])
def test_the_bytes_on_disk_are_those_a_run_writes(words: list[str], tmp_path: Path, choice: list[str]) -> None:
    """Each checkpoint, and beside them the student and the best weights, but for a file's header."""
    more = ["train.save_every=2", "train.eval_every=1", "train.keep_checkpoints=true", "tracking.mode=disabled"]
    write_dialogpt(tmp_path / "wide", 2, 128, pickled=False)
    config = compose([*words, f"student.path={tmp_path}/wide", *more, *choice])
    run = prepare(config, build_accelerator(config), owner="check")
    student, best, one = bytes_on_disk(run)
    distill(config, tmp_path / "run")
    kept = tmp_path / "run/checkpoints"

    def size(*files: Path) -> int:
        return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".pt"))

    step, _ = checkpoint.found(tmp_path / "run")
    written = size(*step.iterdir()) - size(step / "random.pt")
    assert one == pytest.approx(written, rel=0.03)
    assert student + best == pytest.approx(size(*kept.iterdir(), *(tmp_path / "run/student").iterdir()), rel=0.03)
