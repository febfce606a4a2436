"""Jinja templates: sandboxed, and tried once under limits, since a template may loop or grow without end."""

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdx.errors import ConfigError, DataError
from kdx.files import kind_of

SECONDS = 2  # of processor time, so that a pause of the machine costs a template nothing
LONGEST = 10_000_000  # characters that one short row may become
MEMORY = 512 * 2**20  # bytes beyond those of this process
TOO_BIG = 1
PLAIN = re.compile(r"([^{]|\{\{ *\w+ *\}\})*")  # columns and text: nothing to try out

_passed: set[tuple[str, str]] = set()


class RowTemplate:
    """Text over a row's columns; `needs` are the names in it. Raises ConfigError if it is not Jinja or has no end."""

    def __init__(self, text: Any, key: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(key, f"is {kind_of(text)}", "Write Jinja over the row's columns, as in '{{ source }}'")
        self.text, self.key = text, key
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
        )
        try:
            self._try_out("compile", lambda: [str(environment.from_string(text))])  # it computes what is constant
            self._template: Template = environment.from_string(text)
            self.needs = meta.find_undeclared_variables(environment.parse(text))
        except TemplateError as error:
            raise ConfigError(key, f"is not Jinja: {error}", "Mend the template") from None

    def render(self, values: dict[str, Any], columns: Iterable[Any], where: str) -> str:
        """Fill the template with a row. Raises DataError."""
        self._try_out("render", lambda: [self._template.render(values)])
        try:
            return self._template.render(values)
        except Exception as error:  # it can divide by nothing, look into nothing, …: the template's or row's
            what = f"{self.key} cannot be filled: {str(error).rstrip('.')}; the columns are: {', '.join(map(str, columns))}"
            raise DataError(where, what, "Mend the template or the row") from None

    def _try_out(self, stage: str, texts: Callable[[], Iterable[str]]) -> None:
        fault = None if PLAIN.fullmatch(self.text) else fault_of(self.text, stage, texts)
        if fault:
            raise ConfigError(self.key, fault, "Mend the template")


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a value in it is null (allow for it: {{ name or '' }})")
    return value


def fault_of(template: str, stage: str, texts: Callable[[], Iterable[str]]) -> str | None:
    """What is wrong with a template's time or size, or None. It is tried once per stage, in a process of its own.

    texts: what it writes. What this raises is no matter here: it will raise again where it is used.
    """
    if (template, stage) in _passed or not hasattr(os, "fork"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none of them
        pid = os.fork()
    if pid == 0:
        code = TOO_BIG
        try:
            code = _limited(texts)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return f"takes more than {SECONDS} s for one short row"
    if code:
        return f"writes more than {LONGEST:,} characters, or takes more than {MEMORY >> 20} MB, for one short row"
    _passed.add((template, stage))
    return None


def _limited(texts: Callable[[], Iterable[str]]) -> int:
    """Render under limits, in a process that ends thereafter → its exit code."""
    import resource

    def limit(kind: int, most: int) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, SECONDS)  # ends also what never comes back to Python
    for number in (signal.SIGXCPU, signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(600)  # should it wait for a lock that a thread of the parent held
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        now = int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, now + MEMORY)
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (the process ends in a moment)
    nodes.Impossible.__init__ = _note_memory  # type: ignore[assignment, method-assign]
    try:
        return TOO_BIG if any(len(text) > LONGEST for text in texts()) else 0
    except MemoryError:
        return TOO_BIG
    except Exception:
        return 0


def _note_memory(*_: Any) -> None:
    """Jinja passes over what it cannot compute when it compiles; without these limits it would compute it."""
    if isinstance(sys.exc_info()[1], MemoryError):
        os._exit(TOO_BIG)
