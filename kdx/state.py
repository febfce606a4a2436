"""What the training loop remembers, and a checkpoint keeps."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from kdx.config import TrainConfig
from kdx.data.batches import StepBatch
from kdx.run import identity as drift


@dataclass
class State:
    """All that the loop must remember to go on after a stop, besides weights, optimizer and random numbers."""

    of: str = ""  # drift.digest: a checkpoint says whose it is
    step: int = 0
    tokens: int = 0  # input tokens without padding
    counted_tokens: int = 0  # those in the loss
    best: float = math.inf
    best_step: int = 0
    best_digest: str = ""  # of the file with the best weights
    num_worse: int = 0  # held-out measures in a row without improvement
    measured: int = 0  # the last step whose held-out measures were taken on the way
    lines: int = 0  # bytes of metrics.jsonl
    stopped_by: str = "max_steps"
    seconds: float = 0.0  # spent in steps; evaluation and saving not counted
    step_seconds: list[float] = field(default_factory=list)
    window: list[dict[str, Any]] = field(default_factory=list)  # steps since the last log line
    store: list[str] = field(default_factory=list)  # the run's shards in the teacher's store
    num_nonfinite: int = 0  # steps that were skipped
    versions: dict[str, str] = field(default_factory=drift.versions)
    other_versions: list[str] = field(default_factory=list)  # that a part of the run was made with

    @classmethod
    def read(cls, kept: Any) -> "State | None":
        """The state in a checkpoint; None if it is not this version's."""
        was = asdict(cls())
        if not isinstance(kept, dict) or kept.keys() != was.keys():
            return None
        is_number = {name: isinstance(value, int | float) for name, value in was.items()}
        same = (isinstance(kept[n], int | float if is_number[n] else type(value)) for n, value in was.items())
        return cls(**kept) if all(same) else None

    def add(self, batch: StepBatch, seconds: float) -> None:
        """Count one step that is done."""
        self.step += 1
        self.tokens += batch.num_input_tokens
        self.counted_tokens += batch.num_tokens
        self.seconds += seconds
        self.step_seconds = [*self.step_seconds[-199:], seconds]  # enough for a median

    def is_worn_out(self, config: TrainConfig) -> bool:
        """Whether the held-out measures have not become better for as long as the run has patience."""
        patience = config.early_stopping.patience
        return patience is not None and self.num_worse >= patience
