"""Jinja templates: sandboxed, and rendered in processes under limits, since a template may loop or grow without end.

What is bounded is each row: its processor time, the memory it takes, and what is written beyond what was said. A plain
template is rendered in place, unless a conversation is long. Without /proc (macOS) memory is bounded only by what can
be filled in that time, without fork (Windows) nothing is.
"""

import ctypes
import gc
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdx.data.files import kind_of
from kdx.errors import ConfigError, DataError
from kdx.run.signals import STOPS

SECONDS = 2  # of processor time for a row, so that a pause of the machine costs a template nothing
LONGEST = 10_000_000  # characters that a row may become beyond what is said in it
MEMORY = 512 * 2**20  # bytes beyond those of this process
STUCK = 600  # seconds after which a row waits for a lock that a thread of this process held
TOGETHER = 4096  # rows that one process renders
TOO_BIG, BROKEN = 1, 2
FAILED = "\n"  # a reply: neither a value of JSON nor a DataError
# Of a plain template: what writes or chooses, and what makes of a text nothing longer.
PLAIN = {
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.If, nodes.CondExpr, nodes.Compare,
    nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Test,
}  # fmt: skip
FILTERS = {"trim", "length", "upper", "lower"}
LOOP = nodes.Name("loop", "load")
METHODS = {"strip", "lstrip", "rstrip", "startswith", "endswith"}

_passed: set[str] = set()


class Unbounded(Exception):
    """What a template does without end, and the item that it does it for."""

    def __init__(self, what: str, item: Any) -> None:
        super().__init__(what)
        self.item = item


class RowTemplate:
    """Text over a row's columns; `needs` are the names in it. Raises ConfigError if it is not Jinja or has no end.

    render is to be called under the limits of `each`, unless the template is plain.
    """

    def __init__(self, text: Any, key: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(key, f"is {kind_of(text)}", "Write Jinja over the row's columns, as in '{{ source }}'")
        self.key, self.is_plain = key, is_plain(text, may_loop=False)
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
        )
        try:
            if not self.is_plain:
                fault = fault_of(f"row {text}", lambda: _compiled(environment, text))
                if fault:
                    raise ConfigError(key, fault, "Mend the template")
            self._template: Template = environment.from_string(text)
            self.needs = meta.find_undeclared_variables(environment.parse(text))
        except TemplateError as error:
            raise ConfigError(key, f"is not Jinja: {error}", "Mend the template") from None

    def render(self, values: dict[str, Any], columns: Iterable[Any], where: str) -> str:
        """Fill the template with a row. Raises DataError."""
        try:
            return bounded(self._template.render(values), values.values())
        except MemoryError:
            raise
        except Exception as error:  # it can divide by nothing, look into nothing, …: the template's or row's
            what = f"{self.key} cannot be filled: {str(error).rstrip('.')}; the columns are: {', '.join(map(str, columns))}"
            raise DataError(where, what, "Mend the template or the row") from None


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a value in it is null (allow for it: {{ name or '' }})")
    return value


def bounded(text: str, said: Iterable[Any]) -> str:
    """What a template made of what is said, unless it is far longer. Raises MemoryError, as under the other limits."""
    if len(text) > LONGEST + sum(len(part) for part in said if isinstance(part, str)):
        raise MemoryError
    return text


def _compiled(environment: Environment, text: str) -> None:
    """Compile a template, which computes what is constant in it. Raises MemoryError."""
    bounded(str(environment.compile(text, raw=True)), ())


def is_plain(text: Any, *, may_loop: bool = True) -> bool:
    """Whether a template only writes its parts, once or once for each message of a row.

    So it cannot grow without end, but may write all messages for each of them.
    """
    try:
        tree = Environment().parse(text) if isinstance(text, str) else None
        return tree is not None and (may_loop or tree.find(nodes.For) is None) and _is_plain(tree)
    except (TemplateError, RecursionError):  # or it has tags of transformers' own
        return False


def _is_plain(node: nodes.Node, *, is_looped: bool = False, is_kept: bool = False) -> bool:
    match node:
        case nodes.For(
            iter=nodes.Name(name="messages") | nodes.Getitem(node=nodes.Name(name="messages"), arg=nodes.Slice())
        ):
            allowed, is_looped = not is_looped and not node.recursive, True
        case nodes.Assign(target=nodes.Name(name=name)):
            allowed, is_kept = name != "messages", True
        case nodes.Add() | nodes.Concat():
            allowed = not is_kept  # x = x + x, forty times
        case nodes.Mod():
            allowed = is_looped and isinstance(node.left, nodes.Getattr) and node.left.node == LOOP  # '%9999d' % 1
        case nodes.Filter():
            allowed = node.name in FILTERS
        case nodes.Call(node=nodes.Name(name="raise_exception")):
            allowed = True
        case nodes.Call(node=nodes.Getattr(attr=name)):
            allowed = name in METHODS
        case _:
            allowed = type(node) in PLAIN
    return allowed and all(_is_plain(n, is_looped=is_looped, is_kept=is_kept) for n in node.iter_child_nodes())


def fault_of(template: str, work: Callable[[], str | None]) -> str | None:
    """What is wrong with the time or size of work with a template, or what that work says of it; tried once."""
    if template in _passed:
        return None
    try:
        fault: Any
        ((_, fault),) = each(lambda _: work(), [None])
    except Unbounded as unbounded:
        return f"{unbounded} for one short row"
    if fault is None:
        _passed.add(template)
    return fault and str(fault)


def each(
    function: Callable[[Any], Any], items: Iterable[Any], *, is_plain: bool | Callable[[Any], bool] = False
) -> Iterator[tuple[Any, Any | DataError]]:
    """Yield each item and what a function makes of it (values of JSON), or the DataError that it raises.

    The function is called in a process of its own, under limits for each item, unless what it does is plain, or is so
    for all of many items. Raises Unbounded at the first item that does not keep to them.
    """
    if is_plain is True or not hasattr(os, "fork"):
        yield from _in_place(function, items)
        return
    for part in _parts(items):
        in_place = callable(is_plain) and all(map(is_plain, part))
        yield from _in_place(function, part) if in_place else _apart(function, part)


def _in_place(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any | DataError]]:
    for item in items:
        try:
            yield item, function(item)
        except DataError as error:
            yield item, error
        except MemoryError:
            raise Unbounded(_fault(TOO_BIG), item) from None


def _parts(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of many items; what the items raise comes after those before it."""
    part: list[Any] = []
    raised: DataError | None = None
    try:
        for item in items:
            part.append(item)
            if len(part) == TOGETHER:
                yield part
                part = []
    except DataError as error:
        raised = error
    if part:
        yield part
    if raised:
        raise raised


def _apart(function: Callable[[Any], Any], items: list[Any]) -> Iterator[tuple[Any, Any | DataError]]:
    """The same for some items in one forked process, which writes a line for each."""
    reading, writing = os.pipe()
    with warnings.catch_warnings(), _tokenizers_unused():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none of them
        pid = -1
        held = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the child ignores them
        try:
            pid = os.fork()
        finally:
            if pid:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
    if pid == 0:
        code = BROKEN
        try:
            os.close(reading)
            code = _work(function, items, writing)
        finally:
            os._exit(code)
    os.close(writing)
    ended = None
    try:
        with open(reading, encoding="ascii", newline="\n") as replies:
            for item in items:
                line = replies.readline()
                if not line.endswith("\n"):
                    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    raise Unbounded(_fault(ended), item)
                if line == FAILED:
                    yield from _in_place(function, [item])  # raises here what it raised there, unless that was of there
                    continue
                told, fault = json.loads(line)
                yield item, _fault_in_row(*fault) if fault else told
    finally:
        if ended is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextmanager
def _tokenizers_unused() -> Iterator[None]:
    """Keep that library from warning of a fork whose child does not tokenise; one that does would hang if it stayed so."""
    name = "TOKENIZERS_PARALLELISM"
    is_set = name in os.environ
    os.environ.setdefault(name, "true")
    try:
        yield
    finally:
        if not is_set:
            del os.environ[name]


def _fault(code: int) -> str:
    if code == TOO_BIG:
        return f"writes more than {LONGEST:,} characters, or takes more than {MEMORY >> 20} MB,"
    faults = {
        -signal.SIGXCPU: f"takes more than {SECONDS} s",
        -signal.SIGALRM: f"waits for more than {STUCK} s",
        -signal.SIGKILL: "was killed, as when memory runs out,",
    }
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    return faults.get(code, f"ends the process that renders it ({ending})")


def _fault_in_row(lines: list[str], where: str, what: str, mend: str) -> DataError:
    error = DataError(where, what, mend)
    error.lines = lines
    return error


def _work(function: Callable[[Any], Any], items: list[Any], writing: int) -> int:
    """Do the items under limits, in a process that ends thereafter → its exit code."""
    import resource

    def limit(kind: int, most: int) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

    limit(resource.RLIMIT_CORE, 0)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # meant for the run, which then ends its children itself
    for number in (signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: what is only kept is no part of the size
        if trim:
            trim(0)
        now = int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limit(resource.RLIMIT_AS, now + MEMORY)
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (the process ends in a moment)
    nodes.Impossible.__init__ = _note_memory  # type: ignore[assignment, method-assign]
    gc.freeze()  # its collections leave alone what both processes share
    try:
        replies = open(writing, "w", encoding="ascii")  # noqa: SIM115
        for item in items:
            # It ends also what never comes back to Python.
            limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + SECONDS))
            signal.alarm(STUCK)
            try:
                reply = json.dumps([function(item), None]) + "\n"
            except DataError as error:
                reply = json.dumps([None, [error.lines, *error.args]]) + "\n"
            except MemoryError:
                raise
            except Exception:
                reply = FAILED
            signal.alarm(0)
            replies.write(reply)
            replies.flush()
    except MemoryError:
        return TOO_BIG
    return 0


def _note_memory(*_: Any) -> None:
    """Jinja passes over what it cannot compute when it compiles; without these limits it would compute it."""
    if isinstance(sys.exc_info()[1], MemoryError):
        os._exit(TOO_BIG)
