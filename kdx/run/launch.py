"""What this process was started as, by torchrun or accelerate: its device, its precision, and the processes beside it."""

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from kdx import causal_lm
from kdx.config import Config
from kdx.errors import MachineError
from kdx.run import sharding


def build_accelerator(config: Config) -> Accelerator:
    """Choose device and precision, and refuse what accelerate would quietly do otherwise. Raises MachineError."""
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if sharding.is_asked(f"ACCELERATE_USE_{name}"):
            what = "is asked for, and kdx is not written for it"
            raise MachineError(f"ACCELERATE_USE_{name}", what, "Start without it, or with ACCELERATE_USE_FSDP")
    fsdp = sharding.plugin(config)
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    precision: str = config.train.precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "")  # accelerate's config; "no" is fp32
        if precision not in ("", "bf16", "fp16", "no"):
            what = f"is {precision}, and kdx is not written for it"
            raise MachineError("ACCELERATE_MIXED_PRECISION", what, "Choose bf16, fp16 or no, or train.precision=...")
        if not precision:
            device = torch.device("cpu") if cpu else Accelerator().device
            precision = causal_lm.device_dtype(device)
    if precision == "fp16" and cpu:
        raise MachineError("train.precision", "fp16 needs a GPU", "Use train.precision=bf16 or fp32")
    # A job before this one may have had another precision; FSDP is noted in what is else left alone.
    AcceleratorState._reset_state(reset_partial_state=fsdp is not None)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    mend = "Start them with torchrun, or with accelerate launch on GPUs"
    try:
        accelerator = Accelerator(
            mixed_precision=precision if precision in ("bf16", "fp16") else "no",
            cpu=cpu,
            fsdp_plugin=fsdp,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        if processes == 1:
            told = " ".join(str(error).split()).rstrip(".")
            raise MachineError(
                "ACCELERATE_...", f"accelerate refuses: {told}", "Mend the variable, or unset it"
            ) from None
        raise MachineError("WORLD_SIZE", f"is {processes}, and accelerate refuses: {error}", mend) from None
    if processes != accelerator.num_processes:
        what = f"{processes} processes were started, but accelerate sees {accelerator.num_processes}"
        raise MachineError("WORLD_SIZE", what, mend)
    if fsdp and not accelerator.is_fsdp2:
        what = f"is asked for, and accelerate does not do it on {processes} × {accelerator.device.type}"
        raise MachineError(sharding.ASKED, what, "Start without it, or on several GPUs")
    return accelerator
