"""Keep a teacher's last hidden states at the counted positions, so that it runs once for every row.

    KEY/rows/OWNER-UUID.safetensors   shards: rows [n, D] in the teacher's dtype by digest, their checksums as metadata
    KEY/head.safetensors              the teacher's head: with it hidden states give exact logits at any temperature
    KEY/answers/                      its answers to sample prompts
    KEY/teacher.json · use.json       which teacher this is · when it was last used, and its speed

KEY names what decides the answers (`Identity`). Any number of processes read and write, and any of them may be killed:
a shard appears whole under its name and never changes.

A stored row keeps its bits: whoever computes it again, in another batch, is given the stored ones. So a resumed run
repeats the straight one exactly, however much of what it had computed was flushed when it stopped.
"""

import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64

from kdx.causal_lm import DTYPES, Head, load_config
from kdx.config import TeacherConfig
from kdx.data.batches import Row
from kdx.data.files import at_home
from kdx.errors import MachineError
from kdx.run.files import in_bytes, local_time, open_to_umask, read_json, room, size_of, whole_file, write_beside

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20  # a writer's buffer is flushed when it holds so much,
FLUSH_SECONDS = 30.0  # or when its first row has waited so long: what a kill may cost
ROW_OVERHEAD = 200  # bytes of a row's name, place and checksum in a shard's header
HEAD = "head.safetensors"
REFUSALS = (OSError, SafetensorError)  # safetensors wraps a full disk in an error of its own


@dataclass(frozen=True)
class Identity:
    """What decides a teacher's answers."""

    weights: str  # digest of its files, or repository and commit
    tokenizer: str  # digest of the id → token map
    dtype: str
    quantization: str

    @property
    def key(self) -> str:
        return _sha256(json.dumps(asdict(self), sort_keys=True))[:16]

    @property
    def model(self) -> str:
        """The teacher itself, whatever it computes in."""
        return _sha256(self.weights + self.tokenizer)[:16]

    @property
    def precision(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.quantization}, {self.dtype}"


@dataclass
class Counts:
    """What a store did for a run."""

    hits: int = 0  # rows read
    computed: int = 0  # rows that the teacher computed
    from_others: int = 0  # of the hits, rows that another run wrote
    bad: int = 0  # rows found damaged
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_saved: float = 0.0  # of the teacher's time, at the best speed measured


@dataclass(frozen=True)
class StoredHead:
    """What is known of a teacher without loading its body."""

    head: Head
    num_parameters: int
    num_bytes: int


class Shard:
    """A file of named tensors with a checksum each, mapped into memory. Raises OSError or SafetensorError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(path, "pt")
        metadata, names = self._file.metadata() or {}, set(self._file.keys())
        self.replaces = metadata.pop("replaces", "").split()  # the shards it was compacted from
        self.num_rows = len(names | metadata.keys())  # damaged names included
        self.checksums = {name: value for name, value in metadata.items() if name in names}

    def read(self, name: str) -> Tensor | None:
        """Return a tensor as a view of the file, or None if it is damaged."""
        row = self._file.get_tensor(name)
        return row if checksum(name, row) == self.checksums[name] else None

    def whole_rows(self) -> dict[str, Tensor]:
        return {name: row for name in self.checksums if (row := self.read(name)) is not None}


class TeacherStore:
    """One teacher's folder in the store, as one process sees it. `owner` names the run in its shards' names."""

    def __init__(
        self, root: Path, identity: Identity, *, name: str, owner: str = "run", limit_bytes: float | None = None
    ) -> None:
        self.root, self.identity, self.name, self.limit_bytes = root, identity, name, limit_bytes
        self.folder, self.rows = root / identity.key, root / identity.key / "rows"
        self.counts = Counts()
        self.is_full = False  # no more rows are written
        self.seconds_per_position: float | None = read_json(self.folder / "use.json").get("seconds_per_position")
        self._own = f"{owner}-"
        self._shards: dict[str, Shard | None] = {}  # by file name; None if damaged
        self._shard_of: dict[str, Shard] = {}  # by row digest
        self._buffer: dict[str, Tensor] = {}  # rows not yet on disk
        self._buffer_bytes, self._buffer_since = 0, 0.0
        self._size = size_of(root) if limit_bytes else 0  # walks over all files, so only for the limit
        self._refresh()

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Return those rows that are not here, each once."""
        return [d for d in dict.fromkeys(digests) if d not in self._shard_of and d not in self._buffer]

    def read(self, digests: Sequence[str]) -> list[Tensor] | None:
        """Return the rows of a micro-batch, or None if one is missing or damaged: then all are to be computed."""
        self._flush_if_due()
        if self.missing(digests):
            self._refresh()
        rows = [] if self.missing(digests) else [row for d in digests if (row := self._row(d)) is not None]
        if len(rows) < len(digests):
            return None
        others = [d for d in digests if d in self._shard_of and not self._shard_of[d].path.name.startswith(self._own)]
        self.counts.hits += len(rows)
        self.counts.from_others += len(others)
        self.counts.bytes_read += sum(row.nbytes for row in rows)
        self.counts.seconds_saved += sum(len(row) for row in rows) * (self.seconds_per_position or 0.0)
        return rows

    def write(self, digests: Sequence[str], rows: Sequence[Tensor], seconds: float) -> list[Tensor]:
        """Store rows [n, D] that took the teacher so many seconds → the rows as they are to be used.

        Those that are here already (duplicates, a half-filled store) are not replaced: the stored ones are returned.
        """
        self.counts.computed += len(rows)
        if num_positions := sum(len(row) for row in rows):
            speed = seconds / num_positions
            self.seconds_per_position = min(speed, self.seconds_per_position or speed)
        stored = []
        for digest, row in zip(digests, rows, strict=True):
            if (known := self._row(digest)) is None:
                self._add(digest, row)
            stored.append(row if known is None else known)
        self._flush_if_due()
        return stored

    def flush(self) -> None:
        """Write the buffered rows as a shard; a full disk turns writing off with one warning."""
        if not self._buffer:
            return
        try:
            write_shard(self.rows / f"{self._own}{uuid.uuid4().hex}.safetensors", self._buffer)
        except REFUSALS as error:
            self._stop(f"{error}; {in_bytes(room(self.root)[1])} free")
            return
        self._buffer, self._buffer_bytes = {}, 0
        self._size = size_of(self.root) if self.limit_bytes else 0  # others write too
        self._refresh()

    def close(self) -> None:
        """Flush, and note when the store was used."""
        self.flush()
        if self.counts.hits or self.counts.computed:
            about = {"used": local_time(), "seconds_per_position": self.seconds_per_position}
            with suppress(OSError):  # a store that can only be read
                write_beside(self.folder / "use.json", json.dumps(about))

    def position(self) -> list[str]:
        """Return the names of this run's shards, of all its processes, for a checkpoint; flush all of them before."""
        return sorted(path.name for path in self.rows.glob(f"{self._own}*.safetensors"))

    def lost(self, position: Sequence[str]) -> list[str]:
        """Return the shards of a checkpoint whose rows are gone. Compaction loses none."""
        here = {name for shard in self._shards.values() if shard for name in (shard.path.name, *shard.replaces)}
        return [name for name in position if name not in here]

    def _add(self, digest: str, row: Tensor) -> None:
        if self.limit_bytes and self._size + row.nbytes + ROW_OVERHEAD > self.limit_bytes:
            self._stop(f"teacher.store_limit_gb={self.limit_bytes / 1e9:g} is reached")
        if self.is_full:
            return
        if not self._buffer:
            self._buffer_since = time.monotonic()
        self._buffer[digest] = row.detach().to("cpu", copy=True).contiguous()
        self._buffer_bytes += row.nbytes
        self._size += row.nbytes + ROW_OVERHEAD
        self.counts.bytes_written += row.nbytes

    def _flush_if_due(self) -> None:
        is_late = self._buffer and time.monotonic() - self._buffer_since > FLUSH_SECONDS
        if (is_late or self._buffer_bytes >= SHARD_BYTES) and not self.is_full:
            self.flush()

    def _refresh(self) -> None:
        """Open the shards that were written since the last look."""
        for path in paths_in(self.rows):
            if path.name in self._shards:
                continue
            self._shards[path.name] = shard = open_shard(path)
            if shard is not None:
                for digest in shard.checksums:
                    self._shard_of.setdefault(digest, shard)

    def _row(self, digest: str) -> Tensor | None:
        if digest in self._buffer:
            return self._buffer[digest]
        while (shard := self._shard_of.get(digest)) is not None:
            if (row := shard.read(digest)) is not None:
                return row
            self.counts.bad += 1
            del shard.checksums[digest], self._shard_of[digest]
            for other in self._shards.values():  # it may have been written again
                if other and digest in other.checksums:
                    self._shard_of[digest] = other
        return None

    def _stop(self, why: str) -> None:
        if not self.is_full:
            log.warning("teacher cache: no more rows are written (%s); the teacher computes them each time", why)
        self.is_full = True

    # Beside the rows

    def save_head(self, stored: StoredHead) -> None:
        """Store the teacher's head and sizes."""
        head, softcap = stored.head, math.nan if stored.head.softcap is None else stored.head.softcap
        parts = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        parts["scale, softcap"] = torch.tensor([head.scale, softcap], dtype=torch.float64)
        parts["parameters, bytes"] = torch.tensor([stored.num_parameters, stored.num_bytes])
        try:
            write_shard(self.folder / HEAD, {k: v.detach().cpu().contiguous() for k, v in parts.items()})
        except REFUSALS as error:
            self._stop(str(error))
        self._write_json(self.folder / "teacher.json", {"name": self.name, **asdict(self.identity)})

    def load_answer(self, prompt: str) -> str | None:
        """Return the teacher's answer to a prompt, if it is here and whole."""
        about = read_json(self._answer_file(prompt))
        answer = str(about.get("answer"))
        return answer if about.get("checksum") == _sha256(prompt + answer) else None

    def save_answer(self, prompt: str, answer: str) -> None:
        self._write_json(self._answer_file(prompt), {"answer": answer, "checksum": _sha256(prompt + answer)})

    def _answer_file(self, prompt: str) -> Path:
        return self.folder / "answers" / f"{_sha256(prompt)[:16]}.json"

    def _write_json(self, file: Path, about: dict[str, str]) -> None:
        try:
            write_beside(file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            self._stop(str(error))


def open_store(
    config: TeacherConfig, identity: Identity, rows: Sequence[Row], *, is_repeated: bool, owner: str
) -> tuple[TeacherStore | None, str]:
    """Open the store for the rows that a run will ask for → the store or None, and where it is, or why off, in words.

    is_repeated: whether this run or others of its sweep ask for a row twice. Raises MachineError if the store must be
    on, and there is no room or it cannot be written.
    """
    if config.store == "off" or (config.store == "auto" and not is_repeated):
        return None, "off" if config.store == "off" else "off (one epoch: nothing to reuse)"
    root = at_home(config.store_dir, "teacher.store_dir").resolve()
    limit, name = config.store_limit_gb and config.store_limit_gb * 1e9, config.base_model or config.path or ""
    store = TeacherStore(root, identity, name=name, owner=owner, limit_bytes=limit)
    counted = {row.digest: row.num_counted for row in rows}
    missing = store.missing(list(counted))
    shape, itemsize = load_config(config, "teacher").get_text_config(), DTYPES[identity.dtype].itemsize
    grows = sum(counted[digest] * shape.hidden_size * itemsize + ROW_OVERHEAD for digest in missing)
    if not (store.folder / HEAD).exists():
        grows += shape.vocab_size * shape.hidden_size * itemsize
    may_take, free = room(root)
    fault = ""
    if grows > may_take:
        fault = f"needs {grows:,} bytes in {root}, {free:,} are free and a tenth of the disk is left to others"
    elif grows:
        with suppress(OSError):
            store.rows.mkdir(parents=True, exist_ok=True)
        fault = "" if os.access(store.rows, os.W_OK) else f"cannot be written in {root}"
    if fault and config.store == "on":
        raise MachineError("teacher.store", fault, "Free space, set teacher.store_dir=..., or use teacher.store=off")
    words = f"{len(counted) - len(missing):,} of {len(counted):,} rows in {store.folder}"
    words += f", {in_bytes(grows)} to be written ({in_bytes(free)} free)" if grows else ""
    return (None, f"off (it {fault})") if fault else (store, words)


def write_shard(path: Path, rows: dict[str, Tensor], replaces: Sequence[str] = ()) -> None:
    """Write tensors by name to a file, whole or not there. Raises OSError or SafetensorError."""
    metadata = {name: checksum(name, row) for name, row in rows.items()}
    with whole_file(path) as beside:
        save_file(rows, beside, metadata | ({"replaces": " ".join(replaces)} if replaces else {}))
        open_to_umask(beside)


def checksum(name: str, tensor: Tensor) -> str:
    """Return a checksum of a tensor's name, dtype, shape and bytes."""
    digest = xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(memoryview(tensor.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def open_shard(path: Path) -> Shard | None:
    """Open a shard; None if it was compacted since the folder was listed, or if it is damaged, which is logged."""
    try:
        return Shard(path)
    except FileNotFoundError:
        return None
    except REFUSALS as error:
        log.warning("teacher cache: skipping the damaged file %s (%s)", path, error)
        return None


def load_head(folder: Path) -> StoredHead | None:
    """Load the head and sizes in a teacher's folder; None if they are not there or damaged."""
    shard = open_shard(folder / HEAD)
    parts = shard.whole_rows() if shard else {}
    if shard is None or len(parts) < shard.num_rows or "weight" not in parts:
        return None
    (scale, softcap), sizes = parts["scale, softcap"].tolist(), parts["parameters, bytes"].tolist()
    return StoredHead(Head(parts["weight"], parts.get("bias"), scale, None if math.isnan(softcap) else softcap), *sizes)


def count_rows(folder: Path, *, is_verify: bool) -> tuple[int, int]:
    """Count a teacher's rows and what is damaged: unless is_verify, only files that cannot be opened are."""
    num_rows = num_bad = 0
    for path in (*paths_in(folder / "rows"), folder / HEAD):
        if shard := open_shard(path):
            num_rows += shard.num_rows if path.name != HEAD else 0
            num_bad += shard.num_rows - len(shard.whole_rows()) if is_verify else 0
        else:
            num_bad += path.exists()
    return num_rows, num_bad


def compact(folder: Path) -> None:
    """Join small shards of a teacher, drop copies and what is damaged. Raises OSError or SafetensorError.

    Safe while others read and write: rows keep their bits, and a shard goes when its rows are on disk again.
    """
    rows = folder / "rows"
    seen: set[str] = set()
    batch: dict[str, Tensor] = {}
    sources: list[Shard] = []

    def rewrite() -> None:
        replaced = {name for shard in sources for name in (shard.path.name, *shard.replaces)}
        if batch:
            write_shard(rows / f"compact-{uuid.uuid4().hex}.safetensors", batch, sorted(replaced))
        for shard in sources:
            shard.path.unlink(missing_ok=True)
        batch.clear()
        sources.clear()

    for path in paths_in(rows):
        try:
            shard = Shard(path)
        except FileNotFoundError:  # another process compacts
            continue
        except SafetensorError:
            path.unlink(missing_ok=True)
            continue
        first = {digest: row for digest, row in shard.whole_rows().items() if digest not in seen}
        seen |= first.keys()
        if len(first) < shard.num_rows or _bytes(first) < SHARD_BYTES / 2:
            batch |= first
            sources.append(shard)
        if _bytes(batch) >= SHARD_BYTES:
            rewrite()
    if len(sources) > 1 or len(batch) < sum(shard.num_rows for shard in sources):
        rewrite()
    if load_head(folder) is None:
        (folder / HEAD).unlink(missing_ok=True)


def _bytes(rows: dict[str, Tensor]) -> int:
    return sum(row.nbytes for row in rows.values())


def paths_in(rows: Path) -> list[Path]:
    """Return a folder's shards; a file that begins with a dot is being written."""
    return sorted(rows.glob("[!.]*.safetensors"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
