"""What a user did wrong, where, and a hint.

Exit codes: 0 ok · 1 a bug in kdx · 2 the user's config or data · 3 the machine (disk, device, package, damaged file)
· 4 diverged · 5 some jobs of a sweep failed · 129/130/143 a signal, resumable.
"""

import argparse
import errno
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

MACHINE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR,
    errno.ENOTDIR,
)  # fmt: skip
MEMORY = (
    "Try, in this order: a lower train.micro_batch_size, train.gradient_checkpointing=true, train.precision=bf16, "
    "optim=adamw_8bit, adapter=lora, teacher.quantization=8bit, teacher.store=on (once filled, the teacher is not "
    "loaded). kdx check with the same arguments shows what fits"
)
NO_MEMORY = ("out of memory", "not enough memory", "cannot allocate memory", "can't allocate memory", "alloc_failed")
SHOWN = 20  # invalid rows that are printed; the rest are counted
SKIP = "Fix them, or set data.on_bad_row=skip, which leaves out at most data.max_bad_rows"


class KdxError(Exception):
    """An error that a user can cause and fix: one line, no traceback.

    where: the key as typed, or file:line. what: what is wrong there. hint: what to do about it.
    """

    exit_code = 2

    def __init__(self, where: str, what: str, hint: str) -> None:
        super().__init__(where, what, hint)  # all three, so that the error survives pickling between processes
        self.lines = [printable(f"{where}: {what}. {hint}", keep="")]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ConfigError(KdxError):
    """A key, a choice, a type or a range."""


class DataError(KdxError):
    """Rows that cannot be trained on."""


class ModelError(KdxError):
    """Weights, tokenizers or architectures that cannot be used."""


class MachineError(KdxError):
    """Something the machine lacks: a package, a device, room on the disk, an undamaged checkpoint."""

    exit_code = 3


class InUseError(MachineError):
    """A folder that another process is using."""


class DivergedError(KdxError):
    """A loss or gradient that is not finite."""

    exit_code = 4


class Parser(argparse.ArgumentParser):
    """A parser whose error is a user's error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, f"See {self.prog} --help")


def user_error(error: BaseException, folder: object = "disk") -> KdxError | None:
    """Return the KdxError for an error that a user can do something about: a full disk, no memory. None for a bug.

    folder: the place to name if an error of the disk does not name one.
    """
    if isinstance(error, KdxError):
        return error
    if isinstance(error, OSError) and error.errno in MACHINE:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "Free some space, or choose another folder" if is_full else "Choose another folder"
        return MachineError(str(error.filename or folder), error.strerror or "cannot be written", hint)
    return out_of_memory(error)


def out_of_memory(error: BaseException) -> MachineError | None:
    """Turn an out-of-memory error of the device or the host into a user's error. Return None for any other."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in text.lower() for words in NO_MEMORY):
        return None
    return MachineError("out of memory", text[:160].rstrip(".") or type(error).__name__, MEMORY)


def of_hub(error: BaseException, kind: type[KdxError], key: str, what: str, hint: str) -> KdxError:
    """Turn an error of a hub's client into a user's error: a MachineError if the network failed, else of this kind."""
    text = re.sub(r"\s+", " ", str(error)).partition(" Check your internet connection")[0]
    names, cause = set(re.findall(r"\w+", str(error))), error  # datasets names its cause only in its text
    while cause is not None:
        names |= {base.__name__ for base in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    is_network = bool(names & {"TransportError", "ConnectionError"}) and "OfflineModeIsEnabled" not in names
    return (MachineError if is_network else kind)(key, f"{what}: {text[:200].rstrip('. ')}", hint)


def together(errors: Sequence[KdxError]) -> KdxError:
    """Join errors of one kind into one that prints a line each, so that all can be fixed in one go."""
    first = errors[0]
    first.lines = list(dict.fromkeys(line for error in errors for line in error.lines))
    return first


def first_of(faults: Sequence[DataError], num_rows: int) -> KdxError:
    """Join faults of rows into one error that prints the first of them, a line each, and their number.

    num_rows: all that were read. Where all are invalid, a few lines tell why.
    """
    total, error = sum(len(fault.lines) for fault in faults), together(faults)
    if total > 1:
        shown = 3 if 0 < num_rows <= total else SHOWN
        more = f", first {shown} shown" if total > shown else ""
        error.lines[shown:] = [f"data: {total} invalid rows{more}. {SKIP}"]
    return error


def printable(text: str, keep: str = "\n\t\xa0\u200d") -> str:
    """Escape control characters, so that no row and no model's answer can control the terminal."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"


def one_line(error: BaseException | str) -> str:
    """Return a library's message on one line."""
    return shortened(" ".join(str(error).split())).rstrip(".")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: the nearest one, and all choices."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return (f"Did you mean {near[0]}? " if near else "") + f"Choices: {', '.join(known)}"
