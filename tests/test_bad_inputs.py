"""What a user can get wrong: every bad input with its exit code and the line that names where, what and a hint.

Each is typed at the real command, in this process; a few as processes of their own.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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


# ---- words. (words, exit code, the lines)
PATHS = {
    "data/trian.jsonl": "data.path: data/trian.jsonl does not exist. Did you mean data/t.jsonl?",
    "t.josnl": "data.path: t.josnl does not exist on disk, and loading it from the hub failed: *. Check the name, data.subset, data.split and the network. Did you mean t.jsonl?",
    "notes": "data.path: the folder notes has no .jsonl, .json, .csv, .parquet, .arrow file of the split train. notes has: a.txt",
    "pkg:no-such-package": "3 data.path: the package no-such-package is not installed. Run: pip install --no-deps no-such-package",
}  # fmt: skip
WORDS: dict[tuple[str, ...], list[str]] = {
    ("loss.name=forwad_kl",): ["loss.name: no divergence is named 'forwad_kl'. Did you mean forward_kl? Choices: adaptive_kl, *"],
    ("loss=jsd", "loss.beta=7"): ["loss: beta is 7; it must be between 0 and 1. See the function kdx.loss.jsd"],
    ("student.attn_implementation=x",): ["student.path: cannot load the model in student: Specified `attn_implementation=\"x\"` is not supported. *"],
    ("optim.schedule=polynomial", "+optim.schedule_options.powr=2"): ["optim.schedule_options: polynomial: * unexpected keyword argument 'powr'. Set one with +optim.schedule_options.NAME=..."],
    ("optim.name=torch.AdmW",): ["optim.name: torch has no optimizer AdmW that kdx can use. Did you mean AdamW? Choices: *"],
    ("data.chat_template=no/such.jinja",): ["data.chat_template: no/such.jinja is not a file. Give a file, or Jinja text with {{ }}"],
    ("data.chat_template='{% for m in messages %}{{ m.content'",): ["data.chat_template: is not Jinja: * (line 1). Fix it, or give another"],
    ("data.path=[t.jsonl,empty.jsonl]",): ["empty.jsonl: has no rows. Was the copy cut short? Copy it again, or leave it out"],
    ("train.precision=fp16",): ["3 train.precision: fp16 needs a GPU. Use train.precision=bf16 or fp32"],
    ("train.use_liger_kernel=true",): ["3 train.use_liger_kernel: needs a CUDA GPU and the package liger-kernel. Leave it out, or: pip install liger-kernel"],
}  # fmt: skip


def fits(line: str, pattern: str) -> bool:
    """Whether a line is as told; * stands for what is another library's, or long, and (*) for the folder one is in."""
    pattern = pattern.replace("(*)", f"({Path.cwd()})")
    head, *tails = pattern.split(" *")
    return line.startswith(head) and all(tail in line for tail in tails) if tails else line == pattern


@pytest.mark.parametrize(
    ("words", "told"),
    [*WORDS.items(), *((("data.path=" + path,), [told]) for path, told in PATHS.items())],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_words(refused, place, words, told):
    write_pairs(Path("t.jsonl"))
    Path("data").mkdir()
    shutil.copy("t.jsonl", "data/t.jsonl")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("x")
    Path("empty.jsonl").write_text("\n")
    code = 3 if told[0].startswith("3 ") else 2
    lines = refused(*words, "data.validation=2", code=code)
    assert len(lines) == len(told), lines
    for line, wanted in zip(lines, told, strict=True):
        assert fits(line.removeprefix(f"{place}/"), wanted.removeprefix("3 ")), line


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


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def other_tokenizer(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    by_id = sorted(vocab, key=vocab.get)
    first, second = by_id[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "vocab.json").write_text(json.dumps(vocab))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Path("t.jsonl")}, folder / "pytorch_model.bin")


def no_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "student.path: cannot load the model in bad: Error no file named model.safetensors, * bad has: config.json, *"),
    "no tensor": (no_tensor, "student.path: bad lacks 1 tensors, the first transformer.ln_f.weight. They would be random: use a complete checkpoint"),
    "adapter": (adapter, "student.path: bad is an adapter that names no base. Add base_model_name_or_path to its config"),
    "other tokenizer": (other_tokenizer, "tokenizer: teacher and student differ at 2 of * ids, the first is 300: *. Choose a teacher and a student with the same tokenizer"),
    "damaged": (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), "student.path: cannot load the model in bad: *. Copy the weights again; from git: git lfs pull"),
    "a pickle": (pickled, "student.path: cannot load the model in bad: Weights only load failed. *"),
    "no numbers": (no_numbers, "student.path: the logits of GPT2LMHeadModel are not finite. Check its weights for NaN and inf"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), MODELS.values(), ids=MODELS)
def test_models(refused, place, damage, told):
    write_pairs(Path("t.jsonl"))
    shutil.copytree(place / "student", "bad")
    damage(Path("bad"))
    (line,) = refused("student.path=bad", "data.validation=2")
    assert fits(line, told), line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("teacher.path=teechr", "teacher.path: teechr is not a folder here, and cannot be read from the hub: * Did you mean teacher?"),
        ("teacher.path=some-org/nothing", "teacher.path: some-org/nothing is not a folder here, and cannot be read from the hub: *Log in for gated models (hf auth login). *"),
        ("teacher.tokenizer=pkg:nothing", "3 teacher.tokenizer: the package nothing is not installed. Run: pip install --no-deps nothing"),
        ("teacher.gguf_file=x.gguf", "teacher.gguf_file: teacher/x.gguf does not exist. teacher has: config.json, *"),
    ],
)  # fmt: skip
def test_model_paths(refused, words, told):
    write_pairs(Path("t.jsonl"))
    (line,) = refused(words, code=3 if told.startswith("3 ") else 2)
    assert fits(line, told.removeprefix("3 ")), line


# ---- the machine
Usage = namedtuple("Usage", "total used free")
MACHINE = {
    ("train.save_every=1", "train.max_steps=3"): r"run: the student and its checkpoints need [\d.]+ kB, and 10 bytes are free. Free some space, or choose another disk with hydra.run.dir=...; train.save_every=0 writes fewer checkpoints",
    ("train.save_every=0",): r"run: the student and its checkpoints need [\d.]+ kB, and 10 bytes are free. Free some space, or choose another disk with hydra.run.dir=...",
    ("teacher.store=on", "teacher.store_dir=store"): r"teacher.store: needs [\d,]+ bytes in \S*store, 10 are free and a tenth of the disk is left to others. Free space, set teacher.store_dir=..., or use teacher.store=off",
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), MACHINE.items(), ids=lambda value: value[0] if len(value) < 3 else "")
def test_disks_that_are_too_small(refused, monkeypatch, words, told):
    write_pairs(Path("t.jsonl"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 990, 10))
    (line,) = refused(*words, "data.validation=2", "hydra.run.dir=run", code=3)
    assert re.fullmatch(told, line.removeprefix(f"{Path().resolve()}/")), line
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("words", "package", "told"),
    [
        (("optim=adamw_8bit",), "bitsandbytes.optim", "optim.name: bitsandbytes is not installed. Run: pip install bitsandbytes"),
        (("teacher.quantization=8bit",), "bitsandbytes", "teacher.path: cannot load the model in teacher: * Install the package"),
    ],
)  # fmt: skip
def test_packages_that_are_not_installed(refused, monkeypatch, words, package, told):
    write_pairs(Path("t.jsonl"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    monkeypatch.setitem(sys.modules, package, None)
    (line,) = refused(*words, "data.validation=2", code=3)
    assert fits(line, told), line


# ---- processes of their own
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), 2, "t.jsonl:2:12: is not JSON (Expecting value). Was the copy cut short? A .jsonl file has one object a line, a .json file one list of objects"),
        (("teacher.path=nowhere",), 2, "teacher.path: nowhere is not a folder here, and cannot be read from the hub: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files. Log in for gated models (hf auth login). This folder (*) has: outputs/, student/, t.jsonl, teacher/"),
        (("optim.lr=-1", "loss.alpha=${oc.env:KDX_NOWHERE}"), 2, "loss.alpha: Environment variable 'KDX_NOWHERE' not found. Set what it names, or give a value\nkdx: error: optim.lr: is -1. It should be greater than 0. Peak learning rate"),
    ],
)  # fmt: skip
def test_processes(place, words, code, told):
    Path("t.jsonl").write_bytes(LINE + b'{"source": x}\n' + LINE)
    command = [sys.executable, "-m", "kdx", *words_of("data.max_length=100", *words)]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, check=False)
    told = told.replace("(*)", f"({place})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"kdx: error: {told}\n")
