"""Checkpoints: model, optimizer, schedule and random numbers of one step, whole or not there."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kdx.errors import ConfigError, MachineError, out_of_memory
from kdx.run.files import fsync, remove, usage_of, verify, whole_file, whole_folder

KEPT = 2
REFUSALS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap a full disk in their own errors


def folder_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def best_file(run_dir: Path) -> Path:
    """Return the file of the best weights so far (train.keep=best)."""
    return folder_of(run_dir) / "best.safetensors"


def found(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, newest first, verified or not."""
    return sorted((p for p in folder_of(run_dir).glob("step-*") if p.is_dir()), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    run_dir: Path,
    model: nn.Module,
    optimizer_state: dict[str, Any],
    schedule: Any,
    state: dict[str, Any],
    random_states: list[dict[str, Any]],
    describe: Callable[[Path], None],
    *,
    scaler: Any = None,
    with_best: bool = False,
) -> Path:
    """Save a checkpoint of `state["step"]` and remove all older ones but one → its folder.

    random_states: random_state() of every process, by rank. describe: writes config and tokenizer, so that the folder
    is also an ordinary model folder. Raises MachineError if the disk is full or refuses; older checkpoints then stay.
    """
    final = folder_of(run_dir) / _name(state["step"])
    try:
        with whole_folder(final, is_sealed=True) as folder:
            save_file(_untied(model), folder / "model.safetensors", metadata={"format": "pt"})
            describe(folder)
            torch.save(optimizer_state, folder / "optimizer.pt")
            if with_best and best_file(run_dir).is_file():
                shutil.copyfile(best_file(run_dir), folder / "best.safetensors")
            rest = {"schedule": schedule.state_dict(), "scaler": scaler.state_dict() if scaler else None}
            torch.save(rest | {"random": random_states}, folder / "random.pt")
            (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        fsync(run_dir)
    except REFUSALS as error:
        raise not_saved(final, "a checkpoint", error) from error
    for old in [folder for folder in found(run_dir) if folder.name <= final.name][KEPT:]:
        remove(old)
    return final


def remove_all(run_dir: Path) -> None:
    """Remove the checkpoints of a run that is done."""
    for path in [*found(run_dir), best_file(run_dir)]:
        remove(path) if path.is_dir() else path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in there, or it is a link to another disk
        folder_of(run_dir).rmdir()


def not_saved(path: Path, what: str, error: BaseException) -> MachineError:
    """Build the error for a disk that is full or refuses."""
    problem = f"cannot save {what}: {error} ({usage_of(path).free:,} bytes free)"
    hint = "Free some space, then run the same command again to resume"
    return out_of_memory(error) or MachineError(str(path), problem, hint)


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint → (its folder, what is wrong with each one skipped).

    Raises MachineError if there are checkpoints and none is whole: a run never starts again in silence.
    """
    skipped: list[str] = []
    for folder in found(run_dir):
        fault = verify(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {fault}")
    if skipped:
        what = f"no checkpoint is whole ({'; '.join(skipped)})"
        raise MachineError(str(folder_of(run_dir)), what, "Start again in another folder, or remove this one")
    return None, skipped


def load(
    folder: Path, model: nn.Module, set_optimizer_state: Callable[[Any], None], schedule: Any, *, rank: int, scaler: Any
) -> dict[str, Any]:
    """Load a verified checkpoint into model, optimizer, schedule and this process's random generators → its state."""
    load_weights([folder / "model.safetensors"], model)
    set_optimizer_state(_load_plain(folder / "optimizer.pt"))
    rest = _load_plain(folder / "random.pt")
    schedule.load_state_dict(rest["schedule"])
    if scaler:
        scaler.load_state_dict(rest["scaler"])
    _set_random_state(rest["random"][rank])
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state


def _load_plain(file: Path) -> Any:
    """Read what torch.save wrote, if it is tensors and plain values. Raises ConfigError."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises errors of many kinds for a file that is damaged or somebody else's
        what = f"is not a checkpoint of kdx ({' '.join(str(error).split()).partition('. ')[0]})"
        raise ConfigError(str(file), what, "Do not use this folder") from None


def save_weights(file: Path, model: nn.Module) -> None:
    """Save a model's weights alone. Raises MachineError."""
    try:
        with whole_file(file) as path:
            save_file(_untied(model), path)
    except REFUSALS as error:
        raise not_saved(file, "the best weights", error) from error


def restore_best(file: Path, run_dir: Path) -> None:
    """Put the best weights that a checkpoint holds back in their place."""
    with whole_file(best_file(run_dir)) as path:
        shutil.copyfile(file, path)


def load_weights(files: list[Path], model: nn.Module) -> None:
    """Load every tensor of a model, tied ones once, in the model's own dtype. Raises MachineError."""
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if differ := sorted(weights.keys() ^ _untied(model).keys()):
        what = f"has other tensors than the model, the first is {differ[0]}"
        raise MachineError(str(files[0]), what, "Start again in another folder")
    model.load_state_dict(weights, strict=False)


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return each tensor once, under its first name: safetensors refuses shared memory."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors


def random_state() -> dict[str, Any]:
    """Return this process's random generators as plain values, which load with weights_only=True."""
    version, internal, gauss = random.getstate()
    generator: Any = numpy.random.get_state(legacy=True)
    name, keys, *rest = generator
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
