"""What a user can get wrong: every bad input with its exit code and the line that names where, what and a hint.

Each is typed at the real command, in this process; a few as processes of their own.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import environment, in_process
from safetensors.torch import load_file, save_file
from standins import write_pairs

from kdx import loss

BASE = ["teacher=hf", "teacher.path=teacher", "student=hf", "student.path=student", "data=pairs"]
BASE += ["data.path=t.jsonl", "train.max_steps=1", "tracking.mode=disabled", "teacher.store=off"]
GOOD = {"source": "a", "target": "b"}
LINE = json.dumps(GOOD).encode() + b"\n"


@pytest.fixture
def place(beside_models: Path) -> Path:
    return beside_models


def words_of(*words: str) -> list[str]:
    keys = {word.split("=")[0] for word in words}
    return [word for word in BASE if word.split("=")[0] not in keys] + list(words)


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Type a command with these words → the lines it ends with, each without the program's name."""

    def run(*words: str, code: int = 2) -> list[str]:
        got, _, lines = in_process(capfd, *words_of(*words))
        assert got == code, lines
        lines = [line for line in lines if not line.startswith("warning: data.max_length=")]
        assert all(line.startswith("kdx: error: ") for line in lines), lines
        return [line.removeprefix("kdx: error: ") for line in lines]

    return run


# ---- words, and the line; after an exit code that is not 2
WORDS = {
    "data.path=data/trian.jsonl": "data.path: data/trian.jsonl does not exist. Did you mean data/t.jsonl?",
    "data.path=t.josnl": "data.path: t.josnl does not exist on disk, and loading it from the hub failed: *. Check the name, data.subset, data.split and the network. Did you mean t.jsonl?",
    "data.path=notes": "data.path: the folder notes has no .jsonl, .json, .csv, .parquet, .arrow file. notes has: a.txt",
    "loss.name=forwad_kl": "loss.name: no divergence is named 'forwad_kl'. Did you mean forward_kl? Choices: adaptive_kl, *",
    "loss=jsd loss.beta=7": "loss: beta is 7; it must be between 0 and 1. See the function kdx.loss.jsd",
    "optim.schedule=polynomial +optim.schedule_options.powr=2": "optim.schedule_options: polynomial: * unexpected keyword argument 'powr'. Set one with optim.schedule_options.NAME=...",
    "optim.name=torch.AdmW": "optim.name: torch has no optimizer * Did you mean AdamW? Choices: *",
    "student.attn_implementation=x": "student.path: cannot load the model in student: Specified `attn_implementation=\"x\"` is not supported. *",
    "teacher.path=teechr": "teacher.path: teechr is not a folder here, and cannot be read from the hub: * Did you mean teacher?",
    "teacher.gguf_file=x.gguf": "teacher.gguf_file: teacher/x.gguf does not exist. teacher has: config.json, *",
    "train.precision=fp16": "3 train.precision: fp16 needs a GPU. Use train.precision=bf16 or fp32",
    "train.use_liger_kernel=true": "3 train.use_liger_kernel: needs a CUDA GPU and the package liger-kernel. Leave it out, or: pip install liger-kernel",
}  # fmt: skip


def fits(line: str, pattern: str) -> bool:
    """Whether a line is as told; * stands for what is another library's, or long."""
    head, *tails = pattern.split(" *")
    return line.startswith(head) and all(tail in line for tail in tails) if tails else line == pattern


@pytest.mark.parametrize(("words", "told"), WORDS.items())
def test_words(refused, place, words, told):
    write_pairs(Path("t.jsonl"))
    Path("data").mkdir()
    shutil.copy("t.jsonl", "data/t.jsonl")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("x")
    (line,) = refused(*words.split(), "data.validation=2", code=3 if told.startswith("3 ") else 2)
    assert fits(line.removeprefix(f"{place}/"), told.removeprefix("3 ")), line


def test_a_loss_of_ones_own_in_a_wrong_shape_is_named(refused, monkeypatch):
    def shape(student, teacher):
        return (student - teacher).mean()

    write_pairs(Path("t.jsonl"))
    monkeypatch.setitem(loss._REGISTRY, "shape", shape)
    what = "shape returns shape [] for 2 positions; it must be one number each"
    assert refused("loss.name=shape") == [f"loss: {what}. See the function {__name__}.shape"]
    monkeypatch.setitem(loss._REGISTRY, "shape", lambda student, teacher: 0.0)
    assert "shape returns shape float for 2 positions" in refused("loss.name=shape")[0]


# ---- models
def no_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "student.path: cannot load the model in bad: Error no file named model.safetensors, * bad has: config.json, *"),
    "no tensor": (no_tensor, "student.path: bad is missing 1 tensors, such as transformer.ln_f.weight. They would be initialised at random: use a complete checkpoint"),
    "no numbers": (no_numbers, "student.path: * finite *"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), MODELS.values(), ids=MODELS)
def test_models(refused, place, damage, told):
    write_pairs(Path("t.jsonl"))
    shutil.copytree(place / "student", "bad")
    damage(Path("bad"))
    (line,) = refused("student.path=bad", "data.validation=2")
    assert fits(line, told), line


# ---- the machine
def test_a_disk_that_is_too_small(refused, monkeypatch):
    write_pairs(Path("t.jsonl"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1000, used=990, free=10))
    (line,) = refused("train.save_every=1", "train.max_steps=3", "data.validation=2", "hydra.run.dir=run", code=3)
    assert re.search(
        r"run: the student and its checkpoints need [\d.]+ kB, but only 10 bytes are free\. Free some space", line
    )
    assert not list(Path("run").glob("checkpoints/*"))


def test_a_package_that_is_not_installed(refused, monkeypatch):
    write_pairs(Path("t.jsonl"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    (line,) = refused("optim=adamw_8bit", "data.validation=2", code=3)
    assert line == "optim.name: bitsandbytes is not installed. Run: pip install bitsandbytes"


# ---- processes of their own
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "t.jsonl:2:12: is not JSON (Expecting value). Was the copy cut short? A .jsonl file has one object a line, a .json file one list of objects"),
        (["optim.lr=-1", "loss.alpha=${oc.env:NOWHERE}"], "loss.alpha: KeyError raised while resolving interpolation: \"Environment variable 'NOWHERE' not found\". Set it: loss.alpha=...\nkdx: error: optim.lr: is -1. It should be greater than 0"),
    ],
)  # fmt: skip
def test_processes(place, words, told):
    Path("t.jsonl").write_bytes(LINE + b'{"source": x}\n' + LINE)
    command = [sys.executable, "-m", "kdx", *words_of("data.max_length=100", *words)]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"kdx: error: {told}\n")
