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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdx.config import DataConfig, replaced
from kdx.data.files import kind_of, missing, read_rows, resolve_path, text_in
from kdx.errors import ConfigError, DataError, did_you_mean, first_of, same_in_all, together
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
        self.digests: list[bytes] = []
        self.num_train = 0  # rows of data.path; those after are data.validation's, if that is a file or split
        self.faults: list[DataError] = []
        self.dropped, self.changed = Counter[str](), Counter[str]()
        self.notes: list[str] = []  # for the log
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it has no name: nothing is left)
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])
        self._content = xxhash.xxh3_128()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Conversation:
        name, where = self.ids[i], self.where[i]
        start, end = self._starts[i : i + 2]
        return Conversation(name, json.loads(os.pread(self._file.fileno(), end - start, start)), where)

    def append(self, conversation: Conversation) -> None:
        text = json.dumps(conversation.messages).encode()
        self._file.write(text)
        self._starts.append(self._starts[-1] + len(text))
        self.ids.append(conversation.id)
        self.where.append(conversation.where)
        self.digests.append(bytes.fromhex(conversation.digest))
        self._content.update(json.dumps([conversation.id, conversation.where]).encode() + text)

    def content(self) -> str:
        """A digest of all that was read: messages, ids, places, and what was dropped or changed."""
        counts = json.dumps([self.num_train, self.dropped, self.changed, self.notes], sort_keys=True)
        return self._content.hexdigest() + xxhash.xxh3_64_hexdigest(counts.encode())


Source = Callable[..., Iterable[Any]]
Refuses = Callable[[Conversation], DataError | None]
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
    function = _SOURCES[config.name]
    options = {**_given(config, function), **config.options}
    if faults := option_faults(function, options, "data."):
        raise together(faults)


def read_conversations(config: DataConfig, folder: Path | None = None, refuses: Refuses | None = None) -> Conversations:
    """Read data.path, then data.validation if that is a file or split, and check every row.

    Faults are collected, not raised. folder: where the temporary file goes. refuses: why the chat template refuses a
    row; asked only where bad rows are skipped, so that those count as bad.
    """
    check_source(config)
    found = Conversations(folder)
    refuses = refuses if config.on_bad_row == "skip" else None
    _read(config, found, refuses)
    found.num_train = len(found)
    wanted = config.validation
    if isinstance(wanted, str):
        is_split = wanted.startswith("split:")
        other = {"split": wanted.removeprefix("split:")} if is_split else {"path": wanted}
        _read(replaced(config, **other), found, refuses)
    return found


def raise_faults(config: DataConfig, found: Conversations, more: list[DataError]) -> None:
    """Raise the faults of the rows and of what became of them, the first 20 with their total, if there are any."""
    faults = [*found.faults, *(same_in_all(more) if len(more) == len(found) else more)]
    if faults:
        may_skip = config.on_bad_row == "stop" and config.on_long != "error"
        raise first_of(faults, "Fix them, or set data.on_bad_row=skip" if may_skip else "Fix them")


def split(config: DataConfig, found: Conversations) -> tuple[list[int], list[int]]:
    """Choose the rows to train on, in their order, and the held-out rows, both as numbers. Raises DataError.

    A row's rank is a digest of data.seed and its id, so that adding rows moves no other. Counts dropped copies.
    """
    num_rows, wanted = found.num_train, config.validation
    if not num_rows:
        rules = "; ".join(f"{count} rows: {rule}" for rule, count in found.dropped.items())
        if rules:
            raise DataError("data", f"no row is left ({rules})", "Loosen the rule, or give other data")
        raise DataError("data.path", f"{config.path or config.name} has no rows", "Give data with rows")

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{config.seed}:{found.ids[i]}".encode()).digest()

    if isinstance(wanted, str):
        held_out = list(range(num_rows, len(found)))
        if not held_out:
            raise DataError("data.validation", f"{wanted} has no usable row", "Give another file or split")
    else:
        number = max(1, round(wanted * num_rows)) if isinstance(wanted, float) else wanted or 0
        if number >= num_rows:
            what = f"is {wanted}: {number} of {num_rows} rows held out leave none to train on"
            raise DataError("data.validation", what, "Hold out fewer rows, or give more data")
        held_out = heapq.nsmallest(number, range(num_rows), key=rank)
    same = {found.digests[i] for i in held_out}
    train = [i for i in range(num_rows) if found.digests[i] not in same]
    num_others = num_rows if isinstance(wanted, str) else num_rows - len(held_out)
    found.dropped["equal to a held-out row"] += num_others - len(train)
    if not train:
        what = f"all {num_others} other rows are equal to held-out ones, so none is left to train on"
        raise DataError("data.validation", what, "Give rows that differ")
    if config.take is not None:
        if config.take > len(train):
            found.notes.append(f"data.take={config.take}, but there are {len(train)} training rows: all are used")
        train = sorted(heapq.nsmallest(config.take, train, key=rank))
    return train, held_out


def _given(config: DataConfig, function: Source) -> dict[str, Any]:
    """Those of path, subset and split that the source has parameters for."""
    common = {"path": config.path, "subset": config.subset, "split": config.split}
    return {name: value for name, value in common.items() if name in inspect.signature(function).parameters}


def _read(config: DataConfig, found: Conversations, refuses: Refuses | None) -> None:
    """Run the source and check what it yields, all faults in one pass."""
    function = _SOURCES[config.name]
    faults: list[DataError] = []
    first, before = len(found), found.dropped.total()
    items = function(**_given(config, function), **config.options)
    if not isinstance(items, Iterable):
        what = f"the source {config.name} returns {kind_of(items)}, expected rows"
        raise DataError("data.name", what, "Let it yield each row, or return a list of them")
    try:
        for i, item in enumerate(items):
            if isinstance(item, Dropped):
                found.dropped[item.rule] += 1
                continue
            try:
                if isinstance(item, DataError):
                    raise item
                conversation, is_cut = _conversation(item, f"{config.name}[{i}]")
                if refuses and (fault := refuses(conversation)):
                    raise fault
                found.append(conversation)
                found.changed["unanswered last turn cut off"] += is_cut
            except DataError as error:
                faults.append(error)
    except DataError as error:  # not of a row: a file that cannot be read, which on_bad_row does not excuse
        found.faults.append(error)
    num_rows = len(found) - first + len(faults) + found.dropped.total() - before
    most = config.max_bad_rows * num_rows if isinstance(config.max_bad_rows, float) else config.max_bad_rows
    shown = faults if len(found) > first else same_in_all(faults)
    if config.on_bad_row == "stop":
        found.faults += shown
    elif most is not None and len(faults) > most:
        what = f"{len(faults)} of {num_rows} rows are bad, and data.max_bad_rows is {config.max_bad_rows}"
        found.faults += [DataError("data", what, "Fix them, or raise it"), *shown]
    elif faults:
        found.dropped["bad row (data.on_bad_row=skip)"] += len(faults)
        found.notes.append(f"skipped {len(faults)} bad rows, the first: {faults[0]}")
    _make_ids_unique(found, first)


def _make_ids_unique(found: Conversations, first: int) -> None:
    """Give each row an id of its own that does not depend on its position.

    Rows that share an id and differ in text get a part of their text's digest; equal rows are numbered.
    """
    texts: dict[str, bytes] = {}
    shared = set()
    rows = range(first, len(found))
    for i in rows:
        if texts.setdefault(found.ids[i], found.digests[i]) != found.digests[i]:
            shared.add(found.ids[i])
    copies: Counter[str] = Counter()
    for i in rows:
        name = f"{found.ids[i]}~{found.digests[i].hex()[:12]}" if found.ids[i] in shared else found.ids[i]
        copies[name] += 1
        found.ids[i] = name if copies[name] == 1 else f"{name}~{copies[name]}"


def _conversation(item: Any, where: str) -> tuple[Conversation, bool]:
    """Check one yielded row → the conversation, and whether an unanswered last turn was cut off. Raises DataError."""
    if not isinstance(item, dict):
        raise DataError(where, f"is {kind_of(item)}, expected an object", "Write one JSON object a row")
    where = str(item.get("where", where))
    if "messages" in item:
        messages = _list_of_messages(item["messages"], "messages", where)
    elif "source" in item and "target" in item:
        messages = [{"role": "user", "content": item["source"]}, {"role": "assistant", "content": item["target"]}]
    else:
        what = f'has neither "messages" nor "source" and "target"; it has: {", ".join(map(str, item)) or "nothing"}'
        raise DataError(where, what, "Map the columns: data.messages_column=, data.source_column=, data.target_column=")
    for i, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{i}]")
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(where, "has no message of the assistant", "The student learns the assistant's turns: add one")
    whole = Conversation("", messages[: last + 1], where)
    own = item.get("id")
    is_named = isinstance(own, str | int) and not isinstance(own, bool) and str(own)
    name = str(own).encode(errors="backslashreplace").decode() if is_named else whole.digest[:32]
    return replace(whole, id=name), last + 1 < len(messages)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise _not_a_message(message, "role", "content", where)
    if message["role"] not in ROLES:
        hint = f"Roles are {', '.join(ROLES)}; map others with data.roles, as in '+data.roles.bot=assistant'"
        raise DataError(where, f"the role is {kind_of(message['role'])}", hint)
    text_in(message["content"], "content", where)
    try:
        message["content"].encode()
    except UnicodeEncodeError as error:
        what = f'"content" has half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is not text'
        raise DataError(where, what, "Was the text cut in the middle of an emoji? Fix it") from None


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


class RowTemplate:
    """A sandboxed Jinja template over a row's columns; `needs` are the names in it. Raises ConfigError."""

    def __init__(self, text: Any, key: str) -> None:
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(key, f"is {kind_of(text)}", "Write Jinja over the row's columns, as in '{{ source }}'")
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
        )
        try:
            self.key, self._template = key, environment.from_string(text)
            self.needs = meta.find_undeclared_variables(environment.parse(text))
        except TemplateError as error:
            raise ConfigError(key, f"is not Jinja: {error}", "Fix the template") from None

    def render(self, values: dict[str, Any], columns: Iterable[Any], where: str) -> str:
        """Fill the template with a row. Raises DataError."""
        try:
            return self._template.render(values)
        except Exception as error:  # an undefined name, a division by zero, …: the template's or the row's
            what = f"{self.key} cannot be filled: {str(error).rstrip('.')}; the columns are: {', '.join(map(str, columns))}"
            raise DataError(where, what, "Fix the template or the row") from None


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
    """Instruction pairs: one user turn, one assistant turn, each a Jinja template over the row's columns.

    In the templates `source` and `target` are the two columns, under whatever name; all others go by their own.
    """
    columns = {"source": source_column, "target": target_column}
    templates = {role: RowTemplate(template.get(role), f"data.template.{role}") for role in ("user", "assistant")}
    for key in template.keys() - templates.keys():
        raise ConfigError(f"data.template.{key}", "is not a key of kdx", "Known: user, assistant")

    def chat(row: dict[str, Any], where: str) -> list[Any]:
        turns = [{"role": "system", "content": system}] if system else []
        for role, text in templates.items():
            own = {name: _column(row, columns[name], name, where) for name in columns if name in text.needs}
            turns.append({"role": role, "content": text.render(row | own, row, where)})
        return turns

    return _converted(path, subset, split, chat)


def _column(row: dict[str, Any], column: str, name: str, where: str) -> str:
    if column not in row:
        raise missing(column, name, row, where)
    return text_in(row[column], column, where, f"data.{name}_column=...")


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
        if messages_column not in row:
            raise missing(messages_column, "messages", row, where)
        turns = _list_of_messages(row[messages_column], messages_column, where)
        for i, turn in enumerate(turns):
            if not isinstance(turn, dict) or not {role_key, content_key} <= turn.keys():
                raise _not_a_message(turn, role_key, content_key, f"{where}: messages[{i}]")
        given = [(turn[role_key], turn[content_key]) for turn in turns]
        return [{"role": roles.get(r, r) if isinstance(r, str) else r, "content": text} for r, text in given]

    return _converted(path, subset, split, chat)


def _list_of_messages(value: Any, column: str, where: str) -> list[Any]:
    if isinstance(value, list) and value:
        return value
    hint = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    what = "an empty list" if value == [] else kind_of(value)
    raise DataError(where, f'"{column}" is {what}, expected a list of messages', hint)


def _not_a_message(message: Any, role_key: str, content_key: str, where: str) -> DataError:
    has = (", ".join(map(str, message)) or "nothing") if isinstance(message, dict) else kind_of(message)
    what = f'needs "{role_key}" and "{content_key}", it has: {has}'
    return DataError(where, what, "Name them: data.role_key, data.content_key")


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
    except FileNotFoundError:
        raise DataError("data.path", f"{file} does not exist", "Run: pip install --no-deps chitchat-dataset") from None
    except (ValueError, AttributeError, KeyError, TypeError):
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
