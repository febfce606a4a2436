"""Numbers that are not finite stop a run before they reach its weights, and say where they are from."""

import json
import re
from functools import partial

import pytest
from runs import config_of, lines, nan_in_gradient, nan_in_loss, nan_in_teacher, outcome, signal_at, start, status
from safetensors.torch import load_file

from kdx import loss
from kdx.data.sources import Conversation
from kdx.run import checkpoint

WORDS = ("train.micro_batch_size=4", "train.max_steps=9", "train.save_every=2")


@pytest.mark.parametrize(
    ("fault", "term", "num_rows"),
    [
        (nan_in_loss, "the distillation term", 4),
        (nan_in_gradient, "the gradient", 4),
        (nan_in_teacher, "what the teacher says", 1),
    ],
)
def test_not_finite_at_step_7(place, tmp_path, figure, fault, term, num_rows):
    config = config_of(place, *WORDS, *([] if fault is nan_in_teacher else ["loss.name=planted"]))
    run_dir = tmp_path / "run"
    run = start(config, run_dir, partial(fault, 7))
    assert run.code == 4, run.text
    (line,) = [line for line in run.text.splitlines() if line.startswith("kdx: error: ")]
    assert line.startswith(f"kdx: error: step 7: {term} is not finite; the weights are still those of step 6 (rows: ")
    rows = re.search(r"\(rows: (.*?)\)", line).group(1).split(", ")
    assert len(rows) == num_rows
    text = (place / "pairs.jsonl").read_text().splitlines()
    for row in rows:
        name, file, number = re.fullmatch(r"(\w+) at (.*):(\d+)", row).groups()
        said = json.loads(text[int(number) - 1])
        chat = [{"role": "user", "content": said["source"]}, {"role": "assistant", "content": said["target"]}]
        assert (name, file) == (Conversation("", chat, "").digest[:32], str(place / "pairs.jsonl"))
    assert status(run_dir)["state"] == "diverged"
    newest, skipped = checkpoint.newest(run_dir)
    assert (newest.name, skipped) == ("step-00000006", [])
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())
    again = start(config, run_dir, partial(fault, 100))  # the fault does not come back
    assert again.code == 0, again.text
    assert start(config, tmp_path / "straight", partial(fault, 100)).code == 0
    assert outcome(run_dir) == outcome(tmp_path / "straight")
    figure(f"NaN in {term}: exit 4 at step 7, {num_rows} row(s) named, weights finite, resumed and bitwise equal")


def test_a_step_that_is_skipped(place, tmp_path):
    config = config_of(place, *WORDS, "train.on_nonfinite=skip", "train.max_nonfinite=1")
    run = start(config, tmp_path / "run", partial(nan_in_teacher, 7))
    assert run.code == 0, run.text
    assert "step 7 is skipped: what the teacher says is not finite" in " ".join(run.text.split())
    losses = {x["step"]: x["train/loss"] for x in lines(tmp_path / "run" / "metrics.jsonl") if "train/loss" in x}
    assert losses[7] is None
    assert all(isinstance(value, float) for step, value in losses.items() if step != 7)


def test_more_than_may_be_skipped(place, tmp_path):
    words = [word for word in WORDS if "max_steps" not in word]
    config = config_of(place, *words, "train.epochs=2", "train.on_nonfinite=skip", "train.max_nonfinite=1")
    run = start(config, tmp_path / "run", partial(nan_in_teacher, 7))  # that row comes again in the second epoch
    assert run.code == 4, run.text
    assert "1 steps were skipped before, train.max_nonfinite is 1" in run.text


def skip_then_stop():
    nan_in_teacher(7)
    signal_at(8)()


def test_what_was_skipped_before_a_stop_counts_after_it(place, tmp_path):
    config = config_of(place, *WORDS, "train.on_nonfinite=skip", "train.max_nonfinite=1")
    assert start(config, tmp_path / "run", skip_then_stop).code == 143
    again = start(config, tmp_path / "run", partial(nan_in_teacher, 1))
    assert again.code == 4, again.text
    assert "1 steps were skipped before, train.max_nonfinite is 1" in again.text


def nan_at_the_end():
    from kdx import distill

    known = distill.Measurer.__call__
    calls = 0

    def measure(self, precision):
        nonlocal calls
        calls += 1
        student, teacher = known(self, precision)
        if calls == 2:  # the first is before training
            student.rows[0]["ce"] = float("nan")
        return student, teacher

    distill.Measurer.__call__ = measure


def test_a_final_measure_that_is_not_finite_is_no_done_run(place, tmp_path):
    run = start(config_of(place, *WORDS), tmp_path / "run", nan_at_the_end)
    assert run.code == 4, run.text
    assert "of the student's held-out measures ce are not finite; no student is saved" in run.text
    assert status(tmp_path / "run")["state"] == "diverged"
    assert not (tmp_path / "run" / "student").exists()


def test_a_run_that_learnt_nothing_is_not_done(place, tmp_path):
    words = ("train.max_steps=3", "train.on_nonfinite=skip", "train.max_nonfinite=9", "loss.name=planted")
    run = start(config_of(place, *words), tmp_path / "run", nan_always)
    assert run.code == 4, run.text
    assert "every step was skipped: nothing is learnt" in run.text
    assert status(tmp_path / "run")["state"] == "diverged"


def nan_always():
    @loss.register
    def planted(student, teacher):
        return loss.forward_kl(student, teacher) * float("nan")
