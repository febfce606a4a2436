"""Damaged checkpoints and a full disk: named, passed over, and nothing lost that was whole."""

import errno
import json
import os
import resource
import shutil
import signal
from functools import partial

import pytest
from runs import config_of, fill_disk_at, litter, outcome, start, straight

from kdx.run import checkpoint

FILES = (
    "model.safetensors", "optimizer.pt", "random.pt", "best.safetensors", "state.json", "MANIFEST.json",
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
DAMAGES = ("flipped", "truncated", "emptied", "deleted", "lengthened")


@pytest.fixture(scope="module")
def interrupted(place, tmp_path_factory):
    """A run stopped with two checkpoints of every kind of file, its config, and what it must end in."""
    words = ("train.micro_batch_size=4", "train.max_steps=14", "train.eval_every=2", "train.keep=best")
    config = config_of(place, *words)
    folder = tmp_path_factory.mktemp("interrupted")
    expected, _ = straight(config, folder / "straight")
    assert start(config, folder / "run", partial(kill_at, 12)).code == -signal.SIGKILL
    assert [c.name for c in checkpoint.found(folder / "run")] == ["step-00000010", "step-00000005"]
    assert {f.name for f in checkpoint.found(folder / "run")[0].iterdir()} == set(FILES)
    return config, folder / "run", expected


def kill_at(step):
    from runs import signal_at

    signal_at(step, signal.SIGKILL)()


def damage(file, how, place):
    """place: where a bit is flipped, from 0, the first byte, to 1, the last."""
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[int((len(content) - 1) * place)] ^= 1
    changed = {"truncated": content[:-1], "emptied": b"", "lengthened": content + b" "}.get(how, content)
    file.unlink()
    if how != "deleted":
        file.write_bytes(changed)


def test_any_damage_is_named_and_the_checkpoint_before_is_used(interrupted, tmp_path, full, figure):
    config, made, expected = interrupted
    cases = [(name, how) for name in FILES for how in DAMAGES]
    tried = cases if full else cases[::11]
    named = silent = equal = 0
    for i, (name, how) in enumerate(tried):
        run_dir = tmp_path / f"{name}-{how}"
        shutil.copytree(made, run_dir)
        damage(run_dir / "checkpoints" / "step-00000010" / name, how, i / len(tried))
        run = start(config, run_dir)
        assert run.code == 0, run.text
        told = " ".join((run_dir / "kdx.log").read_text().split())
        named += "skipped a damaged checkpoint, step-00000010: " + name in told
        silent += "step-00000005" not in told.rsplit("going on from", 1)[-1]
        equal += outcome(run_dir) == expected
    figure(f"damage: {len(tried)} cases: {named} named, {silent} silent loads, {equal} bitwise equal")
    assert (named, silent, equal) == (len(tried), 0, len(tried))


def limit_files(num_bytes):
    """Where no disk can be mounted: no file of the process may be longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_a_full_disk(place, tmp_path, small_disk, figure):
    config = config_of(place, "train.micro_batch_size=4", "train.max_steps=12")
    expected, _ = straight(config, tmp_path / "straight")
    disk = small_disk if small_disk.is_mount() else None
    run_dir = (disk or tmp_path) / "run"
    log = tmp_path / "first.log"
    stopped = start(config, run_dir, partial(kill_at, 7), log=log)
    assert stopped.code == -signal.SIGKILL
    whole = run_dir / "checkpoints" / "step-00000005"
    size = sum(f.stat().st_size for f in whole.iterdir())
    # Room for half a checkpoint is left, when the run has seen that there is enough.
    fault = partial(fill_disk_at, 7, disk, size // 2) if disk else partial(limit_files, size // 3)
    run = start(config, run_dir, fault, log=log)
    assert run.code == 3, run.text
    errors = [line for line in run.text.splitlines() if line.startswith("kdx: error: ")]
    assert str(run_dir / "checkpoints" / "step-00000010") in errors[-1]
    assert "bytes free" in errors[-1]
    assert "Traceback" not in run.text
    assert checkpoint.verify(whole) is None
    assert not litter(run_dir)
    if disk:
        (disk / "ballast").unlink()
    again = start(config, run_dir, log=log)
    assert again.code == 0, again.text
    assert outcome(run_dir) == expected
    figure(
        f"full disk ({'tmpfs' if disk else os.strerror(errno.EFBIG)}): exit 3, the checkpoint before is whole, equal"
    )


def test_a_disk_that_fills_between_checkpoints(place, tmp_path, small_disk):
    if not small_disk.is_mount():
        pytest.skip("no disk can be mounted")
    run_dir, config = small_disk / "run", config_of(place, "train.save_every=50", "train.max_steps=60")
    # The last page of metrics.jsonl has room for some lines more.
    run = start(config, run_dir, partial(fill_disk_at, 3, small_disk, 0), log=tmp_path / "log")
    assert run.code == 3, run.text
    assert f"kdx: error: {run_dir}/metrics.jsonl: No space left on device (0 bytes free). Free room" in run.text
    assert "metrics.jsonl cannot be written (No space left on device): its lines wait in memory" in run.text
    assert "Traceback" not in run.text
    assert "Logging error" not in run.text
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "No space left on device" in status["reason"]


def test_a_disk_that_fills_where_nothing_is_saved_on_the_way(place, tmp_path, small_disk, figure):
    if not small_disk.is_mount():
        pytest.skip("no disk can be mounted")
    config = config_of(place, "train.save_every=0", "train.max_steps=60", "train.micro_batch_size=4")
    expected, _ = straight(config, tmp_path / "straight")
    run = start(config, small_disk / "run", partial(fill_disk_at, 3, small_disk, 0), log=tmp_path / "log")
    assert run.code == 0, run.text
    assert run.text.count("its lines wait in memory") == 1
    assert outcome(small_disk / "run") == expected
    assert not litter(small_disk / "run")
    figure("full disk where nothing is saved on the way: the student has its room, every line of metrics is there")
