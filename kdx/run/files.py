"""Files that are whole or not there: written beside and renamed, told by their digests, sealed with a manifest."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from kdx.errors import MachineError

MANIFEST = "MANIFEST.json"  # size and sha256 of every other file, written last: with it a folder is whole
FREE_SHARE = 0.1  # of a disk that is left to others


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write a file at, beside its own, which it gets when all went well; else nothing is left.

    Raises OSError.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary(file)
    try:
        yield beside
        fsync(beside)
        os.replace(beside, file)
        fsync(file.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path, *, is_sealed: bool = False) -> Iterator[Path]:
    """The same for a new folder of files, in place of what has its name; with a manifest if it is sealed."""
    beside = temporary(folder)
    try:
        beside.mkdir(parents=True)
        yield beside
        open_to_umask(*(path for path in beside.iterdir() if path.is_file()))
        seal(beside) if is_sealed else sync(beside)
        put(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_beside(file: Path, text: str | bytes) -> None:
    """Write a whole file or none, and have the disk keep it. Raises OSError; nothing is left beside it then."""
    with whole_file(file) as beside:
        beside.write_bytes(text.encode() if isinstance(text, str) else text)


def write_over(file: Path, text: str) -> None:
    """Write into the blocks that a short file has already: what is left to do on a full disk. Raises OSError."""
    with file.open("r+b") as old:
        old.write(text.encode())
        old.truncate()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none or it is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(file: Path) -> Any:
    """What a YAML file says; None if it is damaged, or emptied, or no file. Raises OSError."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: not UTF-8, or a day that no month has
        return None


def local_time() -> str:
    """Now, to the second and with its zone, as records of a run have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def temporary(path: Path) -> Path:
    """A name beside a path that no other process uses."""
    return path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")


def digest_of(path: str | Path) -> str:
    """A sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Where kdx keeps what it can make again: $KDX_CACHE, by default ~/.cache/kdx."""
    return Path(os.environ.get("KDX_CACHE") or "~/.cache/kdx").expanduser()


def known_digest(file: Path) -> str:
    """A file's digest, taken again when anything about the file changed: ctime changes even if mtime is put back."""
    stat = file.stat()
    about = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}:{stat.st_dev}"
    kept = cache_dir() / "digests" / hashlib.sha256(about.encode()).hexdigest()[:32]
    if kept.is_file() and len(known := kept.read_text(encoding="ascii")) == 64:
        return known
    digest = digest_of(file)
    with contextlib.suppress(OSError):  # it is only a shortcut
        write_beside(kept, digest)
    return digest


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files, and have the disk keep all of it. Raises OSError."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    manifest = {p.name: {"size": p.stat().st_size, "sha256": digest_of(p)} for p in files}
    (folder / MANIFEST).write_text(_signed(manifest), encoding="utf-8")
    sync(folder)


def _signed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, with a digest of itself: damage in it is not taken for damage of a file."""
    own = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, MANIFEST: {"sha256": own}}, indent=2)


def verify(folder: Path) -> str | None:
    """Compare a sealed folder with its manifest → what is wrong, or None."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if not manifest.pop(MANIFEST, None) or not manifest or text != _signed(manifest):
            return f"{MANIFEST} is damaged (not as it was written)"
        for name, wanted in manifest.items():
            file = folder / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != wanted["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {wanted['size']}"
            if digest_of(file) != wanted["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def fsync(path: Path) -> None:
    """Have the disk keep a file, or a folder's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(folder: Path) -> None:
    """Have the disk keep a folder's files, and the list of them. Raises OSError."""
    for path in [*folder.iterdir(), folder]:
        fsync(path)


def put(beside: Path, folder: Path) -> None:
    """Give a folder that is whole its name, in place of what has it, and have the disk keep that. Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    fsync(folder.parent)


def usage_of(path: Path) -> Any:
    """Total, used and free bytes of the disk that a path is on, or would be."""
    return shutil.disk_usage(next(there for there in (path, *path.absolute().parents) if there.exists()))


def room(path: Path) -> tuple[int, int]:
    """Bytes that a cache may take on its disk, a tenth of which is left to others; and bytes free."""
    usage = usage_of(path)
    return max(0, int(usage.free - FREE_SHARE * usage.total)), usage.free


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, which others may be writing and removing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def in_bytes(number: float) -> str:
    """Write a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def reserve(folder: Path, num_bytes: int) -> IO[bytes]:
    """Hold room on a folder's disk until what this returns is closed, or the process ends. Raises OSError.

    It is a file without a name, so that no kill leaves it behind.
    """
    held = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by whoever asked
    try:
        if num_bytes and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(held.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EFBIG):  # it cannot, or files have a limit
            held.close()
            raise
    return held


def of_disk(error: OSError, folder: Path | str) -> MachineError:
    """What to say if a disk is full or refuses. folder: where that was, if the error does not say."""
    place, what, mend = str(error.filename or folder), error.strerror or "cannot be written", "Choose another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, mend = f"{what} ({usage_of(Path(place)).free:,} bytes free)", "Free room, or choose another folder"
    return MachineError(place, what, mend)


def open_to_umask(*files: Path) -> None:
    """Give files the mode that any new file gets: safetensors makes its own private, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)
