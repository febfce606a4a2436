"""Numbers that are not finite stop a run before they reach its weights, and name the rows they come from."""

import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
from runs import (
    both,
    checkpoints_of,
    config_of,
    log_of,
    losses_of,
    nan_in_gradient,
    nan_in_teacher,
    outcome,
    run_here,
    signal_at,
    status,
)
from safetensors.torch import load_file

from kdx.evaluate import Judge
from kdx.train import State, Training

WORDS = ("train.micro_batch_size=2", "train.max_steps=7", "train.save_every=2")


def rows_named(reason):
    """The rows that a reason names, as (file, line)."""
    names = re.search(r"\(rows: (.*?)\)", reason).group(1).split(", ")
    return [(name.rpartition(":")[0], int(name.rpartition(":")[2])) for name in names]


@pytest.mark.parametrize(
    ("fault", "term", "num_rows"),
    [
        (nan_in_gradient, "the gradient", 4),  # of the step
        (nan_in_teacher, "the distillation term", 2),  # of its micro-batch
    ],
)
def test_not_finite_at_step_5(place, tmp_path, capfd, fault, term, num_rows):
    config = config_of(place, *WORDS, *([] if fault is nan_in_teacher else ["loss.name=planted"]))
    run_dir = tmp_path / "run"
    seen = []

    def watched(patch):
        fault(5, patch)
        known = Training.forward_backward
        patch.setattr(Training, "forward_backward", lambda self, b, s: (seen.append(b), known(self, b, s))[1])

    assert run_here(config, run_dir, watched) == 4
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("kdx: error: ")]
    assert line.startswith(f"kdx: error: step 5: {term} is not finite; the weights are still those of step 4 (rows: ")
    blamed = seen[4].micro_batches[: 1 if fault is nan_in_teacher else None]
    expected = [where for micro in blamed for row in micro.rows if (where := row.where or row.id)]
    assert [f"{file}:{number}" for file, number in rows_named(line)] == expected
    assert len(expected) == num_rows
    assert {file for file, _ in rows_named(line)} == {str(place / "pairs.jsonl")}
    assert status(run_dir)["state"] == "diverged"
    assert checkpoints_of(run_dir)[0] == "step-00000004"
    weights = load_file(run_dir / "checkpoints/step-00000004/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert run_here(config, run_dir, partial(fault, 100)) == 0  # the fault does not come again
    assert run_here(config, tmp_path / "straight", partial(fault, 100)) == 0
    assert outcome(run_dir) == outcome(tmp_path / "straight")


def test_steps_are_skipped_up_to_max_nonfinite(place, tmp_path, capfd):
    """The row comes again in the second epoch: one step may be skipped, the second stops the run."""
    words = ("train.on_nonfinite=skip", "train.max_nonfinite=1", "train.micro_batch_size=4")
    config = config_of(place, "train.max_steps=9", *words)
    assert run_here(config, tmp_path / "one", partial(nan_in_teacher, 3)) == 0
    assert "step 3 is skipped: the distillation term is not finite" in log_of(tmp_path / "one")
    losses = losses_of(tmp_path / "one")
    assert losses[2] is None and all(isinstance(x, float) for i, x in enumerate(losses) if i != 2)
    assert run_here(config_of(place, "train.epochs=2", *words), tmp_path / "two", partial(nan_in_teacher, 3)) == 4
    assert "; 1 steps were skipped before (train.max_nonfinite)" in capfd.readouterr().err


def test_what_was_skipped_before_a_stop_counts_after_it(place, tmp_path, capfd):
    config = config_of(place, *WORDS, "train.on_nonfinite=skip", "train.max_nonfinite=1")
    assert run_here(config, tmp_path / "run", both(partial(nan_in_teacher, 3), signal_at(4))) == 143
    assert run_here(config, tmp_path / "run", partial(nan_in_teacher, 1)) == 4
    assert "1 steps were skipped before" in capfd.readouterr().err


def nan_at_the_end(patch):
    """Make a final measure NaN, as weights that overflow do."""
    known = Judge.__call__

    def judge(self, model, *, as_saved=False):
        measures = known(self, model, as_saved=as_saved)
        if as_saved:
            measures.rows[0]["ce"] = math.nan
        return measures

    patch.setattr(Judge, "__call__", judge)


def test_final_measures_that_are_not_finite_are_no_done_run(place, tmp_path, capfd):
    """The student stays, and the same command says the same again without training."""
    config = config_of(place, *WORDS)
    for _ in range(2):
        assert run_here(config, tmp_path / "run", nan_at_the_end) == 4
        assert (
            "step 7: the student's held-out ce, perplexity are not finite; it is never ranked" in capfd.readouterr().err
        )
        assert status(tmp_path / "run")["state"] == "diverged"
        assert (tmp_path / "run/student/model.safetensors").is_file()
        assert not (tmp_path / "run/summary.json").exists()
    assert len(losses_of(tmp_path / "run")) == 7


@pytest.mark.parametrize("name", ["kd", "ce", "norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaler", [None, "fp16"])
def test_any_term_that_is_not_finite_stops_a_step(name, value, scaler):
    """Of fp16 not the gradient's norm: its scaler skips such a step by itself, and it counts as no update."""
    training, did = object.__new__(Training), []
    training.state = State()
    training.machine = SimpleNamespace(scaler=scaler, optimizer_step_was_skipped=False)
    training.optimizer = SimpleNamespace(step=lambda: did.append("step"), zero_grad=lambda **_: None)
    training.schedule = SimpleNamespace(step=lambda: None)
    training._skip_or_stop = lambda batch, name: did.append(name)
    terms = {"kd": 0.0, "ce": 0.0, "norm": 0.0}
    assert training.update(None, {"kd": 0.0, "ce": 0.0}, 0.0)
    terms |= {name: value}
    norm = terms.pop("norm")
    is_step = name == "norm" and scaler is not None
    training.machine.optimizer_step_was_skipped = is_step
    assert training.update(None, terms, norm) == is_step
    assert did == ["step", "step" if is_step else name.replace("norm", "gradient")]
    assert training.state.num_updates == 1
