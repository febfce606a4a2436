"""FSDP: accelerate has torch's fully_shard split what is trained over the processes.

Only training knows of shards. To be measured, sampled and saved the student is gathered into an ordinary model that
every process has in main memory, and moves to its device while it is used. Without FSDP that model is the one trained.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy

from kdx.config import Config
from kdx.errors import MachineError
from kdx.objective import Objective

ASKED = "ACCELERATE_USE_FSDP"
OPTIMIZERS = ("torch.Adam", "torch.AdamW", "torch.Adamax", "torch.RAdam", "torch.RMSprop")  # elementwise: shards do


def is_asked(variable: str = ASKED) -> bool:
    """Return whether accelerate's environment asks for FSDP, or for what `variable` names."""
    return os.environ.get(variable, "").lower() == "true"


def plugin(config: Config, precision: str) -> FullyShardedDataParallelPlugin | None:
    """Build accelerate's plug-in if FSDP is asked for. Raises MachineError for what cannot be combined with it."""
    if not is_asked():
        return None
    refused = {
        "fsdp_version: 1": os.environ.get("FSDP_VERSION") != "2",
        "FSDP_OFFLOAD_PARAMS": is_asked("FSDP_OFFLOAD_PARAMS"),
        "FSDP_ACTIVATION_CHECKPOINTING": is_asked("FSDP_ACTIVATION_CHECKPOINTING"),
        f"adapter={config.adapter.name}": config.adapter.name != "none",
        "rollout=student": config.rollout.is_on_policy,
        "train.compile": config.train.compile,
        "train.precision=fp16": precision == "fp16",
        f"optim.name={config.optim.name}": config.optim.name not in OPTIMIZERS,
    }
    for name, is_so in refused.items():
        if is_so:
            raise MachineError(name, "cannot be combined with FSDP", "Start without it")
    # The arithmetic of any run: autocast over fp32 weights, gradients summed in fp32. Every process loads the models
    # itself: accelerate would leave all but the first without weights, the teacher's too.
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )


def prepare(machine: Accelerator, objective: Objective, optimizer: Any) -> tuple[Any, Any, Any]:
    """Have accelerate prepare what is trained → the module to call, the optimizer, and the student as a whole model."""
    whole: Any = objective.model
    if is_asked():
        whole = copy.deepcopy(whole).to("cpu")
        # Autocast as accelerate applies it without FSDP, but without a cache, which would keep every weight whole.
        uncached = machine.autocast(AutocastKwargs(cache_enabled=False))
        objective.forward = uncached(objective.forward)  # type: ignore[method-assign]
    return *machine.prepare(objective, optimizer), whole


@contextmanager
def whole(objective: Objective, student: nn.Module) -> Iterator[None]:
    """Have what is trained as the whole student of every process, on its device. All processes must call it."""
    if objective.model is student:
        yield
        return
    shards: list[Any] = list(objective.model.parameters())
    student.to(shards[0].device).train(objective.model.training)
    with torch.no_grad():
        for weight, shard in zip(student.parameters(), shards, strict=True):
            weight.copy_(shard.full_tensor())
    yield
    student.to("cpu")


def spread(student: nn.Module, objective: Objective) -> None:
    """Copy the whole student into what is trained."""
    if objective.model is not student:
        states.set_model_state_dict(
            objective.model, student.state_dict(), options=states.StateDictOptions(full_state_dict=True)
        )


def optimizer_state(objective: Objective, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors; under FSDP in the main process alone."""
    if not is_asked():
        return dict(optimizer.state_dict())
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_optimizer_state_dict(objective, optimizer.optimizer, options=options)


def set_optimizer_state(objective: Objective, optimizer: Any, state: dict[str, Any]) -> None:
    """Load what optimizer_state returned."""
    if is_asked():
        options = states.StateDictOptions(full_state_dict=True)
        states.set_optimizer_state_dict(objective, optimizer.optimizer, state, options=options)
    else:
        optimizer.load_state_dict(state)
