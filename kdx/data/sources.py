"""Rows → checked conversations, split into what is trained on and what is held out."""

import contextlib
import hashlib
import heapq
import inspect
import json
import logging
import os
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from kdx.checked import check_options
from kdx.config import DataConfig, Tree
from kdx.data.files import Item, kind_of, read_rows, resolve_path, text_in, what_is_read
from kdx.errors import ConfigError, DataError, did_you_mean
from kdx.run.files import cache_dir, hash_json

log = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython")
PREFERENCES = (("prompt", "completion"), ("prompt", "chosen"))  # columns of a pair, as trl names them
OWN_KEYS = ("messages", "text", "source", "target", "id", "where")  # of what a source yields
ONE_SOURCES = ("name", "path", "subset", "split", "take")  # keys of a source; the mixture's others are its defaults
COUNTERS = ("dropped", "changed", "said", "unused")  # rows left out, altered, how rows were read, what nothing reads

Messages = list[dict[str, Any]]
Counts = list[tuple[str, str]]  # a counter, and for what it is


@dataclass(frozen=True)
class Conversation:
    """What a row says: messages, the last one the assistant's, or a plain text, of which every token counts.

    variables: what else the chat template is given, by name, such as tools and documents; of a row as its source yields
    it, all other columns. unlearned: messages of the assistant that the student reads and does not learn (weight 0).
    note: how the row was read, if that is to be said.
    """

    id: str
    messages: Messages
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
class Dropped:
    """A row that a source leaves out, and the rule by which."""

    rule: str


class Conversations:
    """The checked conversations of a run in the order they were read; what they say is in a file, not in memory."""

    def __init__(self) -> None:
        self.ids, self.where, self.digests = list[str](), list[str](), list[str]()
        self.num_train = 0  # rows of data.path; those after are data.validation's, if that is a file or split
        self.faults: list[DataError] = []
        self.num_read = 0  # rows, bad ones too
        self.counts = {name: Counter[str]() for name in COUNTERS}
        # Without a name, so that nothing is left; read at offsets, so that forked processes may share it.
        self._file = tempfile.TemporaryFile(dir=cache_dir(), buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Conversation:
        name, where = self.ids[i], self.where[i]  # the IndexError that ends iteration
        start, end = self._starts[i : i + 2]
        content = json.loads(os.pread(self._file.fileno(), end - start, start))
        return Conversation(id=name, where=where, **content)

    def append(self, conversation: Conversation, counts: Counts) -> None:
        self.count(counts)
        content = {name: getattr(conversation, name) for name in ("messages", "text", "variables", "unlearned")}
        self._starts.append(self._starts[-1] + self._file.write(json.dumps(content, default=str).encode()))
        self.ids.append(conversation.id)
        self.where.append(conversation.where)
        self.digests.append(conversation.digest)

    def count(self, counts: Counts) -> None:
        for counter, what in counts:
            self.counts[counter][what] += 1

    def content(self) -> str:
        """A digest of all that was read: messages, ids, places, and what was dropped or changed."""
        found = [self.digests, self.ids, self.where, self.num_train, self.counts]
        return hash_json(found)


Source = Callable[..., Iterable[Any]]
_SOURCES: dict[str, Source] = {}


def register_source(function: Source) -> Source:
    """Make a source available as `data.name=<its own name>`; its parameters become options of the data group.

    A source yields {"messages": [{"role", "content"}, …]}, {"source": …, "target": …} or {"text": …}, with "id" and
    "where" if it knows them; everything else in it, such as "tools", is given to a chat template that reads it. It is
    given data.path, data.subset and data.split if it has parameters of those names.
    """
    _SOURCES[function.__name__] = function
    return function


def check_source(config: DataConfig) -> None:
    """Refuse a source or options that the registry does not know, before anything is read. Raises ConfigError."""
    given = ("path", "subset", "split", "raw_rows")  # of which a source gets what it has parameters for
    for name, (part, _) in parts_of(config).items():
        where = f"data.sources.{name}" if name else "data"
        if part.name not in _SOURCES:
            hint = did_you_mean(part.name, sorted(_SOURCES)) + ". For your own: KDX_PLUGINS=module"
            raise ConfigError(f"{where}.name", f"no source is named {part.name!r}", hint)
        check_options(_SOURCES[part.name], part.options, f"{where}.", given=given)


def parts_of(config: DataConfig) -> dict[str, tuple[DataConfig, float]]:
    """Return each source of a mixture as a config of its own, and its share of the counted tokens. Raises ConfigError.

    A source has what it says, else what its layout in conf/data says, else what the mixture says. Data that is no mixture
    is its own only source, without a name.
    """
    if config.name != "mix":
        return {"": (config, 1.0)}
    sources = config.options.get("sources")
    hint = "data.sources.a='{layout: messages, path: chat.jsonl, weight: 0.7}'"
    if not isinstance(sources, dict) or not sources or not all(isinstance(given, dict) for given in sources.values()):
        raise ConfigError("data.sources", "names no sources", f"Give each a layout, a path and a weight: {hint}")
    if not config.shuffle:
        raise ConfigError("data.shuffle", "is false, but a mixture samples its rows", "Leave it out")
    general = {key: value for key, value in config.model_dump().items() if key not in (*ONE_SOURCES, "sources")}
    found, weights = {}, {}
    for name, given in sources.items():
        where, weight = f"data.sources.{name}", given.get("weight")
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ConfigError(f"{where}.weight", f"is {weight!r}, expected a number above 0", hint)
        if "chat_template" in given:
            raise ConfigError(f"{where}.chat_template", "cannot be set for one source", "Set data.chat_template")
        own = {key: value for key, value in given.items() if key not in ("layout", "weight")}
        keys = {"subset": None, "split": "train", "take": None} | general | _layout(given.get("layout"), where) | own
        try:
            found[name] = DataConfig(**keys)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ConfigError(f"{where}.{fault['loc'][0]}", fault["msg"], "conf/data has its keys") from None
        weights[name] = float(weight)
    return {name: (part, weights[name] / sum(weights.values())) for name, part in found.items()}


def _layout(name: Any, where: str) -> Tree:
    """Read the keys that a layout of conf/data and those it builds on set themselves. Raises ConfigError."""
    folder = resources.files("kdx.conf") / "data"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"{where}.layout", f"is {name!r}", f"Choices: {', '.join(set(names) - {'mix'})}")
    keys = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    below: Tree = {}
    for base in keys.pop("defaults", []):
        if base not in ("_self_", "custom"):
            below |= _layout(base, where)
    return {key: value for key, value in (below | keys).items() if value != "???"}


def read_conversations(config: DataConfig, encoder: Any = None) -> Conversations:
    """Read data.path, then data.validation if that is a file or split, and check every row.

    Faults are collected, not raised. encoder: knows what the chat template reads; all else in a row is counted as
    unused. Where bad rows are skipped, so are those that the template refuses.
    """
    check_source(config)
    found = Conversations()
    own, *held_out = what_is_read(config)
    _read(own, found, encoder)
    found.num_train = len(found)
    for part in held_out:
        _read(part, found, encoder)
    return found


def split(config: DataConfig, found: Conversations) -> tuple[list[int], list[int]]:
    """Choose the rows to train on, in their order, and the held-out rows, both as numbers; count dropped copies.

    A row's rank is a digest of data.seed and its id, so that adding rows moves no other.
    """
    num_rows, wanted = found.num_train, config.validation

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{config.seed}:{found.ids[i]}".encode()).digest()

    if isinstance(wanted, str):
        held_out = list(range(num_rows, len(found)))
    else:
        number = max(1, round(wanted * num_rows)) if isinstance(wanted, float) else wanted or 0
        held_out = heapq.nsmallest(number, range(num_rows), key=rank)
    same = {found.digests[i] for i in held_out}
    train = [i for i in range(num_rows) if found.digests[i] not in same]
    num_equal = num_rows - sum(i < num_rows for i in held_out) - len(train)
    found.counts["dropped"]["equal to a held-out row"] += num_equal
    if config.take is not None:
        if config.take > len(train):
            found.counts["said"][f"all training rows are used, fewer than data.take={config.take}"] = len(train)
        train = sorted(heapq.nsmallest(config.take, train, key=rank))
    return train, held_out


def _options(config: DataConfig) -> dict[str, Any]:
    """What the source is given: data's further keys, and of these what it has parameters for."""
    given: dict[str, Any] = {"path": config.path, "subset": config.subset, "split": config.split}
    given["raw_rows"] = read_rows(**given)  # nothing is read yet
    names = given.keys() & inspect.signature(_SOURCES[config.name]).parameters.keys()
    return {name: given[name] for name in names} | config.options


def _read(config: DataConfig, found: Conversations, encoder: Any) -> None:
    """Run the source and check what it yields, all faults in one pass."""
    faults, first, num_rows = list[DataError](), len(found), 0
    try:
        for num_rows, item in enumerate(_SOURCES[config.name](**_options(config)), 1):
            try:
                if isinstance(item, DataError):
                    raise item
                if isinstance(item, Dropped):
                    found.count([("dropped", item.rule)])
                    continue
                whole = item if isinstance(item, Conversation) else _checked(item, f"{config.name}[{num_rows - 1}]")
                conversation, counts = _trimmed(whole, *(encoder.names if encoder else (set(), set())))
                if encoder and config.on_bad_row == "skip":
                    encoder.rendered(conversation)
                found.append(conversation, counts)
            except DataError as error:
                faults.append(error)
    except DataError as error:  # not of a row: a file that cannot be read, which on_bad_row does not excuse
        found.faults.append(error)
    found.num_read += num_rows
    most = config.max_bad_rows * num_rows if isinstance(config.max_bad_rows, float) else config.max_bad_rows
    if config.on_bad_row == "stop":
        found.faults += faults
    elif most is not None and len(faults) > most:
        what = f"{len(faults)} of {num_rows} rows are bad, and data.max_bad_rows is {config.max_bad_rows}"
        found.faults += [DataError("data", what, "Fix them, or raise it"), *faults]
    elif faults:
        found.counts["dropped"]["bad row (data.on_bad_row=skip)"] += len(faults)
        log.warning("skipped %d bad rows, the first: %s", len(faults), faults[0])
    _make_ids_unique(found, first)


def _make_ids_unique(found: Conversations, first: int) -> None:
    """Give each row an id of its own that does not depend on its position.

    Rows that share an id and differ in text get a part of their text's digest; equal rows are numbered.
    """
    texts, copies = dict[str, str](), Counter[str]()
    names = zip(found.ids[first:], found.digests[first:], strict=True)
    shared = {name for name, digest in names if texts.setdefault(name, digest) != digest}
    for i in range(first, len(found)):
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
    pair = [{"role": "user", "content": row.get("source")}, {"role": "assistant", "content": row.get("target")}]
    turns = _messages(row.get("messages", pair), "messages", where)
    return Conversation(_id_of(row), turns, where, variables=columns)


def _id_of(row: dict[str, Any]) -> str:
    given = row.get("id")
    return str(given).encode(errors="backslashreplace").decode() if isinstance(given, str | int) else ""


def _trimmed(whole: Conversation, variables: set[str], keys: set[str]) -> tuple[Conversation, Counts]:
    """Cut off an unanswered last turn and all that the chat template does not read → the rest, what is to be counted.

    variables, keys: what it reads beside the messages, and of a message. Raises DataError.
    """
    where = whole.where
    last = max((i for i, m in enumerate(whole.messages) if m["role"] == "assistant"), default=-1)
    if last < 0 and not whole.text:
        raise DataError(where, "has no message of the assistant", "The student learns the assistant's turns: add one")
    messages = whole.messages[: last + 1]
    unlearned = [i for i, m in enumerate(messages) if _is_unlearned(m, f"{where}: messages[{i}]")]
    columns = {name: _parsed(value) for name, value in whole.variables.items()}
    columns = {name: value for name, value in columns.items() if value not in (None, "", [], {})}
    unused = {f"column {name}" for name in columns.keys() - variables}
    for message in messages:
        for name in message.keys() - {"role", "content"} - keys:
            if name == "tool_calls" and not message["content"]:
                what = "has only tool_calls, which the chat template does not write"
                raise DataError(where, what, "Give a data.chat_template that writes them, or leave the row out")
            unused.add(f"key {name} of messages")
            del message[name]
    counts = [("unused", what) for what in sorted(unused)]
    if whole.note:
        counts.append(("said", whole.note))
    if len(messages) < len(whole.messages):
        counts.append(("changed", "unanswered last turn cut off"))
    read = {name: columns[name] for name in sorted(columns.keys() & variables)}
    rest = replace(whole, messages=messages, variables=read, unlearned=unlearned)
    return replace(rest, id=rest.id or rest.digest[:32]), counts


def _is_unlearned(message: dict[str, Any], where: str) -> bool:
    """Take `weight` and `train` out of a message → whether the student only reads it. Raises DataError."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or train not in (0, 1):
        what = f"weight is {kind_of(weight)} and train {kind_of(train)}"
        raise DataError(where, what, "A message counts (1, true) or does not (0, false)")
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
    turns: Any, column: str, where: str, role_key: str = "role", content_key: str = "content", roles: Any = None
) -> Messages:
    """Check a list of messages, and name roles and keys as everywhere; other keys are kept. Raises DataError.

    It may be JSON text. In a list of texts user and assistant take turns. Blank system messages are left out.
    """
    turns = _parsed(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns:
        hint = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        hint += ", or choose data=pairs for a prompt and a text" if column == "chosen" else ""
        raise DataError(where, f'"{column}" is {kind_of(turns)}, expected a list of messages', hint)
    if all(isinstance(turn, str) for turn in turns):
        turns = [{role_key: ("user", "assistant")[i % 2], content_key: said} for i, said in enumerate(turns)]
    messages = []
    for i, turn in enumerate(turns):
        place = f"{where}: messages[{i}]"
        calls = isinstance(turn, dict) and _parsed(turn.get("tool_calls"))
        if not isinstance(turn, dict) or not {role_key, *(() if calls else (content_key,))} <= turn.keys():
            what = f'is {kind_of(turn)}, expected an object with "{role_key}" and "{content_key}"'
            raise DataError(place, what, "Name them: data.role_key, data.content_key")
        role = turn[role_key]
        if isinstance(role, str):
            role = (roles or {}).get(role, role)
        if role not in ROLES:
            hint = f"Roles are {', '.join(ROLES)}; map others with data.roles, as in data.roles.bot=assistant"
            raise DataError(place, f"the role is {kind_of(role)}", hint)
        content = _joined_parts(turn.get(content_key))
        own = (role_key, content_key, "role", "content")
        more = {k: v for k, v in (turn | {"tool_calls": calls}).items() if k not in own and v not in (None, [], {})}
        if role in ("system", "developer") and not str(content or "").strip():
            if not more:
                continue
            content = ""
        elif not (calls and content in (None, "")) and not (role not in ROLES[:4] and content == ""):
            content = text_in(content, content_key, place)
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise DataError(place, f'"tool_calls" is {kind_of(calls)}, expected a list of objects', "Fix the row")
        messages.append({"role": role, "content": content, **more})
    return messages


def _chat_in(value: Any, role_key: str = "role") -> list[Any] | None:
    """Return a list of messages, which may be JSON text; None of anything else, such as an answer that is JSON."""
    turns = _parsed(value)
    is_chat = isinstance(turns, list) and turns and isinstance(turns[0], dict) and role_key in turns[0]
    return turns if is_chat else None


def _joined_parts(content: Any) -> Any:
    """Join a content that is a list of text parts, as chat APIs have it; anything else stays."""
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts: list[Any] = [part.get("text") for part in parts if part.get("type", "text") == "text"]
    is_text = texts and len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if is_text else content


class RawRow:
    """A row of a file: its columns, which of them were read, and a note on how, if that is to be said."""

    def __init__(self, where: str, columns: dict[str, Any]) -> None:
        self.where, self.columns, self.note = where, columns, ""
        self.used: set[Any] = {"id"}

    def column(self, column: str, name: str) -> Any:
        """Return a column, which data.NAME_column names. Raises DataError."""
        self.used.add(column)
        if column not in self.columns:
            what = f'"{column}" is missing; the row is {kind_of(self.columns)}'
            choices = "Choose a layout (data=pairs, messages, sharegpt or text), or name the column"
            hint = f"{choices}: data.{name}_column=..."
            if "chosen" in self.columns:
                hint = "Choose data=pairs if there is a prompt, else data=messages data.messages_column=chosen"
            raise DataError(self.where, what, hint)
        return self.columns[column]

    def after_prompt(self, column: str, prompt: Messages, answer: Messages) -> Messages:
        """Put the prompt that a column has before an answer without an opening; it is used if it is in there already."""
        if answer and answer[0]["role"] == "assistant":
            answer = prompt + answer
        if answer[: len(prompt)] == prompt:
            self.used.add(column)
        return answer


def _conversations(
    raw_rows: Iterable[Item],
    read: Callable[[RawRow], Messages | str],
    system_column: str | None = None,
    system_prompt: str | None = None,
) -> Iterator[Conversation | DataError]:
    """Yield what rows of files say, and the faults of the others.

    read: a row → its checked messages, or a text. The filled system_prompt, else what is in the system_column, goes
    before messages that have no system text.
    """
    prompt = RowTemplate("data.system_prompt", system_prompt) if system_prompt else None
    for item in raw_rows:
        try:
            if isinstance(item, DataError):
                raise item
            where, columns = item
            if not isinstance(columns, dict):
                raise DataError(where, f"is {kind_of(columns)}, expected an object", "Write one JSON object a row")
            row = RawRow(where, columns)
            said = read(row)
            text, turns = (said, []) if isinstance(said, str) else ("", said)
            if turns and turns[0]["role"] != "system":
                system = prompt.fill(columns, where) if prompt else columns.get(system_column)
                if isinstance(system, str) and system.strip():
                    turns = [{"role": "system", "content": system}, *turns]
                    row.used |= prompt.names if prompt else {system_column}
            rest = {name: value for name, value in columns.items() if name not in row.used}
            yield Conversation(_id_of(columns), turns, where, text, rest, note=row.note)
        except DataError as error:
            yield error


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a value in it is null (allow for it: {{ name or '' }})")
    return value


SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null)


class RowTemplate:
    """A sandboxed Jinja template over the columns of a row. Raises ConfigError if it is not Jinja."""

    def __init__(self, key: str, text: str) -> None:
        self.key = key
        try:
            self.template, self.names = SANDBOX.from_string(text), meta.find_undeclared_variables(SANDBOX.parse(text))
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


@register_source
def pairs(
    raw_rows: Any,
    source_column: str,
    target_column: str,
    system_column: str | None,
    system_prompt: str | None,
    template: dict[str, str],
) -> Iterator[Any]:
    """Instruction pairs: one user turn, one assistant turn, each a sandboxed Jinja template over the row's columns.

    In the templates `source` and `target` are the two columns, under whatever name; all others go by their own. A row
    that lacks one may have trl's: prompt, and completion or chosen, as text or as lists of messages.
    """
    if template.keys() != {"user", "assistant"}:
        raise ConfigError("data.template", f"has the keys {', '.join(template)}", "Give it user and assistant")
    templates = {role: RowTemplate(f"data.template.{role}", template[role]) for role in ("user", "assistant")}
    needed, own = set().union(*(one.names for one in templates.values())), (source_column, target_column)
    wanted = {column for name, column in zip(("source", "target"), own, strict=True) if name in needed}

    def read(row: RawRow) -> Messages:
        names, is_default = own, own == ("source", "target")
        if not {*own} & row.columns.keys() or (is_default and not wanted <= row.columns.keys()):
            names = next((pair for pair in PREFERENCES if {*pair} <= row.columns.keys()), own)
        if names != own:
            row.note = f"source and target are the columns {' and '.join(names)}"
        chats = [_chat_in(row.columns.get(name)) for name in names]
        if any(chats):
            row.used.add(names[1])
            opening, answer = (
                _messages(chat or [{"role": role, "content": row.columns.get(name)}], name, row.where)
                for role, chat, name in zip(templates, chats, names, strict=True)
            )
            return row.after_prompt(names[0], opening, answer)
        row.used |= needed | {*names}
        values = dict(row.columns)
        for name, column in zip(("source", "target"), names, strict=True):
            if name in needed:
                hint = f"Fix the row, or name another column: data.{name}_column=..."
                values[name] = text_in(row.column(column, name), column, row.where, hint)
        return [{"role": role, "content": one.fill(values, row.where)} for role, one in templates.items()]

    return _conversations(raw_rows, read, system_column, system_prompt)


@register_source
def messages(
    raw_rows: Any,
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
    how = (role_key, content_key, roles)

    def read(row: RawRow) -> Messages:
        turns = _messages(row.column(messages_column, "messages"), messages_column, row.where, *how)
        prompt = row.columns.get("prompt") if messages_column in ("completion", "chosen") else None
        if not prompt or not isinstance(prompt, str | list):
            return turns
        opening = _messages(_chat_in(prompt, role_key) or [prompt], "prompt", row.where, *how)
        whole = row.after_prompt("prompt", opening, turns)
        row.note = f"the column prompt goes before {messages_column}" if len(whole) > len(turns) else ""
        return whole

    return _conversations(raw_rows, read, system_column, system_prompt)


@register_source
def text(raw_rows: Any, text_column: str) -> Iterator[Any]:
    """Plain text: a column of it; every token counts, and the end-of-text token after it."""
    return _conversations(raw_rows, lambda row: text_in(row.column(text_column, "text"), text_column, row.where))


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
            yield {"messages": turns[:max_turns], "id": name, "where": f"{file.name}:{name}"}
