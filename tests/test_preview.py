"""kdx check: what a run would be, without training."""

import json
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import in_process
from runs import config_of, lines, words_of
from transformers import AutoTokenizer

from kdx import check
from kdx.cli import compose
from kdx.data.batches import Row
from kdx.distill import distill, prepared
from kdx.optim import state_bytes
from kdx.run import checkpoint, results
from kdx.run.folder import Record
from kdx.run.launch import build_accelerator
from kdx.teacher import Teacher


@pytest.fixture
def made():
    """Build the training of a config, as a run would."""
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(prepared(config, Record(), build_accelerator(config)))


def test_it_says_what_would_be_trained_and_trains_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = Record(sources={"train.epochs": "typed", "train.max_steps": "conf/config.yaml"})
    check.check(config_of(place, "train.epochs=0.5", "train.save_every=2"), Path("run"), record, ())
    told = capsys.readouterr().out
    for part in ("objective", "⟦", "⟧", "activations", "optimizer", "teacher", "gradients", "total", "fits",
                 "lower train.micro_batch_size", "tokens in 5 steps", "checkpoints", "free", " 5, batch size", " epochs (typed)"):  # fmt: skip
        assert part in told
    assert list(tmp_path.iterdir()) == []


def test_time_is_that_of_the_steps(place, made):
    training = made(config_of(place, "train.max_steps=5"))
    tokens = int(5 / training.batches.steps_per_epoch * training.data.train.lengths.sum())
    assert f"about {timedelta(seconds=3 * tokens)} for {tokens:,} tokens in 5 steps" in check.time_line(training, 3.0)


def test_what_is_kept_in_memory_is_that_of_its_tensors(place, made):
    training = made(config_of(place))
    parts = check.kept_in_memory(training)
    assert parts["weights"] >= sum(p.nbytes for p in training.student.parameters())
    assert parts["optimizer"] == sum(8 * p.numel() for p in training.student.parameters())
    assert parts["teacher"] >= sum(p.nbytes for p in training.teacher.model.parameters())


def test_the_peak_is_that_of_the_tensors_alive_together():
    with check.PeakBytes() as counted:
        one = torch.ones(100, dtype=torch.float64)
        two = one * 2
        del one
        view = two.view(10, 10).add_(1)
        assert (view + 1).sum() == 400
    assert 1600 <= counted.peak < 1700


def test_the_largest_micro_batch_that_fits_is_said(place, made, monkeypatch):
    training = made(config_of(place, "train.batch_size=8", "train.micro_batch_size=1"))
    measured = check.rises(training, 1, 1e12)
    assert [*measured] == [1, 2]
    assert check.predicted(measured, 4) == 3 * measured[2] - 2 * measured[1]
    for size, says in ((1, "=1, with"), (4, "=4, with"), (8, "=8 (the whole batch), with")):
        free = check.predicted(measured, size) + check.kept_in_memory(training)["optimizer"] + 1
        monkeypatch.setattr(check, "free_bytes", lambda _, free=free: free)
        assert f"train.micro_batch_size{says}" in check.memory_lines(training)[0][-1]
    monkeypatch.setattr(check, "free_bytes", lambda _: 0)
    assert "no micro-batch" in check.memory_lines(training)[0][-1]
    by_tokens = made(
        config_of(place, "train.batch_size=6", "train.micro_batch_size=auto", "train.micro_batch_tokens=1")
    )
    free = check.predicted(check.rises(by_tokens, 1, 1e12), 5) + check.kept_in_memory(by_tokens)["optimizer"] + 1
    monkeypatch.setattr(check, "free_bytes", lambda _: free)
    tokens = 5 * int(by_tokens.data.train.lengths.max())
    assert f"train.micro_batch_tokens={tokens}, with" in check.memory_lines(by_tokens)[0][-1]


def test_what_alpha_would_weigh_is_what_the_first_step_logs(place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = words_of(place, "loss=forward_kl,jsd", "loss.temperature=1,2", "loss.alpha=0.3,0.7", "train.max_steps=1")
    code, out, _ = in_process(capfd, "check", "-m", *words, "train.seed=0,1", "sweep.name=seen")
    assert code == 0
    assert "equal at α" in out
    found = json.loads(Path("outputs/check/seen/check.json").read_text())
    assert Path("outputs/check/seen/effective_alpha.png").read_bytes()[:4] == b"\x89PNG"
    row = next(r for r in found["rows"] if r["divergence"].startswith("jsd") and r["temperature"] == 2)
    distill(config_of(place, "loss=jsd", "loss.temperature=2", "loss.alpha=0.7", "train.max_steps=1"), Path("run"))
    first = lines(Path("run/metrics.jsonl"))[0]
    for name, value in (("kd", 0.7 * row["grad_kd"]), ("ce", 0.3 * row["grad_ce"])):
        assert first[f"train/grad_{name}"] == pytest.approx(value, rel=1e-4)
    assert first["train/effective_alpha"] == pytest.approx(row["effective_alpha"]["0.7"], rel=1e-4)
    assert first["train/grad_cosine"] == pytest.approx(row["grad_cosine"], rel=1e-4)
    both = [(text.count("loss.alpha="), text.count("train.seed=0,1 ")) for text in found["suggested"]]
    assert both == [(1, 1)] * 4  # of the seeds the first is measured, and each line runs both
    assert out.count("memory of a step") == 2  # for each seed; other points differ in the loss alone
    assert in_process(capfd, "check", "-m", *words, "loss.beta=2")[0] == 2  # of each divergence, not of the first alone


def test_what_counts_is_marked(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    tokens = tokenizer("Hello there, how are you today?")["input_ids"]
    half = len(tokens) // 2
    row = Row("a", tokens, [False] * half + [True] * (len(tokens) - half))
    assert check.marked(tokenizer, row) == f"{tokenizer.decode(tokens[:half])}⟦{tokenizer.decode(tokens[half:])}⟧"


def test_the_teacher_is_timed_live_or_from_a_filled_store_and_no_row_is_kept(place, tmp_path, monkeypatch, capfd):
    asked = []
    live = Teacher.live
    monkeypatch.setattr(Teacher, "live", lambda self, batch: asked.append(1) or live(self, batch))
    monkeypatch.chdir(tmp_path)
    words = words_of(place, "train.max_steps=4", "teacher.store=on", f"teacher.store_dir={tmp_path}/store")
    assert in_process(capfd, "check", *words)[0] == 0
    assert len(asked) == 2 + 4 + 1  # to warm up, for the peaks of one row and of two, and timed
    assert not list(tmp_path.glob("store/*/rows/*"))
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
    ],
)
def test_what_an_optimizer_keeps_is_measured(choice, per_weight):
    assert state_bytes(compose(choice).optim, torch.zeros(1)) == per_weight


@pytest.mark.parametrize("choice", [[], ["train.keep=best"]])
def test_the_bytes_on_disk_are_those_a_run_writes(place, made, tmp_path, choice):
    """Of each checkpoint, of the student and of the best weights, but for headers and the small files beside them."""
    more = ["train.max_steps=2", "train.save_every=1", "eval.every=1", "train.keep_checkpoints=true"]
    config = config_of(place, f"student.path={place / 'llama'}", *more, *choice)
    student, best, one = results.bytes_on_disk(made(config))
    distill(config, tmp_path)

    def size(*files):
        return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".pt"))

    step, _ = checkpoint.found(tmp_path)
    assert one == pytest.approx(size(*step.iterdir()) - size(step / "random.pt"), rel=0.15)
    left = size(*(tmp_path / "checkpoints").iterdir(), *(tmp_path / "student").iterdir())
    assert student + best == pytest.approx(left, rel=0.15)
