"""Files and folders that are whole or not there: written under a temporary name, fsynced, renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash
from rich.filesize import decimal as in_bytes
from safetensors import SafetensorError

from kdx.errors import MachineError, out_of_memory

Lines = list[dict[str, Any]]  # those of a .jsonl file, or what becomes one


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file, or a folder, at; rename it to `file` on success, leave nothing on an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{file.name}")
    try:
        yield path
        for part in path.iterdir() if path.is_dir() else ():
            fsync(part)
        fsync(path)
        if path.is_dir():  # nothing can be renamed to a folder that has files
            remove(file)
        os.replace(path, file)
        fsync(file.parent)
    except BaseException:
        remove(path)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` on success, replacing what was there."""
    with whole_file(folder) as path:
        path.mkdir()
        yield path
        open_to_umask(*(file for file in path.iterdir() if file.is_file()))


@contextlib.contextmanager
def saving(what: str, path: Path) -> Iterator[None]:
    """Turn a failed write into a MachineError: torch and safetensors raise errors of their own for a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = f"cannot save {what}: {error} ({in_bytes(usage_of(path).free)} free)"
        hint = "Free some space, then run the same command again to resume"
        raise out_of_memory(error) or MachineError(str(path), problem, hint) from error


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, once no other process does."""
    from filelock import FileLock, SoftFileLock  # not for whoever only asks what is done

    try:
        held = FileLock(file).acquire()
    except OSError:  # NFS, mounted without locks: the file itself is the lock
        held = SoftFileLock(f"{file}.soft").acquire()
    with held:
        yield


def write_beside(file: Path, text: str) -> None:
    """Write a whole file, or raise OSError and leave the old one."""
    with whole_file(file) as path:
        path.write_text(text, encoding="utf-8")


def write_json(file: Path, value: Any) -> None:
    write_beside(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty dict if the file is missing or damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_beside(file, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> Lines:
    """Read a JSON object a line; nothing if there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def hash_json(value: Any, hashed: Callable[[bytes], str] = xxhash.xxh3_128_hexdigest) -> str:
    """Hash plain values: as JSON with sorted keys."""
    return hashed(json.dumps(value, sort_keys=True, default=str).encode())


def digest_of(file: Path) -> str:
    """Hash a file's content (xxh3, 128 bits, in hex)."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def cache_dir() -> Path:
    """Return the folder of what kdx can make again: $KDX_CACHE, by default ~/.cache/kdx."""
    return Path(os.environ.get("KDX_CACHE") or "~/.cache/kdx").expanduser()


def remove(path: Path) -> None:
    """Remove a file, or a folder so that a kill leaves no half of it under its name."""
    if path.is_dir():
        beside = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}")
        os.replace(path, beside)
        shutil.rmtree(beside, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usage_of(path: Path) -> Any:
    """Return total, used and free bytes of the disk that a path is on, or would be."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))


def size_of(folder: Path) -> int:
    """Sum the bytes of all files in a folder, which others may be writing and removing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def open_to_umask(*files: Path) -> None:
    """Give files the mode of any new file: safetensors creates them private, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)
