"""What a run is made of: room on the disk, and how a batch is shared out."""

from types import SimpleNamespace

import pytest

from kdx import prepare
from kdx.cli import compose
from kdx.errors import ConfigError, MachineError


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


def test_a_batch_is_shared_out_evenly():
    config = compose(["train.batch_size=6", "train.micro_batch_size=auto"])
    assert prepare.micro_batch_size(config, 3) == 2
    with pytest.raises(ConfigError, match="is 6, not a multiple of 4 processes"):
        prepare.micro_batch_size(config, 4)
    config = compose(["train.batch_size=6", "train.micro_batch_size=2"])
    with pytest.raises(ConfigError, match="2 processes × train"):
        prepare.micro_batch_size(config, 2)
