"""Files and folders that are whole or not there: written under a temporary name, fsynced, renamed."""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

FREE_SHARE = 0.1  # of a disk that is left to others
MANIFEST = "MANIFEST.json"  # size and xxhash of every other file of a checkpoint


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `file` on success; on an error nothing is left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    path = temporary(file)
    try:
        yield path
        fsync(path)
        os.replace(path, file)
        fsync(file.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, once no other process does."""
    from filelock import BaseFileLock, FileLock, SoftFileLock  # not for whoever only asks what is done

    lock: BaseFileLock = FileLock(file)
    try:
        lock.acquire()
    except OSError:  # NFS, mounted without locks: a file that is there as long as its process lives
        lock = SoftFileLock(f"{file}.soft")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def whole_folder(folder: Path, *, is_sealed: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` on success, replacing what was there.

    is_sealed: add a manifest, so that `verify` can tell damage.
    """
    path = temporary(folder)
    try:
        path.mkdir(parents=True)
        yield path
        files = [file for file in path.iterdir() if file.is_file()]
        open_to_umask(*files)
        if is_sealed:
            manifest = {file.name: {"size": file.stat().st_size, "xxh3": digest_of(file)} for file in sorted(files)}
            (path / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for part in [*path.iterdir(), path]:
            fsync(part)
        remove(folder)
        os.replace(path, folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def write_beside(file: Path, text: str | bytes) -> None:
    """Write a whole file, or raise OSError and leave the old one."""
    with whole_file(file) as path:
        path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_json(file: Path, value: Any) -> None:
    write_beside(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty dict if the file is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def verify(folder: Path) -> str | None:
    """Compare a sealed folder with its manifest → what is wrong, or None."""
    manifest = read_json(folder / MANIFEST)
    if not manifest:
        return f"{MANIFEST} is missing or damaged"
    for name, expected in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected.get("size"):
            return f"{name} has {file.stat().st_size} bytes instead of {expected.get('size')}"
        if digest_of(file) != expected.get("xxh3"):
            return f"{name} is damaged (its checksum differs)"
    return None


def digest_of(file: Path) -> str:
    """Hash a file's content (xxh3, 128 bits, in hex)."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Return the folder of what kdx can make again: $KDX_CACHE, by default ~/.cache/kdx."""
    return Path(os.environ.get("KDX_CACHE") or "~/.cache/kdx").expanduser()


def temporary(path: Path) -> Path:
    """Return a unique name beside a path."""
    return path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")


def remove(folder: Path) -> None:
    """Remove a folder so that a kill leaves no half of it under its name."""
    if folder.is_dir():
        path = temporary(folder)
        os.replace(folder, path)
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing or removing in a folder."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_time() -> str:
    """Return the time, to the second and with its zone, as records of a run have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def usage_of(path: Path) -> Any:
    """Return total, used and free bytes of the disk that a path is on, or would be."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))


def room(path: Path) -> tuple[int, int]:
    """Return the bytes that a cache may take on its disk, a tenth of which is left to others, and the bytes free."""
    usage = usage_of(path)
    return max(0, int(usage.free - FREE_SHARE * usage.total)), usage.free


def size_of(folder: Path) -> int:
    """Sum the bytes of all files in a folder, which others may be writing and removing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def in_bytes(number: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def open_to_umask(*files: Path) -> None:
    """Give files the mode of any new file: safetensors creates them private, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)
