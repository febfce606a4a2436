"""The student is on the disk before it is measured: nothing that happens while measuring costs training."""

import json
import os
import signal
from functools import partial

import pytest
import torch
from runs import (
    checkpoints_of,
    config_of,
    litter,
    outcome,
    run_here,
    signal_self,
    start,
    status,
    straight,
    summary_of,
)

from kdx.evaluate import Judge
from kdx.run import checkpoint, results
from kdx.train import Training

WORDS = ("train.max_steps=4", "train.save_every=0", "train.micro_batch_size=4")


@pytest.fixture(scope="module")
def undisturbed(place, tmp_path_factory):
    """The config of the runs below, what they end in, and their summary."""
    config, run_dir = config_of(place, *WORDS), tmp_path_factory.mktemp("undisturbed") / "run"
    return config, straight(config, run_dir), summary_of(run_dir)


def in_final_measures(act, patch):
    """Do something when the trained student is about to be measured."""
    known = Judge.__call__

    def judge(self, model, *, as_saved=False):
        if as_saved:
            act()
        return known(self, model, as_saved=as_saved)

    patch.setattr(Judge, "__call__", judge)


def before_summary(act, patch):
    """Do something when everything is measured and summary.json is about to be written."""
    known = results.write_json

    def write(file, value):
        if file.name == "summary.json":
            act()
        known(file, value)

    patch.setattr(results, "write_json", write)


def raises(error):
    def act(*_):
        raise error

    return act


def no_step(patch):
    """Fail if a step is trained."""
    patch.setattr(Training, "forward_backward", raises(AssertionError("a step was trained")))


SIGKILL = partial(signal_self, signal.SIGKILL)
FAULTS = {
    "out of memory": (partial(in_final_measures, raises(torch.OutOfMemoryError("CUDA out of memory"))), 3, "failed"),
    "a full disk": (partial(before_summary, raises(OSError(28, "No space left on device"))), 3, "failed"),
    "SIGTERM": (partial(in_final_measures, signal_self), 143, "interrupted"),
    "SIGKILL": (partial(in_final_measures, SIGKILL), -signal.SIGKILL, "running"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_goes_wrong_in_the_final_measures_costs_no_step(undisturbed, tmp_path, capfd, kind):
    config, expected, summary = undisturbed
    fault, code, state = FAULTS[kind]
    run_dir = tmp_path / "run"
    ended = start(config, run_dir, fault).code if kind == "SIGKILL" else run_here(config, run_dir, fault)
    assert (ended, status(run_dir)["state"]) == (code, state)
    if kind == "out of memory":
        assert status(run_dir)["reason"].startswith("out of memory: ")
        assert "optim=adamw_8bit" in capfd.readouterr().err
    student = run_dir / "student/model.safetensors"
    written, trained = student.stat().st_mtime_ns, json.loads((run_dir / "trained.json").read_text())
    assert (trained["max_steps"], trained["state"]["step"]) == (4, 4)
    assert not checkpoints_of(run_dir)
    assert run_here(config, run_dir, no_step) == 0
    assert "training is finished" in (run_dir / "kdx.log").read_text()
    assert student.stat().st_mtime_ns == written
    assert status(run_dir)["state"] == "done"
    assert outcome(run_dir) == expected
    assert summary_of(run_dir) == summary
    assert not litter(run_dir)


def test_keep_best_measures_again_what_it_kept(place, tmp_path):
    """The weights of the best step are the student, whether it is measured by the process that trained it or another."""
    words = ("train.keep=best", "eval.every=1", "optim.lr=2", "optim.schedule=constant")
    config = config_of(place, *WORDS, *words)
    expected = straight(config, tmp_path / "straight")
    assert run_here(config, tmp_path / "run", partial(in_final_measures, raises(RuntimeError("a bug")))) == 1
    assert run_here(config, tmp_path / "run", no_step) == 0
    assert outcome(tmp_path / "run") == expected
    assert summary_of(tmp_path / "run") == summary_of(tmp_path / "straight")
    assert summary_of(tmp_path / "run")["run"]["kept_step"] < 4
    assert not (tmp_path / "run/checkpoints").exists()


def saved_steps(patch, steps):
    known = checkpoint.save
    patch.setattr(checkpoint, "save", lambda *a, **k: steps.append(a[2]["step"]) or known(*a, **k))


@pytest.mark.parametrize(
    ("words", "expected", "kept"),
    [
        ((), [], []),
        (("train.save_every=3",), [3], []),
        (("train.save_minutes=1e-9",), [1, 2, 3], []),
        (("train.keep_checkpoints=true",), [4], ["step-00000004"]),
        (("train.keep_checkpoints=true", "train.save_every=2"), [2, 4], ["step-00000004", "step-00000002"]),
    ],
)
def test_checkpoints_are_written_where_they_are_due(place, tmp_path, words, expected, kept):
    words = [*words, *[word for word in WORDS if word.split("=")[0] not in {w.split("=")[0] for w in words}]]
    steps = []
    assert run_here(config_of(place, *words), tmp_path / "run", partial(saved_steps, steps=steps)) == 0
    assert (steps, checkpoints_of(tmp_path / "run")) == (expected, kept)


def test_out_of_memory_in_training_keeps_the_last_checkpoint(place, tmp_path, undisturbed):
    """An allocation that no machine can give, in a process; then the same run to its end."""
    _, expected, _ = undisturbed
    config = config_of(place, *[w for w in WORDS if "save_every" not in w], "train.save_every=2")

    def greedy(patch):
        known, calls = Training.forward_backward, []

        def step(self, batch, stop):
            calls.append(1)
            return torch.empty(2**50) if len(calls) == 4 else known(self, batch, stop)

        patch.setattr(Training, "forward_backward", step)

    assert run_here(config, tmp_path / "run", greedy) == 3
    assert status(tmp_path / "run")["reason"].startswith("out of memory: ")
    assert checkpoints_of(tmp_path / "run") == ["step-00000002"]
    assert run_here(config, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == expected


def test_what_saved_nothing_may_be_corrected_in_its_folder(place, tmp_path):
    def fault(patch):
        patch.setattr(Training, "forward_backward", raises(torch.OutOfMemoryError("CUDA out of memory")))

    assert run_here(config_of(place, *WORDS), tmp_path / "run", fault) == 3
    corrected = config_of(place, *WORDS[:2], "train.micro_batch_size=2")
    assert run_here(corrected, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == straight(corrected, tmp_path / "straight")


def test_a_signal_when_all_is_done_leaves_the_run_done(place, tmp_path):
    def fault(patch):
        known = results.remove
        patch.setattr(results, "remove", lambda path: (known(path), os.kill(os.getpid(), 15)))

    assert run_here(config_of(place, *WORDS), tmp_path / "run", fault) == 143  # of a sweep, no other job begins
    assert status(tmp_path / "run")["state"] == "done"
