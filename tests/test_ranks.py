"""Several processes of one run, with and without FSDP: the run of one process, and how all end when one fails.

accelerate leaves FSDP out on CPUs. A plug-in makes it believe in it here; all else is what runs on GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment
from runs import config_of, lines, make_place, run_here, status, words_of
from safetensors.torch import load_file
from standins import write_llama

from kdx.cli import compose
from kdx.errors import MachineError
from kdx.run import launch

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
WORDS = ["train.max_steps=4", "eval.every=2", "train.save_every=2", "train.keep=best", "train.precision=fp64"]
WORDS += ["train.keep_checkpoints=true", "student.save_dtype=fp32", "optim.lr=1e-3", "data.validation=7"]
ON_POLICY = ["rollout=student", "rollout.max_new_tokens=5", "rollout.batch_size=2", "tracking.samples=true"]
ON_POLICY += ["eval.num_prompts=5"]
MORE = {
    "adapted": ["adapter=lora", "adapter.r=4", "train.keep=last"],
    "share-0.5": [*ON_POLICY, "rollout.share=0.5"],
    "share-1": [*ON_POLICY, "rollout.share=1"],
}
PROGRAM = '''
import os, signal, sys
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

class OnCPU(Accelerator):
    """An accelerator that shards on CPUs as it does on GPUs."""

    def __init__(self, **words):
        super().__init__(**words)
        if words["fsdp_plugin"]:
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = words["fsdp_plugin"]

from kdx.cli import compose, guarded
from kdx.distill import distill
from kdx.run import launch
from pathlib import Path

launch.Accelerator = OnCPU
codes = []
for name, *words in eval(os.environ["RUNS"]):
    os.environ.update({"ACCELERATE_USE_FSDP": "true" if name.startswith("shards") else "false"})
    config = compose(words)
    codes.append(guarded(lambda: distill(config, Path(name)) and 0))
PartialState().destroy_process_group()
sys.exit(f"exit codes {codes}" if codes != [0, 0, 0, 0, 4, 0] else 0)
'''
PLUGIN = '''
import os
from kdx.loss import forward_kl, register

calls = 0

@register
def broken(student, teacher):
    """Forward KL that is not finite in the second process, from its third call in training on."""
    global calls
    calls += len(student) > 2
    value = forward_kl(student, teacher)
    return value / 0 if calls >= 3 and os.environ.get("RANK") == "1" else value
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("ranks"))
    write_llama(folder / "llama")
    (folder / "broken_loss.py").write_text(PLUGIN)
    (folder / "program.py").write_text(PROGRAM)
    return folder


@pytest.fixture(scope="module")
def two(own: Path) -> Path:
    """One launch of two processes: a plain run, adapters, own answers, a loss that diverges in the second, and FSDP."""
    exact = [f"student.path={own / 'llama'}", *WORDS]
    runs = [
        ["plain", *words_of(own, *exact)],
        *([name, *words_of(own, *exact, *more)] for name, more in MORE.items()),
        ["broken", *words_of(own, *exact, "loss.name=broken", "train.keep=last")],
        ["shards", *words_of(own, *exact)],
    ]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    variables = environment(KDX_PLUGINS="broken_loss", RUNS=repr(runs), **{**FSDP, "ACCELERATE_USE_FSDP": "false"})
    variables |= {name: os.environ[name] for name in ("KDX_STORE", "KDX_CACHE")}
    how = {"cwd": own, "env": variables, "capture_output": True, "text": True, "check": False, "timeout": 300}
    done = subprocess.run([sys.executable, "-m", *launcher], **how)
    (own / "told").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return own


def figures(run_dir: Path) -> list[dict[str, float]]:
    """What is logged of a run, but for times and memory."""
    return [
        {k: v for k, v in x.items() if v is not None and not k.startswith(("speed/", "memory/"))}
        for x in lines(run_dir / "metrics.jsonl")
    ]


def test_two_processes_with_and_without_fsdp_are_one_run(two: Path, tmp_path: Path) -> None:
    """Losses, gradients' norms, measures, checkpoints, moments, the student: those of one process in fp64."""
    assert run_here(config_of(two, f"student.path={two / 'llama'}", *WORDS), tmp_path / "one") == 0
    one, alone = tmp_path / "one", json.loads((tmp_path / "one/summary.json").read_text())
    for name in ("plain", "shards"):
        run_dir = two / name
        for ours, theirs in zip(figures(run_dir), figures(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
        assert any("train/grad_cosine" in line for line in figures(run_dir))
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["environment"]["processes"] == 2
        assert summary["run"]["kept_step"] == alone["run"]["kept_step"]
        assert summary["student"] == pytest.approx(alone["student"], rel=1e-6)
        rows = [sorted(row["row"] for row in lines(folder / "eval_rows.jsonl")) for folder in (run_dir, one)]
        assert rows[0] == rows[1]
        for file in ("student/model.safetensors", "checkpoints/step-00000002/model.safetensors"):
            torch.testing.assert_close(load_file(run_dir / file), load_file(one / file), rtol=1e-6, atol=1e-9)
    states = [
        torch.load(f / "checkpoints/step-00000002/optimizer.pt", weights_only=True)["state"]
        for f in (two / "plain", one)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-12)
    assert "the student sharded (FSDP), fp64" in (two / "told").read_text()


@pytest.mark.parametrize(("name", "more"), MORE.items())
def test_two_processes_train_adapters_and_on_own_answers_as_one(
    two: Path, tmp_path: Path, name: str, more: list[str]
) -> None:
    assert run_here(config_of(two, f"student.path={two / 'llama'}", *WORDS, *more), tmp_path) == 0
    for ours, theirs in zip(figures(two / name), figures(tmp_path), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    weights = [load_file(run_dir / "student/model.safetensors") for run_dir in (two / name, tmp_path)]
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-9)
    if name == "adapted":
        return
    said = lines(two / name / "rollouts.jsonl")
    assert said == lines(tmp_path / "rollouts.jsonl")
    assert len({line["row"] for line in said}) > 2
    answers = [lines(run_dir / "eval_answers.jsonl") for run_dir in (two / name, tmp_path)]
    assert len(answers[0]) == len(answers[1]) == 5
    for our_answer, their_answer in zip(*answers, strict=True):
        assert our_answer.pop("row") == their_answer.pop("row")
        assert our_answer == pytest.approx(their_answer, rel=1e-4)


def test_what_is_not_finite_in_one_process_stops_all_and_is_named(two: Path) -> None:
    now = status(two / "broken")
    assert (now["state"], now["exit_code"]) == ("diverged", 4)
    assert now["reason"].startswith(
        "step 2: the distillation term is not finite; the weights are still those of step 1"
    )
    assert now["reason"].count("pairs.jsonl:") == 2  # of the second process's two micro-batches


@pytest.mark.parametrize(
    ("variables", "words", "reason"),
    [
        ({"FSDP_VERSION": "1"}, [], "fsdp_version: 1: cannot be combined with FSDP"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "FSDP_OFFLOAD_PARAMS: "),
        ({}, ["adapter=lora"], "adapter=lora: "),
        ({}, ["rollout=student"], "rollout=student: "),
        ({}, ["optim.name=torch.Adafactor"], "optim.name=torch.Adafactor: "),
        ({}, [], "ACCELERATE_USE_FSDP: needs several GPUs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "ACCELERATE_USE_DEEPSPEED: is not supported"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: list[str], reason: str
) -> None:
    for name, value in (FSDP | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError) as refused:
        launch.build_accelerator(compose(["train.precision=fp32", *words]))
    assert reason in str(refused.value)
