"""What a run is made of: room on the disk, and how a batch is shared out."""

import json
from types import SimpleNamespace

import pytest
import torch
from standins import write_dialogpt

from kdx import prepare, store
from kdx.causal_lm import Head
from kdx.cli import compose
from kdx.data.batches import Row
from kdx.errors import ConfigError, MachineError
from kdx.store import ROW_OVERHEAD, Identity, StoredHead, TeacherStore, open_store


@pytest.mark.parametrize(
    ("num_there", "max_steps", "needed"), [(0, 100, 310), (2, 100, 110), (3, 100, 10), (0, 6, 210), (0, 2, 110)]
)
def test_room_is_for_the_student_and_the_checkpoints_that_are_to_come(
    tmp_path, monkeypatch, num_there, max_steps, needed
):
    for step in range(num_there):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    monkeypatch.setattr(prepare, "bytes_on_disk", lambda run: (10, 0, 100))
    run = SimpleNamespace(max_steps=max_steps, config=SimpleNamespace(train=SimpleNamespace(save_every=5)))
    monkeypatch.setattr(prepare, "room", lambda _: (0, needed))
    prepare.check_room(run, tmp_path)
    monkeypatch.setattr(prepare, "room", lambda _: (0, needed - 1))
    with pytest.raises(MachineError, match=f"need {needed} bytes"):
        prepare.check_room(run, tmp_path)


@pytest.mark.parametrize("has_head", [False, True])
def test_the_store_needs_room_for_its_rows_and_the_head_that_is_to_come(tmp_path, monkeypatch, has_head):
    """GPT-2 of width 16: rows of counted tokens × 16 numbers, and a head of vocabulary × 16."""
    write_dialogpt(tmp_path / "teacher", 1, 16, pickled=False)
    teacher = compose(["teacher=hf", f"teacher.path={tmp_path / 'teacher'}", "teacher.store=on"]).teacher
    teacher.store_dir = str(tmp_path / "store")
    identity = Identity("w", "t", "fp32", "none")
    vocabulary = json.loads((tmp_path / "teacher/config.json").read_text())["vocab_size"]
    head = vocabulary * 16 * 4
    if has_head:
        TeacherStore(tmp_path / "store", identity, name="", owner="a").save_head(
            StoredHead(Head(torch.zeros(vocabulary, 16)), 1, 1)
        )
    rows = [Row("a", [1, 2, 3], [False, True, True]), Row("b", [1, 2], [False, True])]
    needed = 3 * 16 * 4 + 2 * ROW_OVERHEAD + (0 if has_head else head)
    for room, is_enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(store, "room", lambda _, room=room: (room, room))
        if is_enough:
            assert open_store(teacher, identity, rows, is_repeated=True, owner="a")[0] is not None
        else:
            with pytest.raises(MachineError, match=f"teacher.store: needs {needed:,} bytes"):
                open_store(teacher, identity, rows, is_repeated=True, owner="a")


def test_a_batch_is_shared_out_evenly():
    config = compose(["train.batch_size=6", "train.micro_batch_size=auto"])
    assert prepare.micro_batch_size(config, 3) == 2
    with pytest.raises(ConfigError, match="is 6, not a multiple of 4 processes"):
        prepare.micro_batch_size(config, 4)
    config = compose(["train.batch_size=6", "train.micro_batch_size=2"])
    with pytest.raises(ConfigError, match="2 processes × train"):
        prepare.micro_batch_size(config, 2)


def test_what_a_student_does_not_use_is_told(beside_models, caplog):
    """It is no fault: in a sweep over the kinds of students, all are given the same words."""
    words = [
        "teacher=hf",
        "teacher.path=teacher",
        "student.path=student",
        "student.layers=1",
        "data=pairs",
        "data.path=x",
    ]
    for student, told in {
        "hf": "student.layers=1 is not used: the student is not cut",
        "cut": "student.path=student is not used: the student is cut from the teacher",
    }.items():
        caplog.clear()
        prepare.load_tokenizers(compose([*words, f"student={student}"]))
        assert [text for text in caplog.messages if "not used" in text] == [told]
