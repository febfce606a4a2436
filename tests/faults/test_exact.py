"""A run that is stopped anywhere and resumed is the straight run, bit for bit; another run is refused with a diff."""

import json
import re
import shutil
from functools import partial

import pytest
from runs import (
    at_step,
    checkpoints_of,
    config_of,
    lines,
    log_of,
    losses_of,
    outcome,
    run_here,
    signal_at,
    signal_self,
    status,
    steps_of,
    straight,
    write_pairs,
)

from kdx import train
from kdx.evaluate import Judge
from kdx.run import checkpoint
from kdx.train import Training

KINDS = {
    "dropout, accumulation 4, 1.5 epochs, alpha and temperature that move": (
        "loss.alpha_end=0.2", "loss.temperature_end=1",
    ),
    "8-bit optimizer": ("optim=adamw_8bit",),
    "bf16 autocast": ("train.precision=bf16",),
    "keep=best, early stopping": (
        "eval.every=2", "train.keep=best", "train.early_stopping.patience=3", "optim.lr=0.2",
    ),
    "a half-filled store": ("teacher.store=on",),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed(place, tmp_path, full, figure, kind):
    words = ["train.epochs=1.5", "train.save_every=100", *KINDS[kind]]  # of 9 steps: 14

    def config_in(name):
        is_stored = "teacher.store=on" in words
        return config_of(place, *words, *[f"teacher.store_dir={tmp_path / name}-store"] * is_stored)

    expected = straight(config_in("straight"), tmp_path / "straight")
    last = steps_of(tmp_path / "straight")[-1]
    is_best = "best" in kind
    assert last == 14 or (is_best and last < 14)
    points = [2, last // 2, last - 1] if full else [last - 1 if is_best else last // 2]
    for step in points:
        run_dir = tmp_path / f"at-{step}"
        config = config_in(run_dir.name)
        assert run_here(config, run_dir, signal_at(step)) == 143
        assert (status(run_dir)["state"], status(run_dir)["step"]) == ("interrupted", step)
        assert checkpoints_of(run_dir) == [f"step-{step:08d}"]
        if is_best:
            (run_dir / "checkpoints" / "best.safetensors").unlink()  # the checkpoint has its own
        assert run_here(config, run_dir) == 0
        assert f"resuming from {run_dir}" in log_of(run_dir)
        assert outcome(run_dir) == expected
    figure(f"exact resume, {kind}: {len(points)} stops, bitwise equal")


@pytest.mark.parametrize(("change", "key"), [("rows", "data"), ("train.micro_batch_size=4", "train.micro_batch_size")])
def test_another_run_is_refused_with_a_diff(stopped, tmp_path, capfd, change, key):
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    rows = folder / "place/pairs.jsonl"
    kept = rows.read_text()
    if change == "rows":  # the config's words stay the same
        write_pairs(rows, 41)
        change = words[0]
    try:
        code = run_here(config_of(folder / "place", change, *words[1:]), tmp_path / "run")
    finally:
        rows.write_text(kept)
    printed = [line.removeprefix("kdx: error: ") for line in capfd.readouterr().err.splitlines()]
    assert code == 2, printed
    assert re.match(rf".*/run: holds a run with a different {key}\b", printed[0])
    assert re.fullmatch(r"  key +was +now", printed[1])
    assert re.match(rf"  {re.escape(key)} +\S+ +\S+", printed[2])
    assert status(tmp_path / "run")["state"] == "interrupted"


def test_another_number_of_processes_is_refused(stopped, tmp_path, capfd):
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    kept = json.loads((tmp_path / "run/data.json").read_text())
    (tmp_path / "run/data.json").write_text(json.dumps(kept | {"processes": 2}))
    assert run_here(config_of(folder / "place", *words), tmp_path / "run") == 2
    assert re.search(r"  processes +2 +1", capfd.readouterr().err)


def test_a_log_line_spans_a_stop(place, tmp_path):
    """A line every 4 steps, a stop at step 3: the line of step 4 is over all four."""
    config = config_of(place, "train.log_every=4", "train.max_steps=5", "train.micro_batch_size=4")
    straight(config, tmp_path / "straight")
    assert run_here(config, tmp_path / "run", signal_at(3)) == 143
    assert run_here(config, tmp_path / "run") == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")
    assert steps_of(tmp_path / "run") == [4, 5]


# ---- a stop and measures


def signal_in_measures(call, patch):
    """Send SIGTERM when held-out rows are measured for the nth time: the run stops after their first batch."""
    known, calls = Judge.__call__, []

    def judge(self, model, **how):
        calls.append(1)
        if len(calls) == call:
            signal_self()
        return known(self, model, **how)

    patch.setattr(Judge, "__call__", judge)


def test_a_stop_while_measuring_costs_no_step(place, tmp_path):
    """The checkpoint is of the step that was measured; a resumed run measures it again, and logs it once."""
    config = config_of(place, "train.max_steps=6", "eval.every=4", "train.save_every=0", "train.log_every=4")
    expected = straight(config, tmp_path / "straight")
    assert run_here(config, tmp_path / "run", partial(signal_in_measures, 2)) == 143
    assert checkpoints_of(tmp_path / "run") == ["step-00000004"]
    assert status(tmp_path / "run")["state"] == "interrupted"
    assert run_here(config, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == expected


def test_a_stop_comes_before_measures(place, tmp_path):
    config = config_of(place, "train.max_steps=6", "eval.every=2", "train.micro_batch_size=4")
    measured = []

    def fault(patch):
        signal_at(2)(patch)
        known = Training.measure
        patch.setattr(Training, "measure", lambda self, *how: measured.append(self.state.step) or known(self, *how))

    assert run_here(config, tmp_path / "run", fault) == 143
    assert measured == []
    assert run_here(config, tmp_path / "run") == 0
    assert [x["step"] for x in lines(tmp_path / "run/metrics.jsonl") if "eval/kl" in x] == [2, 4, 6]


# ---- what can no longer be reproduced bit for bit is noted


def test_other_versions_and_a_store_that_comes_are_noted(stopped, tmp_path):
    """What a store keeps was computed in other batches: the last bits differ."""
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")

    def other_versions(patch):
        known = train.version
        patch.setattr(train, "version", lambda name: "0.0" if name == "torch" else known(name))

    store = ("teacher.store=on", f"teacher.store_dir={tmp_path / 'store'}")
    assert run_here(config_of(folder / "place", *words, *store), tmp_path / "run", other_versions) == 0
    assert "this run can no longer be reproduced bit for bit: torch" in log_of(tmp_path / "run")
    marks = json.loads((tmp_path / "run/summary.json").read_text())["run"]["other_versions"]
    assert marks[0].startswith("torch ") and marks[0].endswith("up to step 5, then 0.0")
    assert marks[1:] == ["teacher.store off up to step 5, then on"]


# ---- damage

FILES = (
    "model.safetensors", "optimizer.pt", "random.pt", "best.safetensors", "state.json", "MANIFEST.json",
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
DAMAGES = ("flipped", "truncated", "emptied", "deleted")


@pytest.fixture(scope="module")
def interrupted(place, tmp_path_factory):
    """A run stopped with two checkpoints of every kind of file, its config, and what it must end in."""
    words = ("train.micro_batch_size=4", "train.max_steps=9", "eval.every=2", "train.keep=best")
    config = config_of(place, *words, "train.save_every=4")
    folder = tmp_path_factory.mktemp("interrupted")
    expected = straight(config, folder / "straight")
    assert run_here(config, folder / "run", at_step(8, signal_self)) == 143
    assert checkpoints_of(folder / "run") == ["step-00000008", "step-00000004"]
    assert {f.name for f in checkpoint.found(folder / "run")[0].iterdir()} == set(FILES)
    return config, folder / "run", expected


def damage(file, how, place):
    """place: where a bit is flipped, from 0, the first byte, to 1, the last."""
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[int((len(content) - 1) * place)] ^= 1
    changed = {"truncated": content[:-1], "emptied": b""}.get(how, content)
    file.unlink()
    if how != "deleted":
        file.write_bytes(changed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(interrupted, tmp_path, full, figure):
    config, made, expected = interrupted
    cases = [(name, how) for name in FILES for how in DAMAGES]
    tried = cases if full else cases[::9]
    for i, (name, how) in enumerate(tried):
        run_dir = tmp_path / f"{name}-{how}"
        shutil.copytree(made, run_dir)
        damage(run_dir / "checkpoints" / "step-00000008" / name, how, i / len(tried))
        assert run_here(config, run_dir) == 0
        assert "skipped a damaged checkpoint, step-00000008: " + name in log_of(run_dir)
        assert log_of(run_dir).rstrip().rsplit("resuming from ", 1)[1].split()[0].endswith("step-00000004")
        assert outcome(run_dir) == expected
    figure(f"damage: {len(tried)} cases, each named, none loaded, all bitwise equal")


def test_no_whole_checkpoint_is_an_error_and_no_fresh_start(interrupted, tmp_path, capfd):
    config, made, _ = interrupted
    shutil.copytree(made, tmp_path / "run")
    for folder in checkpoint.found(tmp_path / "run"):
        (folder / "MANIFEST.json").write_text("{")
    assert run_here(config, tmp_path / "run") == 3
    assert "no checkpoint is whole" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "run/checkpoints")  # none at all: the same command starts again, and says so
    assert run_here(config, tmp_path / "run") == 0
    assert "stopped at step 8 without a checkpoint: starting again at step 0" in log_of(tmp_path / "run")
