"""How torchrun or accelerate launched this process: its device, its precision, and the other processes."""

import gc
import os
from collections.abc import Callable

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from kdx import causal_lm, plugins
from kdx.config import Config
from kdx.errors import MachineError
from kdx.run import sharding
from kdx.run.tracking import quiet_libraries


def build_accelerator(config: Config) -> Accelerator:
    """Choose device and precision, and refuse what accelerate would do differently in silence. Raises KdxError.

    Every command that computes starts here, so this also loads the user's plug-ins and quiets other libraries.
    """
    quiet_libraries()
    plugins.load()
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if sharding.is_asked(f"ACCELERATE_USE_{name}"):
            raise MachineError(f"ACCELERATE_USE_{name}", "is not supported", "Start without it, or with FSDP")
    cpu = not _has_gpu()
    precision: str = config.train.precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "")  # accelerate's config; "no" is fp32
    precision = precision or causal_lm.device_dtype(PartialState(cpu=cpu).device)
    if precision == "fp16" and cpu:
        raise MachineError("train.precision", "fp16 needs a GPU", "Use train.precision=bf16 or fp32")
    fsdp = sharding.plugin(config, precision)
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
        raise MachineError(sharding.ASKED, "needs several GPUs", "Start without it")
    return machine


def agreed(decide: Callable[[], str]) -> str:
    """Decide in rank 0 and return its decision in every rank."""
    is_main = PartialState(cpu=not _has_gpu()).is_main_process
    return str(broadcast_object_list([decide() if is_main else ""])[0])


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()
