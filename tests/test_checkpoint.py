"""Checkpoints: what is kept by the disk and in which order, what is pruned, and what a full disk leaves."""

import json
import os
import random
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from kdx.state import State

from kdx.cli import compose
from kdx.errors import MachineError
from kdx.run import checkpoint
from kdx.run.files import MANIFEST, reserve, seal, write_beside
from kdx.run.tracking import Tracker
from kdx.student import save_student

FILES = {"model.safetensors", "optimizer.pt", "random.pt", "best.safetensors", "state.json", "MANIFEST.json"}


def save(run_dir: Path, step: int, width: int = 4) -> Path:
    """Save a checkpoint of a small model, with best weights."""
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    best = run_dir / "best.safetensors"
    checkpoint.save_weights(best, model)
    states = [checkpoint.random_state()]
    return checkpoint.save(
        run_dir, model, optimizer.state_dict(), schedule, {"step": step}, states, lambda beside: None, best=best
    )


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in checkpoint.found(run_dir)]


def test_a_checkpoint_is_kept_by_the_disk_before_it_has_its_name_and_older_ones_go(tmp_path, calls):
    for step in (1, 2):
        save(tmp_path, step)
    calls.clear()
    final = save(tmp_path, 3)
    named = calls.index(("replace", final))
    (beside,) = {path.parent for name, path in calls[:named] if name == "fsync" and path.name == MANIFEST}
    assert beside.name.startswith(".tmp-")
    kept = [path for name, path in calls[:named] if name == "fsync" and beside in (path, path.parent)]
    assert {path.name for path in kept[:-1]} == FILES
    assert kept[-1] == beside  # the list of its files, when all are there
    parents = [calls.index(("fsync", folder), named) for folder in (final.parent, tmp_path)]
    pruned = [i for i, (name, path) in enumerate(calls) if path.name.endswith("-step-00000001") and name == "replace"]
    removed = [i for i, (name, _) in enumerate(calls) if name in ("unlink", "rmdir")]
    assert len(pruned) == 1
    assert removed
    assert max(parents) < pruned[0] < min(removed)
    assert names(tmp_path) == ["step-00000003", "step-00000002"]


def test_a_file_is_kept_by_the_disk_before_it_has_its_name(tmp_path, calls):
    file = tmp_path / "data.json"
    write_beside(file, "{}")
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]
    assert calls[0][1].name.endswith("-data.json")
    assert [path for _, path in calls[1:]] == [file, tmp_path]


def test_best_weights_are_kept_by_the_disk_before_they_have_their_name(tmp_path, calls):
    file = tmp_path / "best.safetensors"
    checkpoint.save_weights(file, torch.nn.Linear(2, 2))
    assert [name for name, _ in calls[:2]] == ["fsync", "replace"]
    assert calls[0][1].name.endswith("-best.safetensors")


def test_best_weights_that_cannot_have_their_name_leave_nothing(tmp_path):
    file = tmp_path / "best.safetensors"
    file.mkdir()
    with pytest.raises(MachineError, match="cannot save the best weights"):
        checkpoint.save_weights(file, torch.nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_that_cannot_be_saved_prunes_none(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    with short_files(100_000), pytest.raises(MachineError):
        save(tmp_path, 3, width=200)
    assert names(tmp_path) == ["step-00000002", "step-00000001"]
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.found(tmp_path))


def test_what_is_newer_than_the_last_that_is_whole_is_not_pruned(tmp_path):
    """A run that went on from step 1, as those after it are damaged, keeps that and what it saves."""
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
    assert {file.name for file in folder.iterdir()} == FILES
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


@pytest.mark.parametrize("what", ["student", "best"])
def test_a_full_disk_is_the_machines_and_leaves_what_was_there(tmp_path, make_tokenizer, what):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=16))
    place = tmp_path / "student" if what == "student" else tmp_path / "best.safetensors"

    def write() -> None:
        if what == "student":
            save_student(model, tokenizer, place)
        else:
            checkpoint.save_weights(place, model)

    write()
    file = place / "model.safetensors" if what == "student" else place
    before, listed = file.read_bytes(), set(tmp_path.rglob("*"))
    with short_files(100_000), pytest.raises(MachineError, match="bytes free") as error:
        write()
    assert error.value.exit_code == 3
    assert error.value.lines[0].startswith(f"{place}: cannot save the {what}")
    assert set(tmp_path.rglob("*")) == listed  # nothing is begun and left lying
    assert file.read_bytes() == before


def test_every_generator_goes_on_from_where_it_was(tmp_path):
    def drawn():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    folder = save(tmp_path, 1)
    expected = drawn()
    assert drawn() != expected
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.load(folder, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    assert drawn() == expected


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", "{", "\0\0"])
def test_a_manifest_that_is_none_verifies_nothing(tmp_path, text):
    folder = save(tmp_path, 1)
    (folder / "MANIFEST.json").write_text(text)
    assert "MANIFEST.json" in checkpoint.verify(folder)


def test_any_other_byte_of_a_manifest_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    seal(tmp_path)
    file = tmp_path / "MANIFEST.json"
    content = file.read_bytes()
    others = [content[:i] + bytes([byte ^ 1]) + content[i + 1 :] for i, byte in enumerate(content)]
    for changed in (*others, content + b" ", content[:-1], content.replace(b"\n", b"")):
        file.write_bytes(changed)
        assert "MANIFEST.json" in str(checkpoint.verify(tmp_path)), changed


def test_best_weights_follow_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        checkpoint.save_weights(tmp_path / "best.safetensors", torch.nn.Linear(2, 2))
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "best.safetensors").stat().st_mode) == 0o640


def going_on(folder: Path, lines: int) -> Path:
    """The metrics of a run that goes on from a checkpoint which counts on so many bytes of them."""
    return Tracker(folder, compose([]).tracking, is_main=True, max_steps=4, first_step=2, lines=lines).file


def test_metrics_are_cut_back_to_what_the_checkpoint_counts_on(tmp_path, caplog):
    kept = b'{"step": 1}\n\xff\0 damaged since\n{"step": 2}\n'  # what stands there is not lost for one bad line
    for after in (b"", b'{"step": 2}\n{"step": 3}\n', b'{"step": 3', b"\0" * 4096):
        (tmp_path / "metrics.jsonl").write_bytes(kept + after)
        assert going_on(tmp_path, len(kept)).read_bytes() == kept
    assert caplog.messages == []


def test_metrics_that_were_changed_since_are_told_and_end_with_a_line(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"ste')
    assert going_on(tmp_path, 24).read_bytes() == b'{"step": 1}\n'
    assert caplog.messages == [f"{file} lacks lines up to step 2: it was changed since"]
    file.unlink()
    assert not going_on(tmp_path, 24).exists()
    assert caplog.messages[1:] == [f"{file} is gone, with the lines up to step 2"]


def test_room_is_held_where_files_have_a_limit_too(tmp_path):
    with short_files(100_000):
        reserve(tmp_path, 2**20).close()
    held = reserve(tmp_path, 2**20)
    assert os.fstat(held.fileno()).st_blocks * 512 >= 2**20
    assert list(tmp_path.iterdir()) == []
    held.close()


def test_metrics_that_a_full_disk_refuses_are_written_later_and_whole(tmp_path):
    tracker = Tracker(tmp_path, compose([]).tracking, is_main=True, max_steps=9)
    state = State()
    tracker.log(state, {"train/loss": None})
    before = tracker.file.read_bytes()
    with short_files(len(before) + 20):  # part of a line has room
        for state.step in (1, 2):
            tracker.log(state, {"train/loss": None})
            assert tracker.file.read_bytes() == before
        with pytest.raises(MachineError, match="File too large"):
            tracker.keep_lines()
    tracker.log(state, {"train/loss": None})
    assert [json.loads(line)["step"] for line in tracker.file.read_text().splitlines()] == [0, 1, 2, 2]
