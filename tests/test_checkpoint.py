"""Checkpoints: in which order the disk keeps them, what is pruned, and what a full disk leaves."""

import os
import pickle
import random
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from kdx.cli import compose
from kdx.errors import MachineError
from kdx.run import checkpoint
from kdx.run.checkpoint import MANIFEST
from kdx.run.folder import Record, RunFolder
from kdx.run.tracking import Tracker
from kdx.train import State

FILES = {"model.safetensors", "optimizer.pt", "random.pt", "best.safetensors", "state.json", "MANIFEST.json"}


def save(run_dir: Path, step: int, width: int = 4) -> Path:
    """Save a checkpoint of a small model, with best weights."""
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    (run_dir / checkpoint.FOLDER).mkdir(exist_ok=True)
    checkpoint.save_weights(checkpoint.best_file(run_dir), model)
    rest = {"random": [checkpoint.random_state()]}
    checkpoint.save(run_dir, model, {"step": step}, optimizer.state_dict(), rest, lambda folder: None)
    return checkpoint.found(run_dir)[0]


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in checkpoint.found(run_dir)]


def test_the_disk_keeps_a_checkpoint_before_it_has_its_name_and_older_ones_go(tmp_path, calls):
    for step in (1, 2):
        save(tmp_path, step)
    calls.clear()
    final = save(tmp_path, 3)
    named = next(i for i, (name, path) in enumerate(calls) if path == final and name in ("replace", "rename"))
    (beside,) = {path.parent for name, path in calls[:named] if name == "fsync" and path.name == MANIFEST}
    assert beside.name.startswith(".tmp-")
    kept = [path for name, path in calls[:named] if name == "fsync" and beside in (path, path.parent)]
    assert {path.name for path in kept[:-1]} == FILES
    assert kept[-1] == beside  # the list of its files, when all are there
    parents = [calls.index(("fsync", folder), named) for folder in (final.parent, tmp_path)]
    removed = [i for i, (name, _) in enumerate(calls) if i > named and name in ("unlink", "rmdir")]
    assert removed and max(parents) < min(removed)
    assert names(tmp_path) == ["step-00000003", "step-00000002"]


def test_what_is_newer_than_the_last_whole_one_is_not_pruned(tmp_path):
    """A run that resumed from step 2, as those after it are damaged, keeps that one and what it saves."""
    for step in (1, 2):
        save(tmp_path, step)
    for step in (8, 9):
        shutil.copytree(checkpoint.found(tmp_path)[-1], tmp_path / "checkpoints" / f"step-{step:08d}")
    save(tmp_path, 3)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (9, 8, 3, 2)]


def test_modes_follow_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(umask)
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == dict.fromkeys(FILES, 0o640)


@contextmanager
def short_files(num_bytes: int) -> Iterator[None]:
    """As on a full disk: no file may be longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_cannot_be_saved_prunes_none(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    with short_files(100_000), pytest.raises(MachineError, match=r"cannot save .*: .* free\)") as error:
        save(tmp_path, 3, width=200)
    assert error.value.exit_code == 3
    assert names(tmp_path) == ["step-00000002", "step-00000001"]
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.found(tmp_path))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_every_generator_goes_on_from_where_it_was(tmp_path):
    def drawn():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    folder = save(tmp_path, 1)
    expected = drawn()
    assert drawn() != expected
    state, optimizer, _ = checkpoint.load(folder, torch.nn.Linear(4, 4), rank=0)
    assert (state, drawn()) == ({"step": 1}, expected)
    assert optimizer.keys() == {"state", "param_groups"}


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    folder = save(tmp_path, 1)
    torch.save({"schedule": Path("x")}, folder / "random.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoint.load(folder, torch.nn.Linear(4, 4), rank=0)


def test_metrics_are_cut_back_to_what_the_checkpoint_counts_on(tmp_path):
    kept = b'{"step": 1}\n{"step": 2}\n'
    config = compose(["teacher=none", "student=hf", "student.path=x", "loss=cross_entropy"])
    state = State(step=2, lines=len(kept))
    training = SimpleNamespace(config=config, record=Record(), state=state, max_steps=4)
    for after in (b"", b'{"step": 2}\n{"step": 3}\n', b'{"step": 3'):
        (tmp_path / "metrics.jsonl").write_bytes(kept + after)
        Tracker(RunFolder(tmp_path), training)
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept
