"""What a command finds itself in: its streams, its folder, the words it is given, and what a launcher says of it."""

import os
import select
import sys

from kdx.errors import ConfigError, MachineError

BROKEN_PIPE = 141  # what a shell says of a program that nobody reads any more


def open_streams() -> None:
    """Have all three streams be there, and write any text: a file that is opened later must not become stdout."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII locale has no ·, and a path may be no text


def check(argv: list[str]) -> None:
    """Refuse what no command can work in. Raises ConfigError or MachineError."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            told = ascii(word)[1:-1]
            raise ConfigError(told, "is not text in this locale", "Use one of UTF-8: export LC_ALL=C.UTF-8") from None
    try:
        os.getcwd()
    except FileNotFoundError:
        raise MachineError(".", "the folder you are in was removed", "Go to one that is there: cd ...") from None
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(name, f"is {value!r} in the environment, expected a number", f"Unset it: unset {name}")


def is_unread() -> bool:
    """Whether nobody reads standard output any more; it leads nowhere then, so that Python ends without a word."""
    poll = select.poll()
    poll.register(1, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return True
