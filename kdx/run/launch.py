"""What accelerate does for a run: its device and precision, the other processes, and FSDP.

Under FSDP torch's fully_shard splits what is trained over the processes. Only training knows of shards. To be measured,
sampled and saved the student is gathered into an ordinary model that every process has in main memory, and moves to its
device while it is used. Without FSDP that model is the one trained.
"""

import copy
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin, broadcast_object_list
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy

from kdx import causal_lm, plugins
from kdx.config import Config
from kdx.errors import MachineError
from kdx.objective import Objective
from kdx.run.tracking import quiet_libraries

FSDP = "ACCELERATE_USE_FSDP"
OPTIMIZERS = ("torch.Adam", "torch.AdamW", "torch.Adamax", "torch.RAdam", "torch.RMSprop")  # elementwise: shards do


def build_accelerator(config: Config) -> Accelerator:
    """Choose device and precision, and refuse what accelerate would do differently in silence. Raises KdxError.

    Every command that computes starts here, so this also loads the user's plug-ins and quiets other libraries.
    """
    quiet_libraries()
    plugins.load()
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if is_asked(f"ACCELERATE_USE_{name}"):
            raise MachineError(f"ACCELERATE_USE_{name}", "is not supported", "Start without it, or with FSDP")
    cpu = not _has_gpu()
    precision: str = config.train.precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "")  # accelerate's config; "no" is fp32
    precision = precision or causal_lm.device_dtype(PartialState(cpu=cpu).device)
    if precision == "fp16" and cpu:
        raise MachineError("train.precision", "fp16 needs a GPU", "Use train.precision=bf16 or fp32")
    fsdp = sharding_plugin(config, precision)
    gc.collect()  # of a job before this one: its student and accelerate's autocast hold one another on the device
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    # That job may have had another precision, too; FSDP is remembered in what is otherwise left alone.
    AcceleratorState._reset_state(reset_partial_state=fsdp is not None)
    machine = Accelerator(
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        cpu=cpu,
        fsdp_plugin=fsdp,
        step_scheduler_with_optimizer=False,
    )
    if fsdp and not machine.is_fsdp2:
        raise MachineError(FSDP, "needs several GPUs", "Start without it")
    return machine


def agreed(decide: Callable[[], str]) -> str:
    """Decide in rank 0 and return its decision in every rank."""
    is_main = PartialState(cpu=not _has_gpu()).is_main_process
    return str(broadcast_object_list([decide() if is_main else ""])[0])


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def is_asked(variable: str = FSDP) -> bool:
    """Return whether accelerate's environment asks for FSDP, or for what `variable` names."""
    return os.environ.get(variable, "").lower() == "true"


def sharding_plugin(config: Config, precision: str) -> FullyShardedDataParallelPlugin | None:
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
    how: dict[str, Any] = {"mixed_precision_policy": MixedPrecisionPolicy(), "cpu_ram_efficient_loading": False}
    return FullyShardedDataParallelPlugin(**how)


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
        options = states.StateDictOptions(full_state_dict=True)
        states.set_model_state_dict(objective.model, student.state_dict(), options=options)


def optimizer_state(objective: Objective, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors; under FSDP in the main process alone."""
    if not is_asked():
        return dict(optimizer.state_dict())
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_optimizer_state_dict(objective, optimizer.optimizer, options=options)


def set_optimizer_state(objective: Objective, optimizer: Any, state: dict[str, Any]) -> None:
    if is_asked():
        options = states.StateDictOptions(full_state_dict=True)
        states.set_optimizer_state_dict(objective, optimizer.optimizer, state, options=options)
    else:
        optimizer.load_state_dict(state)
