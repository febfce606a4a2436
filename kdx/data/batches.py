"""Tokenised rows → batches.

B rows of a batch, T positions, N counted positions: those whose next token counts in the loss.
"""

import itertools
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
import pyarrow
import torch
import xxhash
from torch import Tensor

AT_ONCE = 1024  # rows written together
IGNORED = -100  # the label of a position that does not count, as everywhere in the field
WINDOW = 16  # batches that are grouped by length together: enough for little padding, few enough to stay shuffled
Groups = list[list[int]]  # of the numbers of rows
Lengths = Sequence[int] | np.ndarray  # tokens of each row


@dataclass(frozen=True)
class Row:
    """A tokenised conversation. counted[i]: whether the student must learn to predict token i."""

    id: str
    tokens: list[int]
    counted: list[bool]
    where: str = ""  # file:line
    start: int | None = None  # from this token on the student said it itself; None: a row as it was given

    @cached_property
    def num_counted(self) -> int:
        """Counted positions; the first token has nothing before it that could predict it."""
        return sum(self.counted[1:])

    @cached_property
    def digest(self) -> str:
        """What decides a teacher's hidden states of this row: its tokens, and which of them count.

        Empty for the student's own words, which never enter the teacher's store.
        """
        if self.start is not None:
            return ""
        numbers = np.asarray(self.tokens, np.int32).tobytes() + np.asarray(self.counted[1:], bool).tobytes()
        return xxhash.xxh3_128_hexdigest(numbers)


COLUMNS = ["id", "tokens", "counted", "where"]  # those of a Row
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "tokens": pyarrow.list_(pyarrow.int32()),
        "counted": pyarrow.list_(pyarrow.bool_()),
        "where": pyarrow.string(),
        "length": pyarrow.int64(),
        "num_counted": pyarrow.int64(),
        "digest": pyarrow.string(),
    }
)


def write_rows(file: Path, rows: Iterable[Row]) -> str:
    """Write rows to an Arrow file, for `Rows` → a digest of their ids, tokens and masks."""
    fingerprint, rows = xxhash.xxh3_128(), iter(rows)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, SCHEMA) as writer:
        while some := list(itertools.islice(rows, AT_ONCE)):
            columns = [
                {**vars(row), "length": len(row.tokens), "num_counted": row.num_counted, "digest": row.digest}
                for row in some
            ]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(columns, SCHEMA))
            for row in some:
                fingerprint.update(json.dumps([row.id, row.digest]).encode())
    return fingerprint.hexdigest()[:16]


class Rows(Sequence[Row]):
    """Rows in a memory-mapped file: shared by processes, and not in memory until they are read.

    sources: of a mixture, the rows of each; drawn: how many of them an epoch has.
    """

    def __init__(self, file: Path | pyarrow.Table) -> None:
        if not isinstance(file, pyarrow.Table):
            file = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
        self.table: Any = file
        self.sources: dict[str, range] = {}
        self.drawn: dict[str, int] = {}
        self.lengths: np.ndarray = self.table["length"].to_numpy()  # tokens of each row [rows]
        self.num_counted: np.ndarray = self.table["num_counted"].to_numpy()  # counted positions of each row [rows]

    @classmethod
    def joined(cls, parts: dict[str, "Rows"], drawn: dict[str, int] | None = None) -> "Rows":
        """Join the rows of several sources; each id begins with its source's name."""
        tables = []
        for name, part in parts.items():
            ids = pyarrow.array([f"{name}/{i}" for i in part.table["id"].to_pylist()], pyarrow.string())
            tables.append(part.table.set_column(0, "id", ids))
        rows = cls(pyarrow.concat_tables(tables))
        ends = np.cumsum([0, *(len(part) for part in parts.values())]).tolist()
        rows.sources = {name: range(*ends[i : i + 2]) for i, name in enumerate(parts)}
        rows.drawn = drawn or {}
        return rows

    def epoch(self, seed: int, epoch: int) -> Sequence[int]:
        """Return the numbers of an epoch's rows: all, or those drawn of each source of a mixture."""
        if not self.drawn:
            return range(len(self))
        rows: list[int] = []
        for name, number in self.drawn.items():
            rows += random.Random(f"{seed}:{epoch}:{name}").sample(self.sources[name], number)
        return rows

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, i: Any) -> Any:
        (columns,) = self.table.slice(range(len(self))[i], 1).select(COLUMNS).to_pylist()
        return Row(**columns)

    @property
    def digests(self) -> list[str]:
        """The digest of each row, without reading the rows."""
        return list(self.table["digest"].to_pylist())


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded to one length, and where in them the loss is taken."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 1 where there is a token; never made from ids: end of text may be the pad token
    positions: Tensor  # [N] indices into B·T, the positions whose next token counts
    counted_labels: Tensor  # [N] those next tokens
    row_of: Tensor  # [N] the row of the batch that each position belongs to
    rows: tuple[Row, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)  # term → [N] factors; a missing term weighs 1 everywhere

    @property
    def row_ids(self) -> tuple[str, ...]:
        return tuple(row.id for row in self.rows)

    @property
    def row_digests(self) -> tuple[str, ...]:
        return tuple(row.digest for row in self.rows)

    @property
    def num_counted(self) -> list[int]:
        """Counted positions of each row, in the order of the rows."""
        return torch.bincount(self.row_of, minlength=len(self.rows)).tolist()

    def to(self, device: torch.device) -> "MicroBatch":
        def moved(tensors: dict[str, Any]) -> dict[str, Any]:
            return {k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)}

        return replace(self, **moved(vars(self)), weights=moved(self.weights))


def collate(rows: Sequence[Row], pad_id: int) -> MicroBatch:
    """Pad rows on the right to the longest; labels are shifted here and nowhere else."""
    length = max((len(row.tokens) for row in rows), default=1)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    is_counted = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        attention_mask[i, : len(row.tokens)] = 1
        is_counted[i, 1 : len(row.tokens)] = torch.tensor(row.counted[1:])
    row_of, at = is_counted.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids,
        attention_mask,
        row_of * length + at - 1,  # logits at t predict token t+1
        input_ids[row_of, at],
        row_of,
        tuple(rows),
    )


def merged(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Join micro-batches into one, padded to the longest, for the teacher's pass, which needs less memory than training."""
    rows = [row for batch in batches for row in batch.rows]
    return batches[0] if len(batches) == 1 else collate(rows, pad_id=0)  # nothing looks at padding, so any id does


def epoch_batches(lengths: Lengths, batch_size: int, *, seed: int, epoch: int, shuffle: bool) -> Groups:
    """Order one epoch → a list of row numbers for each optimizer step; the last may be smaller.

    The order depends on seed and epoch alone. Within windows of a few batches, rows of similar length are grouped, so
    that there is little padding, and the batches of a window are shuffled again.
    """
    order = list(range(len(lengths)))
    if not shuffle:
        return in_groups(order, batch_size)
    rng = random.Random(f"{seed}:{epoch}")
    rng.shuffle(order)
    num_full = len(order) // batch_size * batch_size
    batches, full, rest = [], order[:num_full], order[num_full:]  # the small batch stays last, whatever its lengths
    for window in in_groups(full, WINDOW * batch_size):
        grouped = in_groups(sorted(window, key=lambda row: lengths[row]), batch_size)
        rng.shuffle(grouped)
        batches += grouped
    return batches + in_groups(rest, batch_size)


def in_groups(items: Sequence[Any], size: int) -> list[Any]:
    """Cut a sequence into groups of `size` items; the last may be smaller."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass(frozen=True)
class StepBatch:
    """What one process does in one optimizer step."""

    epoch: float
    micro_batches: list[MicroBatch]
    num_tokens: int  # counted positions of the whole step, over all processes
    num_input_tokens: int  # tokens without padding of the whole step, over all processes
    figures: dict[str, float] = field(default_factory=dict)  # further ones of the whole step, for the log


@dataclass(frozen=True)
class Batches:
    """The batches of a run by step: any step can be reached without going through those before it."""

    rows: Rows
    batch_size: int
    micro_batch_size: int
    seed: int
    shuffle: bool
    pad_id: int
    rank: int = 0
    num_processes: int = 1
    micro_batch_tokens: int | None = None  # in place of micro_batch_size: most tokens at once, with padding
    kept: dict[str, Any] = field(default_factory=dict)  # what a checkpoint must have of them beside the step

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil((sum(self.rows.drawn.values()) or len(self.rows)) / self.batch_size)

    def steps(self, first: int, last: int) -> Iterator[StepBatch | None]:
        """Yield this process's share of steps first … last − 1, then None.

        The next batch is prepared in a thread while the caller is busy with the current one.
        """
        plan = self.plan(first, last)
        batches = (self._shared_out(step, [self.rows[i] for i in numbers]) for step, numbers in plan)
        with ThreadPoolExecutor(1) as thread:
            upcoming = thread.submit(next, batches, None)
            while (batch := upcoming.result()) is not None:
                upcoming = thread.submit(next, batches, None)
                yield batch
        yield None

    def plan(self, first: int, last: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (step, row numbers) for steps first … last − 1."""
        step = first
        while step < last:
            epoch, within = divmod(step, self.steps_per_epoch)
            rows = self.rows.epoch(self.seed, epoch)
            batches = epoch_batches(
                self.rows.lengths[rows], self.batch_size, seed=self.seed, epoch=epoch, shuffle=self.shuffle
            )
            for batch in batches[within : within + last - step]:
                yield step, [rows[i] for i in batch]
                step += 1

    def _shared_out(self, step: int, rows: Sequence[Row]) -> StepBatch:
        """Make this process's share of a step of these rows."""
        lengths, size, most = [len(row.tokens) for row in rows], self.micro_batch_size, self.micro_batch_tokens
        num = self.num_processes
        shares = [by_length(lengths, size, most, range(i, len(rows), num)) for i in range(num)]
        # Every process runs the same number of micro-batches, if need be one that counts nothing: collectives must match.
        no_row = Row("", [self.pad_id] * 2, [False] * 2)
        parts = shares[self.rank] + [[]] * (max(map(len, shares)) - len(shares[self.rank]))
        return StepBatch(
            epoch=(step + 1) / self.steps_per_epoch,
            micro_batches=[self._collated([rows[i] for i in part] or [no_row], step) for part in parts],
            num_tokens=sum(row.num_counted for row in rows),
            num_input_tokens=sum(lengths),
        )

    def _collated(self, rows: Sequence[Row], step: int) -> MicroBatch:
        return collate(rows, self.pad_id)

    def end_of_window(self, step: int) -> int:
        """Return where the window of batches ends that a step is in: which rows come before does not depend on lengths."""
        if not self.shuffle:
            return step
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.steps_per_epoch + min(math.ceil(within / WINDOW) * WINDOW, self.steps_per_epoch)

    def rows_seen(self, max_steps: int) -> list[int]:
        """Return the numbers of the rows that these steps read, over all processes, each once."""
        steps = max_steps if self.rows.drawn else min(max_steps, self.steps_per_epoch)
        return list(dict.fromkeys(i for _, numbers in self.plan(0, steps) for i in numbers))


def by_length(
    lengths: Lengths, batch_size: int, max_tokens: int | None = None, numbers: Sequence[int] | None = None
) -> Groups:
    """Group the numbers of rows of these lengths into batches of similar length, the longest first.

    batch_size: rows of a batch, or with max_tokens as many as fit into so many tokens, padding included; at least one.
    numbers: of the rows; all by default.
    """
    groups: Groups = []
    for i in sorted(range(len(lengths)) if numbers is None else numbers, key=lambda i: lengths[i], reverse=True):
        most = max_tokens // int(lengths[groups[-1][0]]) if max_tokens and groups else batch_size
        if not groups or len(groups[-1]) >= most:
            groups.append([])
        groups[-1].append(i)
    return groups
