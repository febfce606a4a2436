"""FSDP by accelerate's own code, on two gloo processes: the run of one process, and what is refused.

accelerate leaves FSDP out on CPUs. A plug-in has it believe in it here; all else is what runs on GPUs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ended, environment, started
from safetensors.torch import load_file
from standins import write_dialogpt, write_place
from test_fsdp import student
from torch.distributed.fsdp import fully_shard

from kdx.cli import compose
from kdx.errors import MachineError
from kdx.objective import Objective, StudentObjective
from kdx.run import launch
from kdx.run import sharding as shards

PLUGIN = '''
import os
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from kdx.run import launch
from kdx.loss import forward_kl, register

class OnCPU(Accelerator):
    """An accelerator that makes shards on CPUs as it does on GPUs."""

    def __init__(self, **words):
        super().__init__(**words)
        if words["fsdp_plugin"]:
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = words["fsdp_plugin"]

launch.Accelerator = OnCPU
calls = 0

@register
def broken(student, teacher):
    """Forward KL that is not finite in one process from its fifth call in training on."""
    global calls
    calls += len(student) > 2
    value = forward_kl(student, teacher)
    return value / 0 if calls >= 5 and os.environ.get("RANK") == "1" else value
'''
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
WORDS = ["train.max_steps=6", "train.log_every=1", "train.eval_every=2", "train.save_every=2", "train.keep=best"]
WORDS += ["train.keep_checkpoints=true", "train.batch_size=4", "train.micro_batch_size=1", "tracking.mode=disabled"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_place(folder)
    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    write_dialogpt(folder / "exact", 2, 16, pickled=False, seed=1, **none)
    (folder / "on_cpu.py").write_text(PLUGIN)
    return folder


def kdx(place: Path, name: str, *words: str, processes: int = 2, **more: str) -> tuple[int, str]:
    """Run `python -m kdx` under torchrun → its exit code, and what it printed."""
    base = ["teacher=hf", "teacher.path=medium", "student=hf", "data=pairs", "data.path=pairs.jsonl", *WORDS]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [sys.executable, "-m", *launcher, "kdx", *base, f"hydra.run.dir={name}", *words]
    told = environment(KDX_PLUGINS="on_cpu", **more)
    run = subprocess.run(command, cwd=place, env=told, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


def figures(run_dir: Path) -> list[dict[str, float]]:
    """What is logged of a run, but for times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


@pytest.mark.parametrize("more", [(), ("train.gradient_checkpointing=true", "optim.lr=0.1")], ids=["plain", "best"])
def test_a_run_in_shards_is_a_run_of_one_process(place: Path, more: tuple[str, ...]) -> None:
    """Losses, measures, checkpoints, the step that is kept, the student and its answers."""
    words = ("student.path=exact", "train.precision=fp64", "student.save_dtype=fp32", *more)
    one, two = (place / f"{name}-{len(more)}" for name in ("one", "two"))
    for folder, processes, env in ((one, 1, {}), (two, 2, FSDP)):
        code, told = kdx(place, folder.name, *words, processes=processes, **env)
        assert code == 0, told
        assert ("2 processes, the student in shards (FSDP), fp64" in told) == bool(env)
    for ours, theirs in zip(figures(two), figures(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    kept = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert kept[0]["run"]["kept_step"] == kept[1]["run"]["kept_step"]
    assert (kept[0]["run"]["kept_step"] < 6) == bool(more)
    assert (one / "samples.json").read_text() == (two / "samples.json").read_text()
    for file in ("student/model.safetensors", "checkpoints/step-00000004/model.safetensors"):
        torch.testing.assert_close(load_file(two / file), load_file(one / file), rtol=1e-6, atol=1e-10)
    states = [torch.load(f / "checkpoints/step-00000004/optimizer.pt", weights_only=True) for f in (one, two)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-12)


def test_a_run_in_shards_goes_on_where_it_stopped(place: Path) -> None:
    """Bitwise, with dropout; not without shards, whose sums are others."""
    words = ("student.path=small", "train.precision=bf16")
    assert kdx(place, "straight", *words, **FSDP)[0] == 0
    cut = place / "cut"
    shutil.copytree(place / "straight", cut)
    shutil.rmtree(cut / "student")
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    for name in ("status.json", "summary.json"):
        (cut / name).unlink()
    code, told = kdx(place, "cut", *words)
    assert code == 1
    assert "was begun with another shards" in told
    code, told = kdx(place, "cut", *words, **FSDP)
    assert code == 0, told
    assert re.search(r"going on from \S+step-00000004", told)
    assert "bf16 autocast over fp32 weights" in told
    assert figures(cut) == figures(place / "straight")
    weights = (load_file(f / "student" / "model.safetensors") for f in (cut, place / "straight"))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_what_is_not_finite_in_one_process_is_named(place: Path) -> None:
    code, told = kdx(place, "nan", "student.path=exact", "train.precision=fp32", "loss.name=broken", **FSDP)
    assert code == 1
    assert "kdx: exit code 4" in told
    status = json.loads((place / "nan" / "status.json").read_text())
    assert status["state"] == "diverged"
    what = r"the distillation term is not finite; the weights are still those of step \d \(rows: \w+ at \S+:\d+, \w+ at \S+:\d+\)\."
    assert re.search(what, status["reason"]), "the two rows of the second process, whose weights are finite"


@pytest.mark.parametrize(
    ("env", "words", "reasons"),
    [
        ({"FSDP_VERSION": "1"}, [], ["FSDP_VERSION: is 1"]),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], ["FSDP_OFFLOAD_PARAMS: "]),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["optim=adamw_8bit"], ["draws dropout anew", "bitsandbytes.Adam"]),
        ({"FSDP_IGNORED_MODULES": "model"}, ["train.compile=true"], ["FSDP_IGNORED_MODULES: ", "train.compile: "]),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            ["train.precision=fp16"],
            ["use no dynamo backend", "fp16 does not"],
        ),
        ({}, ["optim.name=torch.Adafactor"], ["optim.name: torch.Adafactor is not known to go with FSDP"]),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], words: list[str], reasons: list[str]
) -> None:
    for name, value in (FSDP | env).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # which is not obeyed
    with pytest.raises(MachineError) as refused:
        launch.build_accelerator(compose(["train.precision=fp32", *words]))
    assert len(refused.value.lines) == len(reasons)
    for line, reason in zip(refused.value.lines, reasons, strict=True):
        assert reason in line


def test_shards_that_accelerate_does_not_make_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, or CPUs; and an accelerator that says it makes them and does not."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="ACCELERATE_USE_FSDP: is asked for, and accelerate does not do it on 1 × "):
        launch.build_accelerator(compose(["train.precision=fp32"]))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False", "else other processes would have empty models"
    idle = SimpleNamespace(prepare=lambda *given: given)
    objective = StudentObjective(student(True), 61, Objective())
    with pytest.raises(MachineError, match="ACCELERATE_USE_FSDP: is asked for, and weights are not in shards"):
        shards.prepare(idle, objective, torch.optim.AdamW(objective.parameters()))  # type: ignore[arg-type]


def head_alone(place: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
    objective = StudentObjective(student(False), 61, Objective())
    fully_shard(objective.model.lm_head)
    fully_shard(objective)
    with pytest.raises(MachineError, match="its head would be in shards of its own"):
        shards.check(objective)
    torch.distributed.destroy_process_group()


def test_a_head_in_shards_of_its_own_is_refused(tmp_path: Path) -> None:
    assert ended(started(head_alone, tmp_path), 120) == 0
