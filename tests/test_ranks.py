"""Several processes of one run: what is refused, and how all end when one fails."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import environment
from standins import FUSSY, write_place

from kdx.cli import compose
from kdx.errors import MachineError
from kdx.run import launch

PLUGIN = '''
import os, signal
from pathlib import Path
from kdx.errors import MachineError
from kdx.loss import forward_kl, register

calls = 0

@register
def failing(student, teacher):
    """Forward KL that fails in one process of the run, at its third call in training."""
    global calls
    calls += len(student) > 2
    if calls == 3 and os.environ.get("RANK") == os.environ["WHO"]:
        Path("failed").touch()
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["HOW"] == "machine":
            raise MachineError("memory", "is full", "Buy more")
        raise RuntimeError("out of luck")
    return forward_kl(student, teacher)
'''


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_place(folder)
    (folder / "failing.py").write_text(PLUGIN)
    (folder / "fussy_loss.py").write_text(FUSSY)
    return folder


def kdx(place: Path, *words: str, launcher: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
    base = ["teacher=hf", "teacher.path=medium", "student=hf", "student.path=small", "data=pairs"]
    base += ["data.path=pairs.jsonl", "train.batch_size=4", "train.max_steps=500", "tracking.mode=disabled"]
    command = [sys.executable, "-m", *launcher, "kdx", *base, *words]
    told = environment(**{"KDX_PLUGINS": "failing"} | more)
    return subprocess.run(command, cwd=place, env=told, capture_output=True, text=True, check=False, timeout=540)


@pytest.mark.parametrize(
    ("who", "how", "code", "reason"),
    [
        ("0", "bug", 1, "RuntimeError: out of luck"),
        ("1", "machine", 3, "memory: is full. Buy more"),
        ("1", "killed", 3, "another process of this run was killed"),
    ],
)
def test_one_that_fails_ends_all(place: Path, who: str, how: str, code: int, reason: str) -> None:
    """The launcher ends with 1; status.json and each process's last line have kdx's code, and its reason."""
    run_dir = place / f"run-{who}-{how}"
    (place / "failed").unlink(missing_ok=True)
    words = ("loss.name=failing", f"hydra.run.dir={run_dir}")
    told = kdx(place, *words, launcher=TORCHRUN, WHO=who, HOW=how)
    waited = time.time() - (place / "failed").stat().st_mtime
    assert told.returncode == 1
    assert waited < 30, "as long as torchrun waits before it kills"
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["reason"], status["exit_code"]) == ("failed", reason, code)
    own = [line for line in told.stderr.splitlines() if line.startswith("kdx: ")]
    assert f"kdx: error: another process of this run: failed: {reason}. What it printed itself may say more" in own
    assert own.count(f"kdx: exit code {code}, whatever the launcher's own is") == (1 if how == "killed" else 2)
    assert own[-1].startswith("kdx: exit code")
    assert "this is a bug in kdx" not in told.stderr


def test_a_job_that_fails_ends_a_sweep_and_the_next_begins_with_what_was_not_tried(place: Path) -> None:
    """The other process would wait for it in a job that it does not begin."""
    words = ("-m", "sweep.name=s", "sweep.baseline=false", "loss.name=fussy", "+loss.most=0,2", "train.max_steps=2")
    for expected in (["most-0"], ["most-2", "most-0"]):
        told = kdx(place, *words, launcher=TORCHRUN, KDX_PLUGINS="fussy_loss")
        assert told.returncode == 1
        assert told.stderr.count("RuntimeError: most is too small") == 2, told.stderr
        begun = [line for line in told.stdout.splitlines() if line.startswith("kdx: job ")]
        assert [Path(line).name.split("_")[0] for line in begun] == expected
        files = place.glob("outputs/sweeps/s/*/status.json")
        states = {file.parent.name.split("_")[0]: json.loads(file.read_text())["state"] for file in files}
        assert states == {name: "failed" if name == "most-0" else "done" for name in expected}


def test_processes_that_cannot_find_one_another_are_refused(place: Path) -> None:
    told = kdx(place, WORLD_SIZE="2")
    assert told.returncode == 3
    assert told.stderr.startswith("kdx: error: WORLD_SIZE: is 2, and accelerate refuses: ")
    assert told.stderr.splitlines()[-1] == "kdx: exit code 3, whatever the launcher's own is"


def test_more_processes_than_accelerate_sees_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(MachineError, match="2 processes were started, but accelerate sees 1"):
        launch.build_accelerator(compose(["train.precision=fp32"]))


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_is_asked_of_accelerate_and_not_done_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(MachineError, match=f"ACCELERATE_USE_{name}: is asked for, and kdx is not written for it"):
        launch.build_accelerator(compose(["train.precision=fp32"]))
