"""What a user did wrong, where, and the mend.

Exit codes: 0 ok · 1 a bug in kdx · 2 the user's config or data · 3 the machine (disk, device, package, damaged file)
· 4 diverged · 5 some jobs of a sweep failed · 129/130/143 a signal, resumable.
"""

import errno
import re
from collections.abc import Sequence
from difflib import get_close_matches

MACHINE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR,
    errno.ENOTDIR,
)  # fmt: skip


class KdxError(Exception):
    """An error that a user can cause and mend: one clear line each, no traceback.

    where: the key as typed, or file:line. what: what is wrong there. mend: what to do about it.
    """

    exit_code = 2

    def __init__(self, where: str, what: str, mend: str) -> None:
        assert where and what and mend, "a user's error says where, what and how to mend it"
        super().__init__(where, what, mend)  # all three, so that the error survives pickling between processes
        self.lines = [printable(f"{where}: {what}. {mend}", kept="")]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def printable(text: str, kept: str = "\n\t\xa0\u200d") -> str:
    """Show control characters as escapes: rows, files and answers may be an attacker's, and terminals obey them."""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


class ConfigError(KdxError):
    """A key, a choice, a type or a range."""


class DataError(KdxError):
    """Rows that cannot be trained on."""


class ModelError(KdxError):
    """Weights, tokenizers or architectures that cannot be used."""


class MachineError(KdxError):
    """What the machine lacks: a package, a device, room on the disk, an undamaged checkpoint."""

    exit_code = 3


class InUseError(MachineError):
    """A folder in which another process runs, or has just done what was asked."""


class DivergedError(KdxError):
    """A loss or gradient that is not finite."""

    exit_code = 4


MEMORY = (
    "In this order: lower train.micro_batch_size, train.gradient_checkpointing=true, train.precision=bf16, "
    "optim=adamw_8bit, teacher.quantization=8bit, teacher.store=on (once filled, the teacher is not loaded)"
)
NO_MEMORY = ("out of memory", "not enough memory", "cannot allocate memory", "can't allocate memory", "alloc_failed")

SHOWN = 20  # faults in rows that are printed; the rest are counted
SKIP = "Mend them, or set data.on_bad_row=skip"


def out_of_memory(error: BaseException) -> MachineError | None:
    """What to say if an error means that memory ran out, on a device or beside it; else None."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in text.lower() for words in NO_MEMORY):
        return None
    return MachineError("memory", f"ran out of memory ({text[:160].rstrip('.') or type(error).__name__})", MEMORY)


def of_hub(error: BaseException, kind: type[KdxError], key: str, what: str, mend: str) -> KdxError:
    """What to say where the hub gave nothing: the network is the machine's, a name the user's."""
    text = re.sub(r"\s+", " ", str(error)).partition(" Check your internet connection")[0]
    return (MachineError if _is_network(error) else kind)(key, f"{what}: {text[:200].rstrip('. ')}", mend)


def _is_network(error: BaseException | None) -> bool:
    """Whether a hub could not be reached, whichever of its client's libraries says so; not where it was not to be."""
    said, names = str(error), set[str]()  # datasets only says which error its own is of
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return bool(names & {"TransportError", "ConnectionError"}) and "OfflineModeIsEnabled" not in (
        *names,
        *re.findall(r"\w+", said),
    )


def together(errors: Sequence[KdxError]) -> KdxError:
    """Join errors of one kind into one that prints a line each, so that all are mended in one go."""
    first = errors[0]
    first.lines = list(dict.fromkeys(line for error in errors for line in error.lines))
    return first


def same_in_all(faults: Sequence[DataError]) -> Sequence[DataError]:
    """The faults of rows of which none is sound, as one if it is the same in all."""
    kinds = {(fault.args[1], fault.args[2]) for fault in faults}
    if len(kinds) > 1:  # of another type than wanted, each row's own value beside
        kinds = {(re.sub(r"( is an? [\w ]+?) \(.*\),", r"\1,", what), mend) for what, mend in kinds}
    if len(faults) < 3 or len(kinds) > 1:
        return faults
    ((what, mend),), where = kinds, faults[0].args[0]
    return [DataError(where, f"{what} (and so in all {len(faults):,} rows)", mend)]


def shortened(text: str, most: int = 300) -> str:
    """A text of any length, as far as a line holds it."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"


def first_of(faults: Sequence[DataError], mend: str) -> KdxError:
    """The first faults as one error, a line each, and how many there are."""
    total = sum(len(fault.lines) for fault in faults)
    error = together(faults)
    if total > 1:
        more = f", the first {SHOWN} shown" if total > SHOWN else ""
        error.lines[SHOWN:] = [f"data: {total} faults{more}. {mend}"]
    return error


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A mend for a name that is not known: the nearest one, and the choices where they are few."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{hint}Choices: {', '.join(known)}" if len(known) <= 24 else hint or "See `python -m kdx --cfg job`"


def exit_code(error: BaseException) -> int:
    """What a process ends with that this error ends."""
    if isinstance(error, KdxError):
        return error.exit_code
    is_machines = (isinstance(error, OSError) and error.errno in MACHINE) or out_of_memory(error)
    return MachineError.exit_code if is_machines else 1
