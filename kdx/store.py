"""What is kept of teachers, so that each is asked once: a folder for each, named by what decides its answers.

    KEY/teacher.json · head.safetensors     all that is needed of the teacher when every row is here
    KEY/use.json                            when it was last asked, and how fast it is
    KEY/rows/                               its last hidden states at the counted positions of each row (segments.py)
    KEY/answers/ · certificate.json         its answers to prompts; how exact the rows are
    students/DIGEST-LAYERS/                 students cut from a teacher, as model folders

Rows are kept in the dtype the teacher computed in: 2·width bytes a token in bf16. With the head they give its exact
logits at any temperature, for any divergence.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdx.causal_lm import Head
from kdx.errors import ConfigError
from kdx.run.files import digest_of, local_time, open_to_umask, read_json, usage_of, whole_file, write_beside
from kdx.segments import HEADER_SIZE, Segments

log = logging.getLogger(__name__)

LEFT_FREE = 0.1  # share of the disk that is left to others


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
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_saved: float = 0.0  # of the teacher's time, at the speed it was measured at


@dataclass(frozen=True)
class Kept:
    """What is known of a teacher without loading its body."""

    head: Head
    num_parameters: int
    num_bytes: int


class TeacherStore:
    """One teacher's folder in the store."""

    def __init__(
        self, root: Path, identity: Identity, *, name: str, owner: str = "run", limit_bytes: float | None = None
    ) -> None:
        self.root, self.identity, self.name, self.limit_bytes = root, identity, name, limit_bytes
        self.folder = root / identity.key
        for part in (self.folder, self.folder / "rows", self.folder / "answers", root / "students"):
            if not part.resolve().is_relative_to(root.resolve()):
                what = f"{part} is a link out of it, to {part.resolve()}"
                raise ConfigError("teacher.store_dir", what, "Remove the link, or choose another folder")
        self.rows = Segments(self.folder / "rows", owner)
        self.counts = Counts()
        self.is_full = False
        self.seconds_per_position: float | None = read_json(self.folder / "use.json").get("seconds_per_position")
        self._size = size_of(root) if limit_bytes is not None else 0  # a walk over all files: only for the limit

    # The rows

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Which of these rows are not here."""
        return [digest for digest in dict.fromkeys(digests) if _key(digest) not in self.rows]

    def read(self, digests: Sequence[str]) -> list[Tensor] | None:
        """Read the rows of a batch, or None if one is missing: then all of it is to be computed, in one layout."""
        if self.missing(digests):
            self.rows.refresh()
            if self.missing(digests):
                return None
        found = [self.rows.read(_key(digest)) for digest in digests]
        kept = [row for row in found if row is not None]
        if len(kept) < len(found):
            return None
        self.counts.hits += len(kept)
        self.counts.from_others += sum(not self.rows.is_own(_key(digest)) for digest in digests)
        self.counts.bytes_read += sum(row.nbytes for row in kept)
        self.counts.seconds_saved += sum(len(row) for row in kept) * (self.seconds_per_position or 0.0)
        return kept

    def peek(self, digests: Sequence[str]) -> list[Tensor] | None:
        """Read rows without counting them."""
        found = [self.rows.read(_key(digest)) for digest in digests]
        return None if any(row is None for row in found) else found  # type: ignore[return-value]

    def write(self, digests: Sequence[str], rows: Sequence[Tensor], seconds: float) -> None:
        """Keep what the teacher computed; a full disk ends the writing with one warning, and nothing else."""
        self.counts.computed += len(rows)
        if num_positions := sum(len(row) for row in rows):
            speed = seconds / num_positions
            self.seconds_per_position = min(speed, self.seconds_per_position or speed)
        for digest, row in zip(digests, rows, strict=True):
            if self.is_full or _key(digest) in self.rows:
                continue
            if self.limit_bytes is not None and self._size + row.nbytes + HEADER_SIZE > self.limit_bytes:
                self._stop(f"teacher.store_limit_gb={self.limit_bytes / 1e9:g} is reached")
                continue
            try:
                written = self.rows.append(_key(digest), row)
            except OSError as error:
                self._stop(f"{error.strerror}: {shutil.disk_usage(self.root).free / 1e9:.2f} GB are free")
                continue
            self.counts.bytes_written += written
            self._size += written

    def _stop(self, why: str) -> None:
        if self.is_full:
            return
        self.is_full = True
        log.warning("the teacher's store takes no more rows (%s); the run goes on with the live teacher", why)

    def close(self) -> None:
        """Have the disk keep what was written."""
        try:
            self.rows.close()
        except OSError as error:
            log.warning("the teacher's store could not be closed: %s", error.strerror)
        if self.counts.hits or self.counts.computed:
            with suppress(OSError):  # a store that is only read
                about = {
                    "used": local_time(),
                    "seconds_per_position": self.seconds_per_position,
                }
                write_beside(self.folder / "use.json", json.dumps(about))

    def check_writable(self) -> None:
        """Raise OSError if nothing can be written here."""
        probe = self.folder / "rows" / ".tmp-probe"
        write_beside(probe, "")
        probe.unlink(missing_ok=True)

    # What else is kept

    def has_head(self) -> bool:
        """Whether the head of the teacher is here and whole."""
        try:
            return head_is_whole(self.folder)
        except OSError:
            return False

    def kept(self) -> Kept | None:
        """The head and sizes of the teacher, if they are here and whole."""
        file = self.folder / "head.safetensors"
        try:
            if not head_is_whole(self.folder):
                return None
            tensors = load_file(file)
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["about"])
            head = Head(tensors["weight"], tensors.get("bias"), about["scale"], about["softcap"])
            return Kept(head, about["num_parameters"], about["num_bytes"])
        except (OSError, SafetensorError, KeyError):  # replaced or removed meanwhile
            return None

    def keep(self, kept: Kept) -> None:
        """Keep the head and sizes of the teacher."""
        head, file = kept.head, self.folder / "head.safetensors"
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        sizes = {"num_parameters": kept.num_parameters, "num_bytes": kept.num_bytes}
        about = {"scale": head.scale, "softcap": head.softcap} | sizes  # in the same file, under the same digest
        try:
            with whole_file(file) as beside:
                tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                save_file(tensors, beside, {"about": json.dumps(about)})
                digest = digest_of(beside)
                open_to_umask(beside)
        except (OSError, SafetensorError) as error:
            self._stop(str(error))
            return
        self._write(self.folder / "teacher.json", {"name": self.name, **asdict(self.identity), "head_sha256": digest})

    def answer(self, prompt: str) -> str | None:
        """The teacher's answer to a prompt, if it is here."""
        try:
            kept = json.loads(self._answer_file(prompt).read_text(encoding="utf-8"))
            return str(kept["answer"]) if kept["sha256"] == _sha256(prompt + kept["answer"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_answer(self, prompt: str, answer: str) -> None:
        self._write(self._answer_file(prompt), {"answer": answer, "sha256": _sha256(prompt + answer)})

    def _answer_file(self, prompt: str) -> Path:
        return self.folder / "answers" / f"{_sha256(prompt)[:16]}.json"

    def certificate(self) -> dict[str, Any] | None:
        """How far the rows are from the live teacher, if that was measured."""
        return read_json(self.folder / "certificate.json") or None

    def certify(self, certificate: dict[str, Any]) -> None:
        self._write(self.folder / "certificate.json", certificate)

    def student_folder(self, layers: int | list[int]) -> Path:
        """Where a student cut from this teacher is kept."""
        which = str(layers) if isinstance(layers, int) else _sha256(json.dumps(layers))[:8]
        return self.root / "students" / f"{self.identity.weights[:16]}-{which}"

    def _write(self, file: Path, value: Any) -> None:
        try:
            write_beside(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            self._stop(str(error))


def bytes_of(num_positions: int, num_rows: int, width: int, itemsize: int) -> int:
    """How big the rows of a run will be in the store."""
    return num_positions * width * itemsize + num_rows * HEADER_SIZE


def room(root: Path) -> tuple[int, int]:
    """Bytes that the store may take on its disk, a tenth of which is left to others; and bytes free."""
    usage = usage_of(root)
    return max(0, int(usage.free - LEFT_FREE * usage.total)), usage.free


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, which others may be writing and removing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def head_is_whole(folder: Path) -> bool:
    """Whether a teacher's folder has its head, and it is what was written."""
    file = folder / "head.safetensors"
    return file.is_file() and digest_of(file) == read_json(folder / "teacher.json").get("head_sha256")


def _key(digest: str) -> bytes:
    return bytes.fromhex(digest)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
