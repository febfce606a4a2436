"""Rows of text → checked conversations, split into what is trained on and what is held out."""

import hashlib
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdx.config import DataConfig, replaced
from kdx.data.files import kind_of, missing, read_rows, resolve_path, text_in
from kdx.data.templates import RowTemplate, Unbounded, each
from kdx.errors import SKIP, ConfigError, DataError, did_you_mean, first_of, same_in_all, together
from kdx.plugins import option_faults

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages with roles and text; the last one is the assistant's."""

    id: str
    messages: list[dict[str, str]]
    where: str

    @property
    def digest(self) -> str:
        """A digest of the text, the same wherever the row stands."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Dropped:
    """A row that a source leaves out, and the rule by which."""

    rule: str


@dataclass
class Dataset:
    """Conversations to train on and to measure on, and how many rows fell to which rule."""

    train: list[Conversation]
    validation: list[Conversation]
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


Refused = Callable[[list[Conversation]], list[DataError | None]]


@dataclass
class _Found:
    """What reading comes upon: faults that stop the run, and how many rows fell to which rule."""

    refused: Refused | None  # says which rows are bad beyond their text, where bad ones are skipped
    faults: list[DataError] = field(default_factory=list)
    is_unreadable: bool = False  # a file among the faults, which data.on_bad_row does not excuse
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


Source = Callable[..., Iterable[Any]]
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
        mend = did_you_mean(config.name, sorted(_SOURCES)) + ". One's own: KDX_PLUGINS=module"
        raise ConfigError("data.name", f"no source is named {config.name!r}", mend)
    function = _SOURCES[config.name]
    options = {**_given(config, function), **config.options}
    found = option_faults(function, options, "data.")
    if found:
        raise together(found)


def load_data(
    config: DataConfig,
    also: Callable[[list[Conversation]], list[DataError]] | None = None,
    refused: Refused | None = None,
) -> Dataset:
    """Read the source, check every row, hold out rows for measuring. Raises DataError with all faults found.

    also: finds faults in rows that are sound as text; asked only when others are found, so that all are said at once.
    refused: why the chat template refuses a row, or None; asked only where bad rows are skipped, for all of them.
    """
    check_source(config)
    found = _Found(refused if config.on_bad_row == "skip" else None)
    rows = _checked(config, found)
    others = _others(config, found)
    dropped, changed = found.dropped, found.changed
    if found.faults:
        is_excusable = config.on_bad_row == "stop" and not found.is_unreadable
        faults = [*found.faults, *(also([*rows, *(others or [])]) if also else [])]
        raise first_of(same_in_all(faults) if not rows else faults, SKIP if is_excusable else "Mend them")
    if not rows:
        if not dropped:
            raise DataError("data.path", f"{config.path or config.name} holds no rows", "Give data that has some")
        rules = "; ".join(f"{count} rows: {rule}" for rule, count in dropped.items())
        raise DataError("data", f"no row is left ({rules})", "Loosen the rule, or give other data")
    held_out = _held_out(config, rows) if others is None else others
    if others == []:
        raise DataError("data.validation", f"{config.validation} has no usable row", "Give another file or split")
    chosen, same = {id(c) for c in held_out}, {c.digest for c in held_out}
    rest = [c for c in rows if id(c) not in chosen]
    train = [c for c in rest if c.digest not in same]
    if len(train) < len(rest):
        dropped["equal to a held-out row"] += len(rest) - len(train)
    if not train:
        what = f"{config.validation} of {len(rows)} rows leave none to train on"
        mend = "Hold out fewer rows, or give more data"
        if len(rows) > 1 and len({c.digest for c in rows}) == 1:
            what = f"all {len(rows)} rows are copies of one, and copies are held out together"
            mend = "Give rows that differ"
        raise DataError("data.validation", what, mend)
    if config.take is not None:
        if config.take > len(train):
            log.warning("data.take=%d, but there are %d training rows: all are used", config.take, len(train))
        taken = {id(c) for c in sorted(train, key=lambda c: _rank(config.seed, c))[: config.take]}
        train = [c for c in train if id(c) in taken]
    return Dataset(train, held_out, dropped, changed)


def _rank(seed: int, conversation: Conversation) -> str:
    """A row's place in an order that depends on the seed and the row alone, so that adding rows moves no other."""
    return hashlib.sha256(f"{seed}:{conversation.id}".encode()).hexdigest()


def _others(config: DataConfig, found: _Found) -> list[Conversation] | None:
    """The rows of a file or split that is held out as a whole, if the config names one."""
    wanted = config.validation
    if not isinstance(wanted, str):
        return None
    if wanted.startswith("split:"):
        return _checked(replaced(config, split=wanted.removeprefix("split:")), found)
    return _checked(replaced(config, path=wanted), found)


def _held_out(config: DataConfig, rows: list[Conversation]) -> list[Conversation]:
    wanted = config.validation
    if wanted is None:
        return []
    number = wanted if isinstance(wanted, int) else max(1, round(wanted * len(rows)))
    if number >= len(rows):
        what = f"is {wanted}: {number} of {len(rows)} rows held out leave none to train on"
        raise DataError("data.validation", what, "Hold out fewer rows, or give more data")
    return sorted(rows, key=lambda c: _rank(config.seed, c))[:number]


def _given(config: DataConfig, function: Source) -> dict[str, Any]:
    """Those of path, subset and split that the source has parameters for."""
    common = {"path": config.path, "subset": config.subset, "split": config.split}
    return {name: value for name, value in common.items() if name in inspect.signature(function).parameters}


def _checked(config: DataConfig, found: _Found) -> list[Conversation]:
    """Run the source and check what it yields, all faults in one pass."""
    function = _SOURCES[config.name]
    faults: list[DataError] = []
    rows: list[Conversation] = []
    dropped, before, is_unreadable = found.dropped, found.dropped.total(), False
    items = function(**_given(config, function), **config.options)
    if not isinstance(items, Iterable):
        what = f"the source {config.name} returns {kind_of(items)}, expected rows"
        raise DataError("data.name", what, "Let it yield each row, or return a list of them")
    try:
        for i, item in enumerate(items):
            try:
                if isinstance(item, Dropped):
                    dropped[item.rule] += 1
                elif isinstance(item, DataError):
                    faults.append(item)
                else:
                    rows.append(_conversation(item, f"{config.name}[{i}]", found.changed))
            except DataError as error:
                faults.append(error)
    except DataError as error:  # not of a row: a file that cannot be read, which on_bad_row does not excuse
        found.is_unreadable = is_unreadable = True
        faults.append(error)
    num_rows = len(rows) + len(faults) + dropped.total() - before
    if found.refused:
        told = found.refused(rows)
        faults += [fault for fault in told if fault]
        rows = [row for row, fault in zip(rows, told, strict=True) if fault is None]
    most = config.max_bad_rows * num_rows if isinstance(config.max_bad_rows, float) else config.max_bad_rows
    if faults and (is_unreadable or config.on_bad_row == "stop"):
        found.faults += faults
    elif faults and most is not None and len(faults) > most:
        what = f"{len(faults)} of {num_rows} rows are bad, and data.max_bad_rows is {config.max_bad_rows}"
        found.faults += [DataError("data", what, "Mend them, or raise it"), *faults]
    elif faults:
        dropped["bad row (data.on_bad_row=skip)"] += len(faults)
        log.warning("skipped %d bad rows, the first: %s", len(faults), faults[0])
    return _with_own_ids(rows)


def _with_own_ids(rows: list[Conversation]) -> list[Conversation]:
    """Give each row an id of its own that does not depend on where it stands.

    Rows that share an id and differ in text are told apart by their text; equal rows are numbered.
    """
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row.id, set()).add(row.digest)
    copies: Counter[str] = Counter()
    named = []
    for row in rows:
        name = row.id if len(texts[row.id]) == 1 else f"{row.id}~{row.digest[:12]}"
        copies[name] += 1
        named.append(replace(row, id=name if copies[name] == 1 else f"{name}~{copies[name]}"))
    return named


def _conversation(item: Any, where: str, changed: Counter[str]) -> Conversation:
    """Check one yielded row. Raises DataError."""
    if not isinstance(item, dict):
        raise DataError(where, f"is {kind_of(item)}, expected an object", "Write one JSON object a row")
    where = str(item.get("where", where))
    if "messages" in item:
        messages = item["messages"]
    elif "source" in item and "target" in item:
        messages = [{"role": "user", "content": item["source"]}, {"role": "assistant", "content": item["target"]}]
    else:
        what = f'has neither "messages" nor "source" and "target"; it has: {", ".join(map(str, item)) or "nothing"}'
        raise DataError(where, what, "Map the columns: data.messages_column=, data.source_column=, data.target_column=")
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else kind_of(messages)
        mend = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        raise DataError(where, f'"{item.get("column", "messages")}" is {what}, expected a list of messages', mend)
    for i, message in enumerate(messages):
        at = f"{where}: messages[{i}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _not_a_message(message, "role", "content", at)
        if message["role"] not in ROLES:
            mend = f"Roles are {', '.join(ROLES)}; map others with data.roles, as in '+data.roles.bot=assistant'"
            raise DataError(at, f"the role is {kind_of(message['role'])}", mend)
        text_in(message["content"], "content", at)
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            what = f'"content" has half of a surrogate pair (\\u{ord(error.object[error.start]):04x}), which is no text'
            raise DataError(at, what, "Was the text cut in the middle of an emoji? Mend it") from None
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(where, "no message is the assistant's", "The assistant's turns are what is learnt: add one")
    if messages[-1]["role"] != "assistant":
        changed["unanswered last turn cut off"] += 1
    while messages[-1]["role"] != "assistant":
        messages.pop()
    digest = Conversation("", messages, where).digest
    own = item.get("id")
    named = isinstance(own, str | int) and not isinstance(own, bool) and str(own)
    return Conversation(str(own).encode(errors="backslashreplace").decode() if named else digest[:32], messages, where)


def _objects(path: str | list[str], subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]] | DataError]:
    """The rows of files that have columns, and the faults of the others."""
    for item in read_rows(path, subset, split):
        if isinstance(item, DataError) or isinstance(item[1], dict):
            yield item
        else:
            yield DataError(item[0], f"is {kind_of(item[1])}, expected an object", "Write one JSON object a row")


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
    renders = {role: RowTemplate(template.get(role), f"data.template.{role}") for role in ("user", "assistant")}
    for key in template.keys() - renders.keys():
        raise ConfigError(f"data.template.{key}", "is not a key of kdx", "Known: user, assistant")

    def filled(item: tuple[str, dict[str, Any]] | DataError) -> Any:
        if isinstance(item, DataError):
            raise item
        where, row = item
        messages = [{"role": "system", "content": system}] if system else []
        for role, text in renders.items():
            own = {name: _column(row, columns[name], name, where) for name in columns if name in text.needs}
            messages.append({"role": role, "content": text.render(row | own, row, where)})
        return messages

    is_plain = all(text.is_plain for text in renders.values())
    try:
        for item, told in each(filled, _objects(path, subset, split), is_plain=is_plain):
            is_bad = isinstance(told, DataError)
            yield told if is_bad else {"messages": told, "id": item[1].get("id"), "where": item[0]}
    except Unbounded as fault:
        raise DataError(fault.item[0], f"data.template {fault} for this row", "Mend the template") from None


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
    for item in _objects(path, subset, split):
        if isinstance(item, DataError):
            yield item
            continue
        where, row = item
        if messages_column not in row:
            yield missing(messages_column, "messages", row, where)
        else:
            chat = row[messages_column]
            try:
                if isinstance(chat, list):
                    chat = [
                        _renamed(m, role_key, content_key, roles, f"{where}: messages[{i}]") for i, m in enumerate(chat)
                    ]
                yield {"messages": chat, "id": row.get("id"), "where": where, "column": messages_column}
            except DataError as error:
                yield error


def _renamed(message: Any, role_key: str, content_key: str, roles: dict[str, str], where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not {role_key, content_key} <= message.keys():
        raise _not_a_message(message, role_key, content_key, where)
    role = message[role_key]
    return {"role": roles.get(role, role) if isinstance(role, str) else role, "content": message[content_key]}


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
    if not file.is_file():
        raise DataError("data.path", f"{file} does not exist", "Run: pip install --no-deps chitchat-dataset")
    try:
        chats = {
            name: [" ".join(said["text"] for said in turn).strip() for turn in chat["messages"]]
            for name, chat in json.loads(file.read_text(encoding="utf-8")).items()
        }
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        mend = "Say what it holds: data=pairs, data=messages or data=sharegpt"
        raise DataError("data.path", f"{file} is not the chit-chat data set", mend) from None
    for name, turns in chats.items():
        if len(turns) < min_turns:
            yield Dropped("fewer turns than data.min_turns")
        elif not all(turns[:max_turns]):
            yield Dropped("an empty turn")
        else:
            chat = [{"role": ROLES[1 + i % 2], "content": turn} for i, turn in enumerate(turns[:max_turns])]
            yield {"messages": chat, "id": name, "where": f"{file.name}:{name}"}
