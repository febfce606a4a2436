"""Checkpoints: model, optimizer, schedule and random numbers of one step, whole or not there."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdx.adapter import is_adapted, trained
from kdx.errors import MachineError
from kdx.run.files import digest_of, fsync, read_json, remove, saving, whole_file, whole_folder

Saved = dict[str, Any]  # plain values and tensors, as they are kept
FOLDER = "checkpoints"
KEPT = 2
MANIFEST = "MANIFEST.json"  # size and xxhash of every other file


def best_file(run_dir: Path) -> Path:
    """Return the file of the best weights so far (train.keep=best)."""
    return run_dir / FOLDER / "best.safetensors"


def found(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, newest first, verified or not."""
    return sorted((run_dir / FOLDER).glob("step-*"), reverse=True)


def save(
    run_dir: Path, model: nn.Module, state: Saved, optimizer: Saved, rest: Saved, describe: Callable[[Path], None]
) -> None:
    """Save a checkpoint of `state["step"]` and remove all older ones but one.

    rest: `random`, the random_state() of every process by rank, and what else torch saves. describe: writes config and
    tokenizer, so that the folder is also a model folder. Raises MachineError if the disk is full or refuses; older
    checkpoints then stay.
    """
    final, best = run_dir / FOLDER / f"step-{state['step']:08d}", best_file(run_dir)
    with saving("a checkpoint", final), whole_folder(final) as folder:
        save_file(_untied(model), folder / "model.safetensors", metadata={"format": "pt"})
        describe(folder)
        torch.save(optimizer, folder / "optimizer.pt")
        torch.save(rest, folder / "random.pt")
        if best.is_file():
            shutil.copyfile(best, folder / best.name)
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        (folder / MANIFEST).write_text(json.dumps(_manifest(folder), indent=2), encoding="utf-8")
    fsync(run_dir)
    for old in [folder for folder in found(run_dir) if folder.name <= final.name][KEPT:]:
        remove(old)


def _manifest(folder: Path) -> dict[str, Saved]:
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name != MANIFEST]
    return {file.name: {"size": file.stat().st_size, "xxh3": digest_of(file)} for file in files}


def verify(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest → what is wrong, or None."""
    expected, present = read_json(folder / MANIFEST), _manifest(folder)
    wrong = [name for name in expected if present.get(name) != expected[name]]
    return f"{wrong[0] if wrong else MANIFEST} is missing or damaged" if wrong or not expected else None


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint → (its folder, what is wrong with each one skipped).

    Raises MachineError if there are checkpoints and none is whole: a run never starts again in silence.
    """
    skipped: list[str] = []
    for folder in found(run_dir):
        if not (fault := verify(folder)):
            return folder, skipped
        skipped.append(f"{folder.name}: {fault}")
    if skipped:
        what = f"no checkpoint is whole ({'; '.join(skipped)})"
        raise MachineError(str(run_dir / FOLDER), what, "Start again in another folder, or remove this one")
    return None, skipped


def load(folder: Path, model: nn.Module, rank: int) -> tuple[Saved, Saved, Saved]:
    """Load a verified checkpoint's weights and this process's random numbers → state, optimizer and rest, as saved."""
    load_weights(folder / "model.safetensors", model)
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    rest = torch.load(folder / "random.pt", weights_only=True, map_location="cpu")
    _set_random_state(rest["random"][rank])
    best = folder / "best.safetensors"
    if best.is_file() and rank == 0:
        with whole_file(folder.parent / best.name) as path:
            shutil.copyfile(best, path)
    return read_json(folder / "state.json"), optimizer, rest


def save_weights(file: Path, model: nn.Module) -> None:
    """Save a model's weights alone. Raises MachineError."""
    with saving("the best weights", file), whole_file(file) as path:
        save_file(_untied(model), path)


def load_weights(file: Path, model: nn.Module) -> None:
    """Load every tensor of a model, tied ones once, in the model's own dtype. Raises MachineError."""
    weights = load_file(file)
    if differ := sorted(weights.keys() ^ _untied(model).keys()):
        what = f"has other tensors than the model, the first is {differ[0]}"
        raise MachineError(str(file), what, "Start again in another folder")
    model.load_state_dict(weights, strict=False)


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return each tensor once, under its first name: safetensors refuses shared memory. Of adapters, they alone."""
    tensors = trained(model) if is_adapted(model) else model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensors[name].detach().contiguous() for name in first_names.values()}


def random_state() -> Saved:
    """Return this process's random generators as plain values, which load with weights_only=True."""
    generator: Any = numpy.random.get_state(legacy=True)
    name, keys, *rest = generator
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of this process's device
    }


def _set_random_state(state: Saved) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
