"""Rows → checked conversations, split into what is trained on and what is held out."""

import hashlib
import heapq
import inspect
import json
import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdx.config import DataConfig, replaced
from kdx.data.files import kind_of, read_rows, resolve_path, text_in
from kdx.errors import ConfigError, DataError, did_you_mean, together
from kdx.plugins import option_faults

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages with roles and text; the last one is the assistant's."""

    id: str
    messages: list[dict[str, str]]
    where: str

    @cached_property
    def digest(self) -> str:
        """A digest of the messages, the same wherever the row is."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Dropped:
    """A row that a source leaves out, and the rule by which."""

    rule: str


class Conversations:
    """The checked conversations of a run in the order they were read: `train` rows, then those of a held-out file.

    The messages are in a temporary file; ids, places and digests are in memory. Forked processes may read it too.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.ids: list[str] = []
        self.where: list[str] = []
        self.digests: list[str] = []
        self.num_train = 0  # rows of data.path; those after are data.validation's, if that is a file or split
        self.faults: list[DataError] = []
        self.dropped, self.changed = Counter[str](), Counter[str]()
        self.notes: list[str] = []  # for the log
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it has no name: nothing is left)
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Conversation:
        name, where = self.ids[i], self.where[i]
        start, end = self._starts[i : i + 2]
        return Conversation(name, json.loads(os.pread(self._file.fileno(), end - start, start)), where)

    def append(self, conversation: Conversation) -> None:
        self._starts.append(self._starts[-1] + self._file.write(json.dumps(conversation.messages).encode()))
        self.ids.append(conversation.id)
        self.where.append(conversation.where)
        self.digests.append(conversation.digest)

    def content(self) -> str:
        """A digest of all that was read: messages, ids, places, and what was dropped or changed."""
        found = [self.digests, self.ids, self.where, self.num_train, self.dropped, self.changed, self.notes]
        return xxhash.xxh3_128_hexdigest(json.dumps(found).encode())


Source = Callable[..., Iterable[Any]]
Check = Callable[[Conversation], object]
_SOURCES: dict[str, Source] = {}


def register_source(function: Source) -> Source:
    """Make a source available as `data.name=<its own name>`; its parameters become options of the data group.

    A source yields {"messages": [{"role", "content"}, …]} or {"source": …, "target": …}, with "id" and "where" if it
    knows them. It is given data.path, data.subset and data.split if it has parameters of those names. Raises
    ValueError if another function has that name.
    """
    name = function.__name__
    known = _SOURCES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(f"a data source named {name} is registered already, by {known.__module__}")
    _SOURCES[name] = function
    return function


def check_source(config: DataConfig) -> None:
    """Refuse a source or options that the registry does not know, before anything is read. Raises ConfigError."""
    if config.name not in _SOURCES:
        hint = did_you_mean(config.name, sorted(_SOURCES)) + ". For your own: KDX_PLUGINS=module"
        raise ConfigError("data.name", f"no source is named {config.name!r}", hint)
    if faults := option_faults(_SOURCES[config.name], _options(config), "data."):
        raise together(faults)


def read_conversations(config: DataConfig, folder: Path | None = None, check: Check | None = None) -> Conversations:
    """Read data.path, then data.validation if that is a file or split, and check every row.

    Faults are collected, not raised. folder: where the temporary file goes. check: raises DataError for a row
    that the chat template refuses; called only where bad rows are skipped, so that those count as bad.
    """
    check_source(config)
    found = Conversations(folder)
    check = check if config.on_bad_row == "skip" else None
    _read(config, found, check)
    found.num_train = len(found)
    if isinstance(config.validation, str):
        path, is_split, split = config.validation.partition("split:")
        _read(replaced(config, **({"split": split} if is_split else {"path": path})), found, check)
    return found


def split(config: DataConfig, found: Conversations) -> tuple[list[int], list[int]]:
    """Choose the rows to train on, in their order, and the held-out rows, both as numbers. Raises DataError.

    A row's rank is a digest of data.seed and its id, so that adding rows moves no other. Counts dropped copies.
    """
    num_rows, wanted = found.num_train, config.validation

    def check(some: Sequence[int], key: str, given: Any) -> None:
        if not some:
            rules = "; ".join(f"{count} rows: {rule}" for rule, count in (+found.dropped).items())
            raise DataError(
                key, f"no row of {given} is left ({rules or 'it has none'})", "Give more data, or loosen the rule"
            )

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{config.seed}:{found.ids[i]}".encode()).digest()

    check(range(num_rows), "data.path", config.path or config.name)
    if isinstance(wanted, str):
        held_out = list(range(num_rows, len(found)))
        check(held_out, "data.validation", wanted)
    else:
        number = max(1, round(wanted * num_rows)) if isinstance(wanted, float) else wanted or 0
        held_out = heapq.nsmallest(number, range(num_rows), key=rank)
    same = {found.digests[i] for i in held_out}
    train = [i for i in range(num_rows) if found.digests[i] not in same]
    found.dropped["equal to a held-out row"] += num_rows - sum(i < num_rows for i in held_out) - len(train)
    if not train:
        what = f"is {wanted}: all {num_rows} rows are held out or equal to one that is, so none is left to train on"
        raise DataError("data.validation", what, "Hold out fewer rows, or give more data")
    if config.take is not None:
        if config.take > len(train):
            found.notes.append(f"data.take={config.take}, but there are {len(train)} training rows: all are used")
        train = sorted(heapq.nsmallest(config.take, train, key=rank))
    return train, held_out


def _options(config: DataConfig) -> dict[str, Any]:
    """What the source is given: data's further keys, and those of path, subset and split that it has parameters for."""
    names = {"path", "subset", "split"} & inspect.signature(_SOURCES[config.name]).parameters.keys()
    return {name: getattr(config, name) for name in names} | config.options


def _read(config: DataConfig, found: Conversations, check: Check | None) -> None:
    """Run the source and check what it yields, all faults in one pass."""
    faults: list[DataError] = []
    first, before = len(found), found.dropped.total()
    try:
        for i, item in enumerate(_SOURCES[config.name](**_options(config))):
            if isinstance(item, Dropped):
                found.dropped[item.rule] += 1
                continue
            try:
                if isinstance(item, DataError):
                    raise item
                conversation, is_cut = _conversation(item, f"{config.name}[{i}]")
                if check:
                    check(conversation)
                found.append(conversation)
                found.changed["unanswered last turn cut off"] += is_cut
            except DataError as error:
                faults.append(error)
    except DataError as error:  # not of a row: a file that cannot be read, which on_bad_row does not excuse
        found.faults.append(error)
    num_rows = len(found) - first + len(faults) + found.dropped.total() - before
    most = config.max_bad_rows * num_rows if isinstance(config.max_bad_rows, float) else config.max_bad_rows
    if config.on_bad_row == "stop":
        found.faults += faults
    elif most is not None and len(faults) > most:
        what = f"{len(faults)} of {num_rows} rows are bad, and data.max_bad_rows is {config.max_bad_rows}"
        found.faults += [DataError("data", what, "Fix them, or raise it"), *faults]
    elif faults:
        found.dropped["bad row (data.on_bad_row=skip)"] += len(faults)
        found.notes.append(f"skipped {len(faults)} bad rows, the first: {faults[0]}")
    _make_ids_unique(found, first)


def _make_ids_unique(found: Conversations, first: int) -> None:
    """Give each row an id of its own that does not depend on its position.

    Rows that share an id and differ in text get a part of their text's digest; equal rows are numbered.
    """
    texts: dict[str, str] = {}
    shared = set()
    rows = range(first, len(found))
    for i in rows:
        if texts.setdefault(found.ids[i], found.digests[i]) != found.digests[i]:
            shared.add(found.ids[i])
    copies: Counter[str] = Counter()
    for i in rows:
        name = f"{found.ids[i]}~{found.digests[i][:12]}" if found.ids[i] in shared else found.ids[i]
        copies[name] += 1
        found.ids[i] = name if copies[name] == 1 else f"{name}~{copies[name]}"


def _conversation(item: Any, where: str) -> tuple[Conversation, bool]:
    """Check one yielded row → the conversation, and whether an unanswered last turn was cut off. Raises DataError."""
    row = item if isinstance(item, dict) else {}
    where = str(row.get("where", where))
    if "messages" in row:
        turns = row["messages"]
    elif "source" in row and "target" in row:
        turns = [{"role": "user", "content": row["source"]}, {"role": "assistant", "content": row["target"]}]
    else:
        what = f'is {kind_of(item)}, expected an object with "messages", or with "source" and "target"'
        raise DataError(where, what, "Change what the source yields")
    messages = _messages(turns, "messages", where)
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(where, "has no message of the assistant", "The student learns the assistant's turns: add one")
    whole = Conversation("", messages[: last + 1], where)
    own = str(row["id"]) if isinstance(row.get("id"), str | int) else ""
    name = own.encode(errors="backslashreplace").decode() or whole.digest[:32]
    return replace(whole, id=name), last + 1 < len(messages)


def _messages(
    turns: Any, column: str, where: str, role_key: str = "role", content_key: str = "content",
    roles: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, str]]:  # fmt: skip
    """Check a list of messages, and name roles and keys as everywhere. Raises DataError."""
    if not isinstance(turns, list) or not turns:
        hint = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        raise DataError(where, f'"{column}" is {kind_of(turns)}, expected a list of messages', hint)
    messages = []
    for i, turn in enumerate(turns):
        place = f"{where}: messages[{i}]"
        if not isinstance(turn, dict) or not {role_key, content_key} <= turn.keys():
            what = f'is {kind_of(turn)}, expected an object with "{role_key}" and "{content_key}"'
            raise DataError(place, what, "Name them: data.role_key, data.content_key")
        role = turn[role_key]
        role = roles.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            hint = f"Roles are {', '.join(ROLES)}; map others with data.roles, as in '+data.roles.bot=assistant'"
            raise DataError(place, f"the role is {kind_of(role)}", hint)
        messages.append({"role": role, "content": text_in(turn[content_key], content_key, place)})
    return messages


def _converted(
    path: str | list[str], subset: str | None, split: str, convert: Callable[[dict[str, Any], str], list[Any]]
) -> Iterator[Any]:
    """Yield the rows of files as messages, which `convert` makes of a row and its place, and the faults of the others."""
    for item in read_rows(path, subset, split):
        try:
            if isinstance(item, DataError):
                raise item
            where, row = item
            if not isinstance(row, dict):
                raise DataError(where, f"is {kind_of(row)}, expected an object", "Write one JSON object a row")
            yield {"messages": convert(row, where), "id": row.get("id"), "where": where}
        except DataError as error:
            yield error


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a value in it is null (allow for it: {{ name or '' }})")
    return value


@register_source
def pairs(
    path: str | list[str],
    subset: str | None,
    split: str,
    source_column: str,
    target_column: str,
    system: str | None,
    template: dict[str, str],
) -> Iterator[Any]:
    """Instruction pairs: one user turn, one assistant turn, each a sandboxed Jinja template over the row's columns.

    In the templates `source` and `target` are the two columns, under whatever name; all others go by their own.
    """
    columns = {"source": source_column, "target": target_column}
    if template.keys() != {"user", "assistant"}:
        raise ConfigError("data.template", f"has the keys {', '.join(template)}", "Give it user and assistant")
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null)
    try:
        templates = {role: sandbox.from_string(text) for role, text in template.items()}
        needs = {role: meta.find_undeclared_variables(sandbox.parse(text)) for role, text in template.items()}
    except TemplateError as error:
        raise ConfigError("data.template", f"is not Jinja: {error}", "Fix the template") from None

    def chat(row: dict[str, Any], where: str) -> list[Any]:
        turns = [{"role": "system", "content": system}] if system else []
        for role in ("user", "assistant"):
            own = {}
            for name in needs[role] & columns.keys():
                hint = f"Fix the row, or name another column: data.{name}_column=..."
                own[name] = text_in(_column(row, columns[name], name, where), columns[name], where, hint)
            try:
                turns.append({"role": role, "content": templates[role].render(row | own)})
            except Exception as error:  # an undefined name, a division by zero, …: the template's or the row's
                what = f"data.template.{role} cannot be filled: {str(error).rstrip('.')}; the row is {kind_of(row)}"
                raise DataError(where, what, "Fix the template or the row") from None
        return turns

    return _converted(path, subset, split, chat)


def _column(row: dict[str, Any], column: str, name: str, where: str) -> Any:
    if column not in row:
        hint = f"Choose a layout (data=pairs, messages or sharegpt), or name the column: data.{name}_column=..."
        raise DataError(where, f'"{column}" is missing; the row is {kind_of(row)}', hint)
    return row[column]


@register_source
def messages(
    path: str | list[str],
    subset: str | None,
    split: str,
    messages_column: str,
    role_key: str,
    content_key: str,
    roles: dict[str, str],
) -> Iterator[Any]:
    """Chats: a column with a list of messages; `roles` maps the file's role names to system, user and assistant."""

    def chat(row: dict[str, Any], where: str) -> list[Any]:
        turns = _column(row, messages_column, "messages", where)
        return _messages(turns, messages_column, where, role_key, content_key, roles)

    return _converted(path, subset, split, chat)


@register_source
def chitchat(path: str, min_turns: int, max_turns: int) -> Iterator[Any]:
    """Human conversations of the package chitchat-dataset: the first speaker is the user, the other the assistant.

    Keeps those of at least `min_turns` turns, their first `max_turns`, none empty; a turn's utterances are joined.
    """
    file = Path(resolve_path(path, "data.path"))
    file = file / "dataset.json" if file.is_dir() else file
    try:
        chats = {
            name: [" ".join(said["text"] for said in turn).strip() for turn in chat["messages"]]
            for name, chat in json.loads(file.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        hint = "Choose the layout that the file has: data=pairs, data=messages or data=sharegpt"
        raise DataError("data.path", f"{file} is not the chit-chat data set", hint) from None
    for name, turns in chats.items():
        if len(turns) < min_turns:
            yield Dropped("fewer turns than data.min_turns")
        elif not all(turns[:max_turns]):
            yield Dropped("an empty turn")
        else:
            chat = [{"role": ROLES[1 + i % 2], "content": turn} for i, turn in enumerate(turns[:max_turns])]
            yield {"messages": chat, "id": name, "where": f"{file.name}:{name}"}
