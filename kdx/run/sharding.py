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
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from kdx.config import Config
from kdx.errors import MachineError
from kdx.objective import Objective

ASKED = "ACCELERATE_USE_FSDP"
OPTIMIZERS = ("torch.Adam", "torch.AdamW", "torch.Adamax", "torch.RAdam", "torch.RMSprop")  # elementwise: shards do


def is_asked(variable: str = ASKED) -> bool:
    """Return whether accelerate's environment, or the user's, asks for FSDP (or for what `variable` names)."""
    return os.environ.get(variable, "").lower() == "true"


def plugin(config: Config) -> FullyShardedDataParallelPlugin | None:
    """Build accelerate's plug-in if FSDP is asked for. Raises MachineError for what cannot be combined with it."""
    if not is_asked():
        return None
    precision: str = config.train.precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise MachineError("FSDP_VERSION", "must be 2", "Set fsdp_version: 2")
    asked = [name for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING") if is_asked(name)]
    asked += [f"adapter={config.adapter.name}"] * (config.adapter.name != "none")
    asked += ["rollout=student"] * config.rollout.is_on_policy
    asked += ["train.compile"] * config.train.compile + ["train.precision=fp16"] * (precision == "fp16")
    asked += [f"optim.name={config.optim.name}"] * (config.optim.name not in OPTIMIZERS)
    if asked:
        raise MachineError(asked[0], "cannot be combined with FSDP", "Start without it")
    # The arithmetic of any run: autocast over fp32 weights, gradients summed in fp32. Every process loads the models
    # itself: accelerate would leave all but the first without weights, the teacher's too.
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )


def prepare(machine: Accelerator, objective: Objective, optimizer: Any) -> tuple[Any, Any, Any]:
    """Have accelerate prepare what is trained → the module to call, the optimizer, and the student as a whole model.

    Raises MachineError if the student cannot be sharded.
    """
    whole: Any = objective.model
    if is_asked():
        whole = copy.deepcopy(whole).to("cpu")
        # Autocast as accelerate applies it without FSDP, but without a cache, which would keep every weight whole.
        uncached = machine.autocast(AutocastKwargs(cache_enabled=False))
        objective.forward = uncached(objective.forward)  # type: ignore[method-assign]
    module, optimizer = machine.prepare(objective, optimizer)
    if is_asked() and not all(isinstance(weight, DTensor) for weight in objective.parameters()):
        raise MachineError(ASKED, "was asked for, but accelerate left weights whole", "Start without it")
    return module, optimizer, whole


@torch.no_grad()
def gather(objective: Objective, student: nn.Module) -> None:
    """Copy what is trained into the whole student of every process, on its device. All processes must call it."""
    if objective.model is student:
        return
    student.to(next(objective.model.parameters()).device).train(objective.model.training)
    for weight, shard in zip(student.parameters(), objective.model.parameters(), strict=True):
        weight.copy_(plain(shard))


@contextmanager
def whole(objective: Objective, student: nn.Module) -> Iterator[None]:
    """Have the student whole on its device for a while."""
    gather(objective, student)
    yield
    if objective.model is not student:
        student.to("cpu")


@torch.no_grad()
def spread(student: nn.Module, objective: Objective) -> None:
    """Copy the whole student into what is trained."""
    if objective.model is student:
        return
    shard: Any
    for weight, shard in zip(student.parameters(), objective.model.parameters(), strict=True):
        shard.copy_(distribute_tensor(weight.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None))


def optimizer_state(objective: Objective, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors; under FSDP in the main process alone."""
    if not is_asked():
        return dict(optimizer.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(objective, optimizer.optimizer, options=options)


def set_optimizer_state(objective: Objective, optimizer: Any, state: dict[str, Any]) -> None:
    """Load what optimizer_state returned."""
    if is_asked():
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(objective, optimizer.optimizer, state, options=options)
    else:
        optimizer.load_state_dict(state)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
