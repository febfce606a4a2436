"""Keep a teacher's last hidden states at the counted positions, so that it runs once for every row.

    KEY/rows/UUID.safetensors   shards: rows [n, D] in the teacher's dtype by digest, their checksums as metadata
    KEY/head.safetensors        the teacher's head: with it hidden states give exact logits at any temperature
    KEY/said/UUID.safetensors   token ids of its answers to prompts
    KEY/teacher.json            which teacher this is; modified when it is used

KEY names what decides the answers (`Identity`). Any number of processes read and write, and any of them may be killed:
a shard appears whole under its name and never changes. A stored row keeps its bits: whoever computes it again, in
another batch, is given the stored ones, so a resumed run repeats the straight one exactly.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64

from kdx.causal_lm import DTYPES, Head, load_config
from kdx.config import TeacherConfig
from kdx.errors import MachineError
from kdx.run.files import in_bytes, open_to_umask, read_json, size_of, usage_of, whole_file, write_json

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20  # a writer's buffer is flushed when it holds so much,
FLUSH_SECONDS = 30.0  # or so long after the last flush: what a kill may cost
FREE_SHARE = 0.1  # of a disk that is left to others
HEAD = "head.safetensors"
REFUSALS = (OSError, SafetensorError)  # safetensors wraps a full disk in an error of its own


@dataclass(frozen=True)
class Identity:
    """What decides a teacher's answers."""

    teacher: str  # digest of its weights and tokenizer
    dtype: str
    quantization: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def precision(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.quantization}, {self.dtype}"


class Shard:
    """A file of named tensors with a checksum each, mapped into memory. Raises OSError or SafetensorError."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        metadata = self._file.metadata() or {}
        self.checksums = {name: metadata.get(name) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor | None:
        """Return a tensor as a view of the file, or None if it is damaged."""
        row = self._file.get_tensor(name)
        return row if checksum(name, row) == self.checksums[name] else None


class TeacherStore:
    """One teacher's folder in the store, as one process sees it."""

    def __init__(
        self, root: Path, identity: Identity, *, name: str = "", limit_gb: float | None = None, part: str = "rows"
    ) -> None:
        self.root, self.identity, self.name, self.limit_gb = root, identity, name, limit_gb
        self.folder, self.rows = root / identity.key, root / identity.key / part
        self.counts = {"hits": 0, "computed": 0, "bad": 0}  # rows read, computed by the teacher, found damaged
        self.is_full = False  # no more rows are written
        self._seen = set[Path]()
        self._shards_of = defaultdict[str, list[Shard]](list)  # by row digest
        self._buffer = dict[str, Tensor]()  # rows not yet on disk
        self._buffer_bytes, self._flushed_at = 0, time.monotonic()
        self._refresh()

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Return those rows that are not here, each once."""
        return [d for d in dict.fromkeys(digests) if not self._shards_of[d] and d not in self._buffer]

    def read(self, digests: Sequence[str]) -> list[Tensor] | None:
        """Return the rows of a micro-batch, or None if one is missing or damaged: then all are to be computed."""
        self._flush_if_due()
        if self.missing(digests):
            self._refresh()
        rows = [row for digest in digests if (row := self._row(digest)) is not None]
        if len(rows) < len(digests):
            return None
        self.counts["hits"] += len(rows)
        return rows

    def write(self, digests: Sequence[str], rows: Sequence[Tensor]) -> list[Tensor]:
        """Store rows [n, D] that the teacher computed → the rows as they are to be used.

        Those that are here already (duplicates, a half-filled store) are not replaced: the stored ones are returned.
        """
        self.counts["computed"] += len(rows)
        stored = []
        for digest, row in zip(digests, rows, strict=True):
            if (known := self._row(digest)) is None and not self.is_full:
                self._buffer[digest] = row.detach().to("cpu", copy=True).contiguous()
                self._buffer_bytes += row.nbytes
            stored.append(row if known is None else known)
        self._flush_if_due()
        return stored

    def flush(self) -> None:
        """Write the buffered rows as a shard."""
        if not self._buffer or self.is_full:
            return
        if self.limit_gb and size_of(self.root) + self._buffer_bytes > self.limit_gb * 1e9:
            return self._stop(f"teacher.store_limit_gb={self.limit_gb:g} is reached")
        with self._writing():
            write_shard(self.rows / f"{uuid.uuid4().hex}.safetensors", self._buffer)
            self._buffer, self._buffer_bytes, self._flushed_at = {}, 0, time.monotonic()
            self._refresh()

    def close(self) -> None:
        """Flush, and note when the store was used."""
        self.flush()
        with suppress(OSError):  # a store that can only be read
            os.utime(self.folder / "teacher.json")

    def save_head(self, head: Head, num_parameters: int) -> None:
        """Store the teacher's name, head and size."""
        about = {"name": self.name, **asdict(self.identity), "num_parameters": num_parameters}
        parts = {name: part for name, part in vars(head).items() if isinstance(part, Tensor)}
        with self._writing():
            write_json(self.folder / "teacher.json", about | {"scale": head.scale, "softcap": head.softcap})
            write_shard(self.folder / HEAD, {k: v.detach().cpu().contiguous() for k, v in parts.items()})

    def _flush_if_due(self) -> None:
        if self._buffer_bytes >= SHARD_BYTES or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def _refresh(self) -> None:
        """Open the shards that were written since the last look."""
        for path in sorted({*paths_in(self.rows)} - self._seen):
            self._seen.add(path)
            if shard := open_shard(path):
                for digest in shard.checksums:
                    self._shards_of[digest].append(shard)

    def _row(self, digest: str) -> Tensor | None:
        if digest in self._buffer:
            return self._buffer[digest]
        shards = self._shards_of[digest]
        while shards:
            if (row := shards[0].read(digest)) is not None:
                return row
            self.counts["bad"] += 1
            shards.pop(0)  # another shard may have it, written again
        return None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Stop writing when the disk is full or cannot be written; the run continues with the live teacher."""
        try:
            yield
        except REFUSALS as error:
            self._stop(f"{error}; {in_bytes(usage_of(self.root).free)} free")

    def _stop(self, why: str) -> None:
        if not self.is_full:
            log.warning("teacher cache: no more rows are written (%s); the teacher computes them each time", why)
        self.is_full = True


def open_store(
    config: TeacherConfig, identity: Identity, counted: dict[str, int], *, is_repeated: bool
) -> tuple[TeacherStore | None, str]:
    """Open the store for the rows that a run will ask for → the store or None, and where it is, or why off, in words.

    counted: digest → counted positions of these rows. is_repeated: whether this run or others of its sweep ask for a
    row twice. Raises MachineError if the store must be on and there is no room for it.
    """
    if config.store == "off" or (config.store == "auto" and not is_repeated):
        return None, "off" if config.store == "off" else "off (one epoch: nothing to reuse)"
    root = Path(config.store_dir).expanduser().resolve()
    name = str(config.base_model or config.path)
    store = TeacherStore(root, identity, name=name, limit_gb=config.store_limit_gb)
    missing = store.missing(list(counted))
    shape = load_config(config, "teacher").get_text_config()
    num_vectors = sum(counted[d] for d in missing) + (0 if (store.folder / HEAD).exists() else shape.vocab_size)
    grows = num_vectors * shape.hidden_size * DTYPES[identity.dtype].itemsize
    usage = usage_of(root)
    may_take = max(0, int(usage.free - FREE_SHARE * usage.total))
    if grows > may_take:
        fault = f"needs {in_bytes(grows)} in {root}, but may take {in_bytes(may_take)}: a tenth of the disk stays free"
        if config.store == "on":
            hint = "Free space, set teacher.store_dir=..., or use teacher.store=off"
            raise MachineError("teacher.store", fault, hint)
        return None, f"off (it {fault})"
    words = f"{len(counted) - len(missing):,} of {len(counted):,} rows in {store.folder}"
    return store, words + (f", {in_bytes(grows)} to be written ({in_bytes(usage.free)} free)" if grows else "")


def write_shard(path: Path, rows: dict[str, Tensor]) -> None:
    """Write tensors by name to a file, whole or not there. Raises OSError or SafetensorError."""
    with whole_file(path) as beside:
        save_file(rows, beside, {name: checksum(name, row) for name, row in rows.items()})
        open_to_umask(beside)


def checksum(name: str, tensor: Tensor) -> str:
    """Return a checksum of a tensor's name, dtype, shape and bytes."""
    digest = xxh3_64(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(memoryview(tensor.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def open_shard(path: Path) -> Shard | None:
    """Open a shard; None if it is damaged, which is logged."""
    try:
        return Shard(path)
    except REFUSALS as error:
        log.warning("teacher cache: skipping the damaged file %s (%s)", path, error)
        return None


def whole(path: Path) -> dict[str, Tensor] | None:
    """Read all tensors of a file; None if it is not there, or if it or one of them is damaged."""
    if not path.exists() or (shard := open_shard(path)) is None:
        return None
    tensors = {name: tensor for name in shard.checksums if (tensor := shard.read(name)) is not None}
    return tensors if len(tensors) == len(shard.checksums) else None


def load_head(folder: Path, device: torch.device | None = None) -> tuple[Head, int] | None:
    """Load a teacher's head and its number of parameters; None if they are not there or damaged."""
    about, parts = read_json(folder / "teacher.json"), whole(folder / HEAD)
    if parts is None or "num_parameters" not in about:
        return None
    tensors = {name: tensor.to(device=device) for name, tensor in parts.items()}
    return Head(**tensors, scale=about["scale"], softcap=about["softcap"]), about["num_parameters"]


def count_rows(folder: Path) -> int:
    return sum(len(shard.checksums) for path in paths_in(folder / "rows") if (shard := open_shard(path)))


def damaged_files(folder: Path) -> list[Path]:
    """List the files of a teacher's rows and head that cannot be opened, or in which a checksum is wrong."""
    return [path for path in (*paths_in(folder / "rows"), folder / HEAD) if path.exists() and whole(path) is None]


def paths_in(rows: Path) -> list[Path]:
    """Return a folder's shards; a file that begins with a dot is being written."""
    return sorted(rows.glob("[!.]*.safetensors"))
