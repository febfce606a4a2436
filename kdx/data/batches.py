"""Tokenised rows → batches.

B rows of a batch, T positions, N counted positions: those whose next token counts in the loss.
"""

import contextlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

IGNORED = -100  # the label of a position that does not count, as everywhere in the field
WINDOW = 16  # batches that are grouped by length together: enough for little padding, few enough to stay shuffled


@dataclass(frozen=True)
class Row:
    """A tokenised conversation. counted[i]: whether the student must learn to predict token i."""

    id: str
    tokens: list[int]
    counted: list[bool]
    where: str = ""  # file:line

    @cached_property
    def num_counted(self) -> int:
        """Counted positions; the first token has nothing before it that could predict it."""
        return sum(self.counted[1:])

    @cached_property
    def digest(self) -> str:
        """What decides a teacher's hidden states of this row: its tokens, and which of them count."""
        numbers = np.asarray(self.tokens, np.int32).tobytes() + np.asarray(self.counted[1:], bool).tobytes()
        return xxhash.xxh3_128_hexdigest(numbers)


# Where a row's tokens begin and its name ([id, where] as JSON) ends, in their files; its size; its digest, in hex.
TABLE = np.dtype(
    [("start", "i8"), ("length", "i4"), ("num_counted", "i4"), ("name", "i8"), ("name_length", "i4"), ("digest", "S32")]
)


def write_rows(stem: Path, rows: Iterable[Row]) -> str:
    """Write rows to STEM.tokens, .counted, .names and .table, for `Rows` → a digest of their ids, tokens and masks."""
    fingerprint, start, name_start = xxhash.xxh3_128(), 0, 0
    with contextlib.ExitStack() as files:
        kinds = ("tokens", "counted", "names", "table")
        tokens, counted, names, table = (files.enter_context(open(f"{stem}.{kind}", "wb")) for kind in kinds)
        for row in rows:
            name = json.dumps([row.id, row.where]).encode()
            tokens.write(np.asarray(row.tokens, np.int32).tobytes())
            counted.write(np.asarray(row.counted, bool).tobytes())
            names.write(name)
            line = (start, len(row.tokens), row.num_counted, name_start, len(name), row.digest)
            table.write(np.array(line, TABLE).tobytes())
            fingerprint.update(json.dumps([row.id, row.digest]).encode())
            start, name_start = start + len(row.tokens), name_start + len(name)
    return fingerprint.hexdigest()[:16]


class Rows(Sequence[Row]):
    """Rows in memory-mapped files: shared by processes, and not in memory until they are read."""

    def __init__(self, stem: Path) -> None:
        def mapped(kind: str, dtype: Any) -> np.ndarray:
            file = Path(f"{stem}.{kind}")
            return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)

        self._table, self._tokens = mapped("table", TABLE), mapped("tokens", np.int32)
        self._counted, self._names = mapped("counted", np.bool_), mapped("names", np.uint8)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        start, length, _, name, name_length, _ = self._table[i].item()
        name, where = json.loads(self._names[name : name + name_length].tobytes())
        place = slice(start, start + length)
        return Row(name, self._tokens[place].tolist(), self._counted[place].tolist(), where)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [rows]."""
        return self._table["length"].astype(np.int64)

    @cached_property
    def num_counted(self) -> np.ndarray:
        """Counted positions of each row [rows]."""
        return self._table["num_counted"].astype(np.int64)

    @property
    def digests(self) -> list[str]:
        """The digest of each row, without reading the rows."""
        return self._table["digest"].astype(str).tolist()


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded to one length, and where in them the loss is taken."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 1 where there is a token; never made from ids: end of text may be the pad token
    positions: Tensor  # [N] indices into B·T, the positions whose next token counts
    counted_labels: Tensor  # [N] those next tokens
    row_of: Tensor  # [N] the row of the batch that each position belongs to
    row_ids: tuple[str, ...]
    row_digests: tuple[str, ...]
    where: tuple[str, ...]  # file and line of each row
    weights: dict[str, Tensor] = field(default_factory=dict)  # term → [N] factors; a missing term weighs 1 everywhere

    @property
    def num_counted(self) -> list[int]:
        """Counted positions of each row, in the order of the rows."""
        return torch.bincount(self.row_of, minlength=len(self.row_ids)).tolist()

    def to(self, device: torch.device) -> "MicroBatch":
        tensors: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        weights = {name: weight.to(device, non_blocking=True) for name, weight in self.weights.items()}
        return replace(self, **tensors, weights=weights)


def collate(rows: Sequence[Row], pad_id: int) -> MicroBatch:
    """Pad rows on the right to the longest; labels are shifted here and nowhere else."""
    length = max((len(row.tokens) for row in rows), default=1)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    positions: list[int] = []
    labels: list[int] = []
    row_of: list[int] = []
    for i, row in enumerate(rows):
        input_ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        attention_mask[i, : len(row.tokens)] = 1
        predicting = [t for t in range(len(row.tokens) - 1) if row.counted[t + 1]]  # logits at t predict token t+1
        positions += [i * length + t for t in predicting]
        labels += [row.tokens[t + 1] for t in predicting]
        row_of += [i] * len(predicting)
    return MicroBatch(
        input_ids,
        attention_mask,
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(row_of, dtype=torch.long),
        tuple(row.id for row in rows),
        tuple(row.digest for row in rows),
        tuple(row.where or row.id for row in rows),
    )


def merged(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Join micro-batches into one, padded to the longest, for the teacher's pass, which needs less memory than training."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch.input_ids.shape[1] for batch in batches)
    starts = [sum(len(batch.row_ids) for batch in batches[:i]) for i in range(len(batches))]

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))  # masked, so any id does

    positions = []
    for batch, start in zip(batches, starts, strict=True):
        row, within = batch.positions // batch.input_ids.shape[1], batch.positions % batch.input_ids.shape[1]
        positions.append((row + start) * length + within)
    return MicroBatch(
        torch.cat([padded(batch.input_ids) for batch in batches]),
        torch.cat([padded(batch.attention_mask) for batch in batches]),
        torch.cat(positions),
        torch.cat([batch.counted_labels for batch in batches]),
        torch.cat([batch.row_of + start for batch, start in zip(batches, starts, strict=True)]),
        tuple(row for batch in batches for row in batch.row_ids),
        tuple(row for batch in batches for row in batch.row_digests),
        tuple(row for batch in batches for row in batch.where),
    )


def epoch_batches(
    lengths: Sequence[int] | np.ndarray, batch_size: int, *, seed: int, epoch: int, shuffle: bool
) -> list[list[int]]:
    """Order one epoch → a list of row numbers for each optimizer step; the last may be smaller.

    The order depends on seed and epoch alone. Within windows of a few batches, rows of similar length are grouped, so
    that there is little padding, and the batches of a window are shuffled again.
    """
    order = list(range(len(lengths)))
    if not shuffle:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng = random.Random(f"{seed}:{epoch}")
    rng.shuffle(order)
    rest = order[len(order) // batch_size * batch_size :]  # the small batch stays last, whatever its lengths
    batches = []
    for start in range(0, len(order) - len(rest), WINDOW * batch_size):
        window = order[start : min(start + WINDOW * batch_size, len(order) - len(rest))]
        window.sort(key=lambda row: lengths[row])
        grouped = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(grouped)
        batches += grouped
    return batches + ([rest] if rest else [])


@dataclass(frozen=True)
class StepBatch:
    """What one process does in one optimizer step."""

    epoch: float
    micro_batches: list[MicroBatch]
    num_tokens: int  # counted positions of the whole step, over all processes
    num_input_tokens: int  # tokens without padding of the whole step, over all processes

    @property
    def where(self) -> list[str]:
        """File and line of this process's rows."""
        return [where for micro_batch in self.micro_batches for where in micro_batch.where if where]


class Batches:
    """The batches of a run by step: any step can be reached without going through those before it."""

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.micro_batch_size = rows, batch_size, micro_batch_size
        self.seed, self.shuffle, self.pad_id = seed, shuffle, pad_id
        self.rank, self.num_processes = rank, num_processes
        self.steps_per_epoch = math.ceil(len(rows) / batch_size)

    def steps(self, first: int, last: int) -> Iterator[StepBatch | None]:
        """Yield this process's share of steps first … last − 1, then None.

        The next batch is prepared in a thread while the caller is busy with the current one.
        """
        plan = self.plan(first, last)

        def prepared() -> StepBatch | None:
            return next((self._step_batch(step, numbers) for step, numbers in plan), None)

        with ThreadPoolExecutor(1) as thread:
            upcoming = thread.submit(prepared)
            while (batch := upcoming.result()) is not None:
                upcoming = thread.submit(prepared)
                yield batch
        yield None

    def plan(self, first: int, last: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (step, row numbers) for steps first … last − 1."""
        step = first
        while step < last:
            epoch, within = divmod(step, self.steps_per_epoch)
            batches = epoch_batches(
                self.rows.lengths, self.batch_size, seed=self.seed, epoch=epoch, shuffle=self.shuffle
            )
            for batch in batches[within : within + last - step]:
                yield step, batch
                step += 1

    def _step_batch(self, step: int, numbers: list[int]) -> StepBatch:
        lengths = self.rows.lengths
        mine = sorted(numbers[self.rank :: self.num_processes], key=lambda i: lengths[i], reverse=True)
        size = self.micro_batch_size
        # Every process runs the same number of micro-batches, an empty one if need be: collectives must match.
        num_micro = math.ceil(math.ceil(len(numbers) / self.num_processes) / size)
        parts = [[self.rows[i] for i in mine[k * size : (k + 1) * size]] for k in range(num_micro)]
        return StepBatch(
            epoch=(step + 1) / self.steps_per_epoch,
            micro_batches=[collate(part or [_empty_row(self.pad_id)], self.pad_id) for part in parts],
            num_tokens=int(self.rows.num_counted[numbers].sum()),
            num_input_tokens=int(lengths[numbers].sum()),
        )

    def rows_seen(self, max_steps: int) -> list[int]:
        """Return the numbers of the rows that these steps read, over all processes, each once."""
        if max_steps >= self.steps_per_epoch:
            return list(range(len(self.rows)))
        return [i for _, numbers in self.plan(0, max_steps) for i in numbers]

    def num_input_tokens(self, max_steps: int) -> int:
        """Count the tokens without padding that these steps read, over all processes."""
        epochs = max_steps // self.steps_per_epoch
        rest = [i for _, numbers in self.plan(epochs * self.steps_per_epoch, max_steps) for i in numbers]
        return int(epochs * self.rows.lengths.sum() + self.rows.lengths[np.array(rest, dtype=int)].sum())

    def padding(self, max_steps: int) -> float:
        """Return the share of padding among the positions that the run computes."""
        real = padded = 0
        for _, numbers in self.plan(0, min(max_steps, self.steps_per_epoch)):
            lengths = sorted(self.rows.lengths[numbers].tolist(), reverse=True)
            for i in range(0, len(lengths), self.micro_batch_size):
                part = lengths[i : i + self.micro_batch_size]
                real, padded = real + sum(part), padded + len(part) * part[0]
        return 1 - real / padded if padded else 0.0


def by_length(rows: Rows, batch_size: int) -> list[list[int]]:
    """Group row numbers into batches of similar length, longest first, for passes where order does not matter."""
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _empty_row(pad_id: int) -> Row:
    """Make a row without a counted token, for a process that a small last batch leaves without rows."""
    return Row("", [pad_id, pad_id], [False, False])
