"""Stop and resume: model, optimizer, schedule, random numbers and the place in the data, written beside and renamed."""

import json
import os
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
from kdx.run import sharding as shards
from kdx.run.files import fsync, open_to_umask, temporary, usage_of, verify, whole_file, whole_folder

KEPT = 2
REFUSALS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap a full disk in their own


def folder_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def found(run_dir: Path) -> list[Path]:
    """Return a run's checkpoints, newest first, verified or not."""
    return sorted((p for p in folder_of(run_dir).glob("step-*") if p.is_dir()), reverse=True)


def is_at(run_dir: Path, step: int) -> bool:
    """Whether a run has a checkpoint of this step."""
    return (folder_of(run_dir) / name_of(step)).is_dir()


def name_of(step: int) -> str:
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
    best: Path | None = None,
) -> Path:
    """Save a checkpoint at an optimizer step → its folder. Older ones but two are removed once it is whole.

    random_states: random_state() of every process, by rank. describe: writes config and tokenizer beside the weights,
    so that the folder is also a model's. scaler: fp16's, if there is one.
    Raises MachineError if the disk is full or refuses; earlier checkpoints are then untouched.
    """
    name = name_of(state["step"])
    final = folder_of(run_dir) / name
    try:
        with whole_folder(final, is_sealed=True) as beside:
            # With the metadata that transformers wants.
            save_file(_untied(model), beside / "model.safetensors", metadata={"format": "pt"})
            describe(beside)
            torch.save(optimizer_state, beside / "optimizer.pt")
            if best is not None and best.is_file():
                shutil.copyfile(best, beside / "best.safetensors")
            rest = {"schedule": schedule.state_dict(), "scaler": scaler.state_dict() if scaler else None}
            torch.save(rest | {"random": random_states}, beside / "random.pt")
            (beside / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        fsync(run_dir)
    except REFUSALS as error:
        raise not_saved(final, "a checkpoint", error) from error
    for old in [folder for folder in found(run_dir) if folder.name <= name][KEPT:]:  # newer ones are damaged: no loss
        _discard(old)
    return final


def not_saved(path: Path, what: str, error: BaseException) -> MachineError:
    """What to say if the disk is full or refuses."""
    told = f"cannot save {what}: {error} ({usage_of(path).free:,} bytes free)"
    mend = "Make room, then run the same command again to go on"
    return out_of_memory(error) or MachineError(str(path), told, mend)


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint → (its folder, what was wrong with those skipped).

    Raises MachineError if there are checkpoints and none is whole: a run never starts afresh in silence.
    """
    skipped: list[str] = []
    for folder in found(run_dir):
        fault = verify(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"{folder.name}: {fault}")
    if skipped:
        what = f"no checkpoint is whole ({'; '.join(skipped)})"
        raise MachineError(str(folder_of(run_dir)), what, "Start anew in another folder, or remove this one")
    return None, skipped


def load(
    folder: Path, model: nn.Module, optimizer: Any, schedule: Any, *, rank: int = 0, scaler: Any = None
) -> dict[str, Any]:
    """Load a verified checkpoint into model, optimizer, schedule and this process's random generators → its state."""
    load_weights(folder / "model.safetensors", model)
    optimizer.load_state_dict(shards.as_held(optimizer, _load_plain(folder / "optimizer.pt")))
    kept = _load_plain(folder / "random.pt")
    schedule.load_state_dict(kept["schedule"])
    if scaler:
        scaler.load_state_dict(kept["scaler"])
    _set_random_state(kept["random"][rank])
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state


def _load_plain(file: Path) -> Any:
    """Read what torch.save wrote, if it is numbers and nothing that would be run. Raises ConfigError."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # the manifest verified it: it is not damaged, somebody made it so
        if isinstance(error, OSError | MemoryError):
            raise
        what = f"holds more than numbers: {' '.join(str(error).split())[:160]}"
        raise ConfigError(str(file), what, "Do not use this folder") from None


def save_weights(file: Path, model: nn.Module) -> None:
    """Write a model's weights alone, beside and renamed."""
    try:
        with whole_file(file) as beside:
            save_file(_untied(model), beside)
            open_to_umask(beside)
    except REFUSALS as error:
        raise not_saved(file, "the best weights", error) from error


def load_weights(file: Path, model: nn.Module) -> None:
    """Load what save_weights or save wrote; every tensor must be there, tied ones through their twin."""
    weights = load_file(file)
    wanted = _untied(model).keys()
    if weights.keys() != wanted:
        differ = sorted(weights.keys() ^ wanted)
        raise MachineError(str(file), f"holds other tensors than the model, the first {differ[0]}", "Start anew")
    model.load_state_dict(weights, strict=False)


def remove(run_dir: Path) -> None:
    """Remove all checkpoints of a run that is done."""
    _discard(folder_of(run_dir))


def _discard(folder: Path) -> None:
    """Remove a folder so that a kill leaves no half of it under its name."""
    if folder.is_dir():
        beside = temporary(folder)
        os.replace(folder, beside)
        shutil.rmtree(beside, ignore_errors=True)


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each tensor once: of tied weights the first name, as safetensors refuses shared memory."""
    seen: dict[int, str] = {}
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            kept[name] = tensor.detach().contiguous()
    return kept


def random_state() -> dict[str, Any]:
    """This process's random generators, in plain values, so that they load with weights_only=True."""
    python: Any = random.getstate()
    generator: Any = numpy.random.get_state(legacy=True)
    name, keys, *rest = generator
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [name, keys.tolist(), *rest],
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    python, (name, keys, *rest) = state["python"], state["numpy"]
    random.setstate((python[0], tuple(python[1]), python[2]))
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
