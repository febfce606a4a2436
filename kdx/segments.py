"""Rows of numbers in append-only files, written and read by any number of processes at once.

A segment is a file that one process alone appends to; everyone reads all. A row is a header and a tensor [n, D]. The
header has a checksum of its own, so that its lengths can be trusted, and one of the whole row, compared at every
read: a kill or damage at any moment leaves a row that is missing, never one that is wrong.

Rows are read with plain reads, not mmap: what cannot be read is then an error to handle and not SIGBUS, and what was
read does not count as the process's resident memory.
"""

import fcntl
import hashlib
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdx.run.files import fsync, temporary

MAGIC = b"kdx-row1"
KEY_SIZE = 16
FIELDS = struct.Struct(f"<8s{KEY_SIZE}sIIB3x32s")  # magic, key, n, D, number of the dtype, sha256 of the rest and rows
HEADER_SIZE = FIELDS.size + 4  # and the crc32 of those fields
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SYNC_BYTES = 64 * 2**20  # written between two fsyncs: what a power cut may cost
SEARCHED = 1 << 20  # bytes read at once where a damaged header hides where the next row begins
MOST_OPEN = 64  # segments held open for reading: a store may have more than a process may have descriptors
NO_LIMIT = 2**63


class Place(NamedTuple):
    """Where a row lies."""

    segment: str
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    checksum: bytes

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + HEADER_SIZE + self.num_bytes


class Segments:
    """The rows in a folder by key. `owner` names who writes: its segments are told from others' by their names."""

    def __init__(self, folder: Path, owner: str) -> None:
        self.folder, self.owner = folder, owner
        self.num_bad = 0
        self._places: dict[bytes, Place] = {}
        self._spare: dict[bytes, list[Place]] = {}  # further copies, should the first be damaged
        self._scanned: dict[str, int] = {}
        self._files: dict[str, int] = {}  # open descriptors
        self._limits: dict[str, int] = {}  # of the owner's earlier segments: what lies beyond is forgotten
        self._own = f"{owner}-{uuid.uuid4().hex[:12]}.rows"
        self._writing: int | None = None
        self._unsynced = 0
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Take note of what others have written since the last look."""
        for name, size in self._sizes("*.rows").items():
            size = min(size, self._limits.get(name, NO_LIMIT))
            if size > self._scanned.get(name, 0):
                with suppress(OSError):  # removed meanwhile
                    self._scan(name, size)

    def _sizes(self, pattern: str) -> dict[str, int]:
        sizes = {}
        for file in sorted(self.folder.glob(pattern)):
            with suppress(FileNotFoundError):  # removed meanwhile
                sizes[file.name] = file.stat().st_size
        return sizes

    def _scan(self, name: str, size: int) -> None:
        for key, place in rows_of(self._open(name), name, self._scanned.get(name, 0), size):
            self._scanned[name] = place.end
            if key in self._places:
                self._spare.setdefault(key, []).append(place)
            else:
                self._places[key] = place

    def read(self, key: bytes) -> Tensor | None:
        """Read a row, or None if it is not here or damaged (counted in num_bad)."""
        place = self._places.get(key)
        while place is not None:
            try:
                row = self._read(key, place)
                if row is not None:
                    return row
                self.num_bad += 1
            except FileNotFoundError:  # the segment was removed, not damaged: `compact` wrote its rows elsewhere
                pass
            others = self._spare.get(key, [])
            place = others.pop(0) if others else None
            if place is None:
                del self._places[key]
            else:
                self._places[key] = place
        return None

    def _read(self, key: bytes, place: Place) -> Tensor | None:
        """Read what lies at a place, or None if it is damaged. Raises FileNotFoundError."""
        try:
            data = bytearray(os.pread(self._open(place.segment), place.num_bytes, place.offset + HEADER_SIZE))
        except FileNotFoundError:
            raise
        except OSError:
            return None
        if len(data) != place.num_bytes or _checksum(key, place.shape, place.dtype, data) != place.checksum:
            return None
        if not data:  # which frombuffer refuses
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(data, dtype=place.dtype).view(place.shape)

    def is_own(self, key: bytes) -> bool:
        """Whether the row was written by this owner."""
        place = self._places.get(key)
        return place is not None and place.segment.startswith(f"{self.owner}-")

    def append(self, key: bytes, row: Tensor) -> int:
        """Write a row [n, D] → its bytes on disk. Raises OSError (a full disk), and leaves the segment whole."""
        row = row.detach().cpu().contiguous()
        data = row.view(torch.uint8).numpy().tobytes()
        shape = (row.shape[0], row.shape[1])
        fields = FIELDS.pack(
            MAGIC, key, *shape, DTYPES.index(row.dtype), checksum := _checksum(key, shape, row.dtype, data)
        )
        if self._writing is None:
            self._writing = self._create()
        offset = os.lseek(self._writing, 0, os.SEEK_END)
        try:
            _write(self._writing, fields + struct.pack("<I", zlib.crc32(fields)) + data)
            self._unsynced += HEADER_SIZE + len(data)
            if self._unsynced > SYNC_BYTES:
                self.sync()
        except OSError:
            os.ftruncate(self._writing, offset)
            raise
        place = Place(self._own, offset, shape, row.dtype, checksum)
        self._places[key] = place
        self._scanned[self._own] = place.end
        return HEADER_SIZE + len(data)

    def _create(self) -> int:
        """Make the own segment, locked for as long as it is written: `compact` leaves such a one alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = temporary(self.folder / self._own).with_suffix("")  # no one sees it before it is locked
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.rename(beside, self.folder / self._own)
        except OSError:
            os.close(descriptor)
            beside.unlink(missing_ok=True)
            raise
        return descriptor

    def sync(self) -> None:
        """Have the disk keep what was written."""
        if self._writing is not None and self._unsynced:
            os.fsync(self._writing)
            self._unsynced = 0

    def position(self) -> dict[str, int]:
        """How far the owner's segments reach, those of its other processes included: what a checkpoint keeps."""
        sizes = self._sizes(f"{self.owner}-*.rows")
        return {name: min(size, self._limits.get(name, NO_LIMIT)) for name, size in sizes.items()}

    def go_back(self, position: dict[str, int]) -> bool:
        """Forget what the owner wrote after a checkpoint → whether all is there that it had written before.

        A run that goes on computes those rows again, as it did the first time: the same batches, the same bits.
        """
        sizes = self._sizes(f"{self.owner}-*.rows")
        earlier = [name for name in sizes if name != self._own]
        self._limits = {name: position.get(name, 0) for name in earlier}
        self._places.clear()
        self._spare.clear()
        self._scanned.clear()
        self.refresh()
        return all(sizes.get(name, 0) >= size for name, size in position.items())

    def _open(self, name: str) -> int:
        if name not in self._files:
            if len(self._files) >= MOST_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[name] = os.open(self.folder / name, os.O_RDONLY)
        return self._files[name]

    def close(self) -> None:
        """Sync and let go of all files."""
        self.sync()
        for descriptor in [*self._files.values(), *([] if self._writing is None else [self._writing])]:
            os.close(descriptor)
        self._files.clear()
        self._writing = None


def rows_of(file: int, name: str, start: int, size: int) -> Iterator[tuple[bytes, Place]]:
    """Yield the rows between two offsets of a segment whose headers are whole; a damaged one is stepped over."""
    while start + HEADER_SIZE <= size:
        head = os.pread(file, HEADER_SIZE, start)
        fields = head[: FIELDS.size]
        if len(head) == HEADER_SIZE and head[:8] == MAGIC and zlib.crc32(fields) == struct.unpack("<I", head[-4:])[0]:
            _, key, n, width, dtype, checksum = FIELDS.unpack(fields)
            if dtype >= len(DTYPES):  # somebody made it: the header's own sum is right
                start = _next_magic(file, start + 1, size)
                continue
            place = Place(name, start, (n, width), DTYPES[dtype], checksum)
            if place.end > size:  # still being written, or cut short
                return
            yield key, place
            start = place.end
        else:
            start = _next_magic(file, start + 1, size)


def _next_magic(file: int, start: int, size: int) -> int:
    while start < size:
        data = os.pread(file, SEARCHED + len(MAGIC) - 1, start)
        if (at := data.find(MAGIC)) >= 0:
            return start + at
        start += SEARCHED
    return size


def _checksum(key: bytes, shape: tuple[int, int], dtype: torch.dtype, data: bytes | bytearray) -> bytes:
    digest = hashlib.sha256(key + struct.pack("<IIB", *shape, DTYPES.index(dtype)))
    digest.update(data)
    return digest.digest()


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it: one call may write less than asked."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Survey(NamedTuple):
    """What reading every row of a folder of segments found."""

    num_rows: int
    num_bytes: int
    num_bad: int  # rows whose numbers are damaged
    num_stray_bytes: int  # of no whole row: damaged headers, rows cut short; not a row that is being written


def survey(folder: Path, *, is_verify: bool = True) -> Survey:
    """Count the rows, and read and verify every one of them if asked to."""
    rows = total = bad = stray = 0
    for file in sorted(folder.glob("*.rows")):
        with suppress(FileNotFoundError), file.open("rb") as opened:  # removed meanwhile
            size = os.fstat(opened.fileno()).st_size
            is_written = not _locked(opened.fileno(), fcntl.LOCK_SH)
            total += size
            stray += size
            end = 0
            for key, place in rows_of(opened.fileno(), file.name, 0, size):
                rows, end = rows + 1, place.end
                stray -= place.end - place.offset
                if is_verify:
                    data = os.pread(opened.fileno(), place.num_bytes, place.offset + HEADER_SIZE)
                    bad += _checksum(key, place.shape, place.dtype, data) != place.checksum
            stray -= size - end if is_written else 0
    return Survey(rows, total, bad, stray)


def compact(folder: Path) -> int:
    """Write the whole rows of all segments that no process is writing into one, and remove those → bytes freed.

    Raises OSError (a full disk), and leaves everything as it was.
    """
    free: list[tuple[Path, int]] = []
    target = Segments(folder, "compact")
    try:
        for file in sorted(folder.glob("*.rows")):
            with suppress(FileNotFoundError):  # another process compacts as well
                descriptor = os.open(file, os.O_RDWR)
                if _locked(descriptor, fcntl.LOCK_EX) and os.fstat(descriptor).st_nlink:
                    free.append((file, descriptor))
                else:
                    os.close(descriptor)
        before = sum(os.fstat(descriptor).st_size for _, descriptor in free)
        after = 0
        kept: set[bytes] = set()
        try:
            for file, descriptor in free:
                for key, place in rows_of(descriptor, file.name, 0, os.fstat(descriptor).st_size):
                    if key not in kept and (row := target._read(key, place)) is not None:
                        after += target.append(key, row)
                        kept.add(key)
            target.sync()
            if kept:
                fsync(folder)
        except OSError:
            (folder / target._own).unlink(missing_ok=True)
            raise
        for file, _ in free:
            file.unlink(missing_ok=True)
        return before - after
    finally:
        target.close()
        for _, descriptor in free:
            os.close(descriptor)


def _locked(descriptor: int, how: int) -> bool:
    """Lock a segment until it is closed, if no process is writing it."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
