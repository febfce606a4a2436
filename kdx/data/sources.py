"""Rows → checked conversations, split into what is trained on and what is held out."""

import contextlib
import hashlib
import heapq
import inspect
import json
import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdx.checked import option_faults
from kdx.config import DataConfig
from kdx.data.files import kind_of, read_rows, resolve_path, text_in, what_is_read
from kdx.data.mix import parts_of
from kdx.errors import ConfigError, DataError, did_you_mean, together

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython")
PREFERENCES = (("prompt", "completion"), ("prompt", "chosen"))  # columns of a pair, as trl names them
OWN_KEYS = ("messages", "text", "source", "target", "id", "where")  # of what a source yields


@dataclass(frozen=True)
class Conversation:
    """What a row says: messages, the last one the assistant's, or a plain text, of which every token counts.

    variables: what else the chat template is given, by name, such as tools and documents; of a row as its source yields
    it, all other columns. unlearned: messages of the assistant that the student reads and does not learn (weight 0).
    note: how the row was read, if that is to be said.
    """

    id: str
    messages: list[dict[str, Any]]
    where: str
    text: str = ""
    variables: dict[str, Any] = field(default_factory=dict)
    unlearned: list[int] = field(default_factory=list)
    note: str = ""

    @cached_property
    def digest(self) -> str:
        """A digest of the content, the same wherever the row is."""
        more = [part for part in (self.text, self.variables, self.unlearned) if part]
        content = [self.messages, *more] if more else self.messages
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Names:
    """What a chat template reads: variables beside the messages, and keys of a message."""

    variables: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Dropped:
    """A row that a source leaves out, and the rule by which."""

    rule: str


class Conversations:
    """The checked conversations of a run in the order they were read: `train` rows, then those of a held-out file.

    The messages are in a temporary file; ids, places and digests are in memory. Forked processes may read it too.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.ids, self.where, self.digests = list[str](), list[str](), list[str]()
        self.num_train = 0  # rows of data.path; those after are data.validation's, if that is a file or split
        self.faults: list[DataError] = []
        self.dropped, self.changed = Counter[str](), Counter[str]()
        self.said, self.unused = Counter[str](), Counter[str]()  # how rows were read; what in them nothing reads
        self.notes: list[str] = []  # for the log
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (it has no name: nothing is left)
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Conversation:
        name, where = self.ids[i], self.where[i]
        start, end = self._starts[i : i + 2]
        content = json.loads(os.pread(self._file.fileno(), end - start, start))
        return Conversation(id=name, where=where, **content)

    def append(self, conversation: Conversation) -> None:
        content = {k: v for k, v in vars(conversation).items() if k in ("messages", "text", "variables", "unlearned")}
        self._starts.append(self._starts[-1] + self._file.write(json.dumps(content, default=str).encode()))
        self.ids.append(conversation.id)
        self.where.append(conversation.where)
        self.digests.append(conversation.digest)

    def content(self) -> str:
        """A digest of all that was read: messages, ids, places, and what was dropped or changed."""
        found = [self.digests, self.ids, self.where, self.num_train, self.dropped, self.changed, self.notes]
        return xxhash.xxh3_128_hexdigest(json.dumps([*found, self.said, self.unused]).encode())


Source = Callable[..., Iterable[Any]]
Check = Callable[[Conversation], object]
Read = tuple[list[dict[str, Any]] | str, set[str], str]  # messages or a text, checked; columns used; how it was read
_SOURCES: dict[str, Source] = {}


def register_source(function: Source) -> Source:
    """Make a source available as `data.name=<its own name>`; its parameters become options of the data group.

    A source yields {"messages": [{"role", "content"}, …]}, {"source": …, "target": …} or {"text": …}, with "id" and
    "where" if it knows them; everything else in it, such as "tools", is given to a chat template that reads it. It is
    given data.path, data.subset and data.split if it has parameters of those names. Raises ValueError if another
    function has that name.
    """
    name = function.__name__
    known = _SOURCES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(f"a data source named {name} is registered already, by {known.__module__}")
    _SOURCES[name] = function
    return function


def check_source(config: DataConfig, where: str = "data") -> None:
    """Refuse a source or options that the registry does not know, before anything is read. Raises ConfigError."""
    if config.name == "mix":
        for name, (part, _) in parts_of(config).items():
            check_source(part, f"data.sources.{name}")
        return
    if config.name not in _SOURCES:
        hint = did_you_mean(config.name, sorted(_SOURCES)) + ". For your own: KDX_PLUGINS=module"
        raise ConfigError(f"{where}.name", f"no source is named {config.name!r}", hint)
    if faults := option_faults(_SOURCES[config.name], _options(config), f"{where}."):
        raise together(faults)


def read_conversations(
    config: DataConfig, folder: Path | None = None, check: Check | None = None, names: Names | None = None
) -> Conversations:
    """Read data.path, then data.validation if that is a file or split, and check every row.

    Faults are collected, not raised. folder: where the temporary file goes. check: raises DataError for a row
    that the chat template refuses; called only where bad rows are skipped, so that those count as bad. names: what the
    chat template reads; all else in a row is counted as unused.
    """
    check_source(config)
    found = Conversations(folder)
    check = check if config.on_bad_row == "skip" else None
    own, *held_out = what_is_read(config)
    _read(own, found, check, names or Names())
    found.num_train = len(found)
    for part in held_out:
        _read(part, found, check, names or Names())
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


def _read(config: DataConfig, found: Conversations, check: Check | None, names: Names) -> None:
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
                whole = item if isinstance(item, Conversation) else _checked(item, f"{config.name}[{i}]")
                conversation, unused = _without_unused(whole, names)
                if check:
                    check(conversation)
                found.append(conversation)
                is_cut = len(conversation.messages) < len(whole.messages)
                found.changed["unanswered last turn cut off"] += is_cut
                found.unused.update(unused)
                found.said.update([whole.note] if whole.note else [])
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
    rows, texts, copies = range(first, len(found)), dict[str, str](), Counter[str]()
    shared = set()
    for i in rows:
        if texts.setdefault(found.ids[i], found.digests[i]) != found.digests[i]:
            shared.add(found.ids[i])
    for i in rows:
        name = f"{found.ids[i]}~{found.digests[i][:12]}" if found.ids[i] in shared else found.ids[i]
        copies[name] += 1
        found.ids[i] = name if copies[name] == 1 else f"{name}~{copies[name]}"


def _checked(item: Any, where: str) -> Conversation:
    """Check what one's own source yields. Raises DataError."""
    row = item if isinstance(item, dict) else {}
    where = str(row.get("where", where))
    columns = {name: value for name, value in row.items() if name not in OWN_KEYS}
    if "text" in row and "messages" not in row:
        return Conversation(_id_of(row), [], where, text_in(row["text"], "text", where), columns)
    if "messages" not in row and not {"source", "target"} <= row.keys():
        what = f'is {kind_of(item)}, expected an object with "messages", with "source" and "target", or with "text"'
        raise DataError(where, what, "Change what the source yields")
    pair = [{"role": role, "content": row.get(name)} for role, name in (("user", "source"), ("assistant", "target"))]
    turns = _messages(row.get("messages", pair), "messages", where)
    return Conversation(_id_of(row), turns, where, variables=columns)


def _id_of(row: dict[str, Any]) -> str:
    given = row.get("id")
    return str(given).encode(errors="backslashreplace").decode() if isinstance(given, str | int) else ""


def _without_unused(whole: Conversation, names: Names) -> tuple[Conversation, set[str]]:
    """Cut off an unanswered last turn and all that the chat template does not read → the rest, what it does not read.

    Raises DataError.
    """
    where = whole.where
    last = max((i for i, m in enumerate(whole.messages) if m["role"] == "assistant"), default=-1)
    if last < 0 and not whole.text:
        raise DataError(where, "has no message of the assistant", "The student learns the assistant's turns: add one")
    messages = whole.messages[: last + 1]
    unlearned = [i for i, m in enumerate(messages) if _is_unlearned(m, f"{where}: messages[{i}]")]
    columns = {name: _parsed(value) for name, value in whole.variables.items() if value not in (None, "", [], {})}
    unused = {f"column {name}" for name in columns.keys() - names.variables}
    for message in messages:
        for name in message.keys() - {"role", "content"} - names.keys:
            if name == "tool_calls" and not message["content"]:
                what = "has only tool_calls, which the chat template does not write"
                raise DataError(where, what, "Give a data.chat_template that writes them, or leave the row out")
            unused.add(f"key {name} of messages")
            del message[name]
    variables = {name: columns[name] for name in sorted(columns.keys() & names.variables)}
    rest = replace(whole, messages=messages, variables=variables, unlearned=unlearned)
    return replace(rest, id=rest.id or rest.digest[:32]), unused


def _is_unlearned(message: dict[str, Any], where: str) -> bool:
    """Take `weight` and `train` out of a message → whether the student only reads it. Raises DataError."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or train not in (0, 1):
        what = (
            f"weight is {kind_of(weight)} and train {kind_of(train)}; a message counts (1, true) or does not (0, false)"
        )
        raise DataError(where, what, "Fix the row")
    return message["role"] == "assistant" and not (weight and train)


def _parsed(value: Any) -> Any:
    """Read a column that holds a JSON list, or a list of JSON objects, as text: data sets often keep tools so."""
    if isinstance(value, list):
        return [_parsed(part) for part in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _messages(
    turns: Any,
    column: str,
    where: str,
    role_key: str = "role",
    content_key: str = "content",
    roles: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Check a list of messages, and name roles and keys as everywhere; other keys are kept. Raises DataError."""
    if not isinstance(turns, list) or not turns:
        hint = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        raise DataError(where, f'"{column}" is {kind_of(turns)}, expected a list of messages', hint)
    messages = []
    for i, turn in enumerate(turns):
        place = f"{where}: messages[{i}]"
        calls = isinstance(turn, dict) and _parsed(turn.get("tool_calls"))
        if not isinstance(turn, dict) or not {role_key, *(() if calls else (content_key,))} <= turn.keys():
            what = f'is {kind_of(turn)}, expected an object with "{role_key}" and "{content_key}"'
            raise DataError(place, what, "Name them: data.role_key, data.content_key")
        role = turn[role_key]
        role = roles.get(role, role) if roles and isinstance(role, str) else role
        if role not in ROLES:
            hint = f"Roles are {', '.join(ROLES)}; map others with data.roles, as in '+data.roles.bot=assistant'"
            raise DataError(place, f"the role is {kind_of(role)}", hint)
        content = _joined_parts(turn.get(content_key))
        if not (calls and content in (None, "")) and not (role not in ROLES[:4] and content == ""):
            content = text_in(content, content_key, place)
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise DataError(place, f'"tool_calls" is {kind_of(calls)}, expected a list of objects', "Fix the row")
        own = (role_key, content_key, "role", "content")
        more = {k: v for k, v in (turn | {"tool_calls": calls}).items() if k not in own and v not in (None, [], {})}
        messages.append({"role": role, "content": content, **more})
    return messages


def _joined_parts(content: Any) -> Any:
    """Join a content that is a list of text parts, as chat APIs have it; anything else stays."""
    is_text = isinstance(content, list) and content and all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    )  # fmt: skip
    return "".join(part["text"] for part in content) if is_text else content


def _converted(
    path: str | list[str], subset: str | None, split: str, convert: Callable[[dict[str, Any], str], Read]
) -> Iterator[Any]:
    """Yield what rows of files say, and the faults of the others. convert: a row and its place → what it says."""
    for item in read_rows(path, subset, split):
        try:
            if isinstance(item, DataError):
                raise item
            where, row = item
            if not isinstance(row, dict):
                raise DataError(where, f"is {kind_of(row)}, expected an object", "Write one JSON object a row")
            what, used, note = convert(row, where)
            text, turns = (what, []) if isinstance(what, str) else ("", what)
            columns = {name: value for name, value in row.items() if name not in used | {"id"}}
            yield Conversation(_id_of(row), turns, where, text, columns, note=note)
        except DataError as error:
            yield error


def _column(row: dict[str, Any], column: str, name: str, where: str) -> Any:
    if column not in row:
        hint = f"Choose a layout (data=pairs, messages, sharegpt or text), or name the column: data.{name}_column=..."
        raise DataError(where, f'"{column}" is missing; the row is {kind_of(row)}', hint)
    return row[column]


def _with_prompt(prompt: Any, answer: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Put a prompt, text or messages, before an answer without an opening → all, and whether the prompt is in them."""
    opening = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if answer[0]["role"] == "assistant":
        return opening + answer, True
    return answer, answer[: len(opening)] == opening


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a value in it is null (allow for it: {{ name or '' }})")
    return value


class RowTemplate:
    """A sandboxed Jinja template over the columns of a row. Raises ConfigError if it is not Jinja."""

    def __init__(self, key: str, text: str) -> None:
        sandbox = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
        )
        self.key = key
        try:
            self.template, self.names = sandbox.from_string(text), meta.find_undeclared_variables(sandbox.parse(text))
        except TemplateError as error:
            raise ConfigError(key, f"is not Jinja: {error}", "Fix the template") from None

    def fill(self, row: dict[str, Any], where: str) -> str:
        """Fill the template in. Raises DataError."""
        try:
            text = self.template.render(row)
        except Exception as error:  # an undefined name, a division by zero, …: the template's or the row's
            what = f"{self.key} cannot be filled: {str(error).rstrip('.')}; the row is {kind_of(row)}"
            raise DataError(where, what, "Fix the template or the row") from None
        return text_in(text, self.key, where, "Fix the template or the row")


def _with_system(
    turns: list[dict[str, Any]], row: dict[str, Any], where: str, column: str | None, prompt: RowTemplate | None
) -> tuple[list[dict[str, Any]], set[str]]:
    """Put a row's system text before its messages, unless they have one → them, and the columns that were used."""
    text = row.get(column) if column else None
    if turns[0]["role"] == "system":
        return turns, set()
    if prompt is not None:
        return [{"role": "system", "content": prompt.fill(row, where)}, *turns], prompt.names
    if isinstance(text, str) and text.strip():
        return [{"role": "system", "content": text}, *turns], {str(column)}
    return turns, set()


@register_source
def pairs(
    path: str | list[str],
    subset: str | None,
    split: str,
    source_column: str,
    target_column: str,
    system_column: str | None,
    system_prompt: str | None,
    template: dict[str, str],
) -> Iterator[Any]:
    """Instruction pairs: one user turn, one assistant turn, each a sandboxed Jinja template over the row's columns.

    In the templates `source` and `target` are the two columns, under whatever name; all others go by their own. A row
    with neither column may have trl's: prompt, and completion or chosen, as text or as lists of messages.
    """
    if template.keys() != {"user", "assistant"}:
        raise ConfigError("data.template", f"has the keys {', '.join(template)}", "Give it user and assistant")
    templates = {role: RowTemplate(f"data.template.{role}", text) for role, text in template.items()}
    prompt = RowTemplate("data.system_prompt", system_prompt) if system_prompt else None

    def chat(row: dict[str, Any], where: str) -> Read:
        columns, note = {"source": source_column, "target": target_column}, ""
        if not {source_column, target_column} & row.keys():
            for first, second in (names for names in PREFERENCES if {*names} <= row.keys()):
                columns = {"source": first, "target": second}
                note = f"source and target are the columns {first} and {second}"
                break
        used = set(columns.values())
        source, target = (row.get(column) for column in columns.values())
        if any(isinstance(side, list) and side and isinstance(side[0], dict) for side in (source, target)):
            sides = zip(("user", "assistant"), (source, target), columns.values(), strict=True)
            opening, answer = (
                _messages(side if isinstance(side, list) else [{"role": role, "content": side}], column, where)
                for role, side, column in sides
            )
            turns, is_used = _with_prompt(opening, answer)
            used -= set() if is_used else {columns["source"]}
        else:
            needed, own = set().union(*(t.names for t in templates.values())), {}
            for name in (name for name in columns if name in needed):
                hint = f"Fix the row, or name another column: data.{name}_column=..."
                own[name] = text_in(_column(row, columns[name], name, where), columns[name], where, hint)
            used |= needed
            turns = [
                {"role": role, "content": templates[role].fill(row | own, where)} for role in ("user", "assistant")
            ]
        turns, more = _with_system(turns, row, where, system_column, prompt)
        return turns, used | more, note

    return _converted(path, subset, split, chat)


@register_source
def messages(
    path: str | list[str],
    subset: str | None,
    split: str,
    messages_column: str,
    role_key: str,
    content_key: str,
    roles: dict[str, str],
    system_column: str | None,
    system_prompt: str | None,
) -> Iterator[Any]:
    """Chats: a column with a list of messages; `roles` maps the file's role names to those of chat templates.

    Where the column is completion or chosen, a `prompt` goes before it, unless it is there already.
    """
    prompt = RowTemplate("data.system_prompt", system_prompt) if system_prompt else None

    def chat(row: dict[str, Any], where: str) -> Read:
        how = (where, role_key, content_key, roles)
        turns = _messages(_column(row, messages_column, "messages", where), messages_column, *how)
        used, note, length = {messages_column}, "", len(turns)
        before = row.get("prompt") if messages_column in ("completion", "chosen") else None
        if before and isinstance(before, str | list):
            before = _messages(before, "prompt", *how) if isinstance(before, list) else text_in(before, "prompt", where)
            turns, is_used = _with_prompt(before, turns)
            used |= {"prompt"} if is_used else set()
            note = f"the column prompt goes before {messages_column}" if len(turns) > length else ""
        turns, more = _with_system(turns, row, where, system_column, prompt)
        return turns, used | more, note

    return _converted(path, subset, split, chat)


@register_source
def text(path: str | list[str], subset: str | None, split: str, text_column: str) -> Iterator[Any]:
    """Plain text: a column of it; every token counts, and the end-of-text token after it."""

    def plain(row: dict[str, Any], where: str) -> Read:
        return text_in(_column(row, text_column, "text", where), text_column, where), {text_column}, ""

    return _converted(path, subset, split, plain)


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
            chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns[:max_turns])]
            yield {"messages": chat, "id": name, "where": f"{file.name}:{name}"}
