"""What the teacher says about a batch: its last hidden states at the counted positions, and the head that reads them.

N counted positions, D width of the teacher.
"""

from typing import Any

import torch
from torch import Tensor

from kdx.batches import MicroBatch
from kdx.causal_lm import DTYPES, Head, attention_for, counted_hidden, device_dtype, head_of, load_causal_lm
from kdx.config import TeacherConfig


class Teacher:
    """A frozen model. Its hidden states give exact logits at any temperature, with its head alone in memory."""

    def __init__(self, model: Any, precision: str) -> None:
        self.model = model.requires_grad_(False).eval()
        self.head: Head = head_of(model)
        self.precision = precision
        self.num_parameters = model.num_parameters()

    @torch.no_grad()
    def hidden(self, batch: MicroBatch) -> Tensor:
        """Return the last hidden states [N, D] at the batch's counted positions, in the teacher's dtype."""
        with torch.autocast(self.model.device.type, enabled=False):  # the teacher computes in its own dtype, always
            return counted_hidden(self.model, batch.to(self.model.device))

    def free(self) -> None:
        """Let go of the body; the head stays."""
        self.model = None


def load_teacher(config: TeacherConfig, device: torch.device, max_length: int) -> Teacher:
    """Load the frozen teacher on a device, or on all of them. Raises ModelError or MachineError."""
    if config.precision == "auto":
        dtype, why = device_dtype(device)
        name = f"{next(k for k, v in DTYPES.items() if v == dtype)} ({why})"
    else:
        dtype, name = DTYPES[config.precision], config.precision
    quantised = config.quantization != "none"
    model = load_causal_lm(
        config,
        "teacher",
        dtype=dtype,
        attn_implementation=attention_for(config, device, max_length),
        quantization=config.quantization,
        device_map=config.device_map or (str(device) if quantised else None),
    )
    if not config.device_map and not quantised:
        model.to(device)
    return Teacher(model, f"{config.quantization}, {name}" if quantised else name)
