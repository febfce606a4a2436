"""Conversations → tokens, and which of them the student must learn; kept under $KDX_CACHE as memory-mapped arrays."""

import ctypes
import datetime
import functools
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice, takewhile, zip_longest
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import torch
import xxhash
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader
from transformers.utils.chat_template_utils import render_jinja_template

from kdx.config import DataConfig
from kdx.data.batches import Row, Rows, write_rows
from kdx.data.files import origins_of
from kdx.data.sources import COUNTERS, Conversation, Conversations, Messages, parts_of, read_conversations, split
from kdx.errors import DataError, first_of, one_line
from kdx.run.devices import num_cores
from kdx.run.files import cache_dir, hash_json, locked, whole_folder
from kdx.run.identity import content_hash
from kdx.tokenizer import SharedTokenizer

CHUNK = 512  # conversations given to a process at once
MAX_NEW_TOKENS = 48  # of an answer to a held-out prompt
MOST_PROCESSES = 8  # each takes some 100 MB of its own
MARK = "\ue000\ue001"  # said in addition; private characters, so that no template treats it specially
TEMPLATE = "data.chat_template"
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # around what the assistant says, if a template marks it
CLOCK = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")  # a template that writes today's date
JOINED_BY_END_OF_TEXT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
LONG = "longer than data.max_length"
QUOTED = "tool_calls arguments given as a string, which the chat template quotes again: use objects"
ENDLESS = "turns that do not end with a special token: the student will not learn where to stop"
UNPROMPTED = "turns that do not begin with the chat template's generation prompt, which the student will be given"

NOT_COLUMNS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "dict", "range"}
REASONING = {"reasoning_content", "reasoning", "thinking"}  # names of one thing, which transformers gives templates
Prompts = list[dict[str, Any]]  # {"messages", "text", "tokens", "reference"}
Span = tuple[int, int, int]  # of an assistant turn in the text: start, end of its words, end


@dataclass
class Encoded:
    """What becomes of one conversation: rows, or why there are none."""

    rows: list[Row] = field(default_factory=list)
    fault: DataError | None = None
    counts: list[tuple[str, str]] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)  # the token that ends each counted turn, the last turn's last


@dataclass
class Data:
    """The rows of a run."""

    train: Rows
    held_out: Rows
    prompts: Prompts  # of the sample answers
    dropped: dict[str, int]  # rule → number of rows
    changed: dict[str, int]
    said: dict[str, int]  # how rows were read, and what the template leaves out → number of rows
    unused: dict[str, int]  # parts of rows that nothing reads
    fingerprint: str  # of the training rows as the models see them
    held_out_fingerprint: str
    template: str  # where the chat template is from
    stops: list[int]  # ids of the tokens that end counted turns, the one that ends most conversations first


def load_data(config: DataConfig, shared: SharedTokenizer, num_prompts: int = 0) -> Data:
    """Read, check and tokenise the data of a run, or map what a run with the same data has left in the cache.

    Gives the tokenizer the run's chat template. Processes that ask for the same data at once wait for the first one.
    num_prompts: conversations whose opening leaves room for an answer. Raises DataError with all faults.
    """
    if config.name == "mix":
        return _load_mix(config, shared, num_prompts)
    template = prepare_tokenizer(shared, config)
    encoder = Encoder(shared, config)
    root = cache_dir() / "data"
    root.mkdir(parents=True, exist_ok=True)
    about = _digest(config, shared, num_prompts)
    with locked(root / f"{about}.lock"):
        found, origins = None, origins_of(config)
        if origins is None:
            found = read_conversations(config, encoder)
            origins = [found.content()]
        content = "".join(one if isinstance(one, str) else content_hash(one) for one in origins)
        folder = root / hash_json([about, content])
        if not folder.is_dir():
            with whole_folder(folder) as beside:
                found = found or read_conversations(config, encoder)
                _encode_all(config, found, encoder, beside, num_prompts)
    known = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return Data(Rows(folder / "train"), Rows(folder / "held_out"), template=template, **known)


def _load_mix(config: DataConfig, shared: SharedTokenizer, num_prompts: int) -> Data:
    """Load each source of a mixture, and join them. An epoch has as many rows of each as its weight allows."""
    parts = parts_of(config)
    loaded = {name: load_data(part, shared, num_prompts) for name, (part, _) in parts.items()}
    counted = {name: int(data.train.num_counted.sum()) for name, data in loaded.items()}
    size = min(counted[name] / share for name, (_, share) in parts.items())  # until the first source has no row left
    drawn = {
        name: max(1, round(len(loaded[name].train) * share * size / counted[name]))
        for name, (_, share) in parts.items()
    }
    counters = {
        counter: {f"{name}: {rule}": n for name, data in loaded.items() for rule, n in getattr(data, counter).items()}
        for counter in COUNTERS
    }
    fingerprints = [[data.fingerprint, data.held_out_fingerprint] for data in loaded.values()]
    turns = zip_longest(*(data.prompts for data in loaded.values()))
    return Data(
        Rows.joined({name: data.train for name, data in loaded.items()}, drawn),
        Rows.joined({name: data.held_out for name, data in loaded.items()}),
        [prompt for turn in turns for prompt in turn if prompt][:num_prompts],
        fingerprint=xxhash.xxh3_64_hexdigest(json.dumps([fingerprints, drawn]).encode()),
        held_out_fingerprint=hash_json(fingerprints, xxhash.xxh3_64_hexdigest),
        template=next(iter(loaded.values())).template,
        stops=list(dict.fromkeys(stop for data in loaded.values() for stop in data.stops)),
        **counters,
    )


def _digest(config: DataConfig, shared: SharedTokenizer, num_prompts: int) -> str:
    """All that decides the rows but the content of the data: keys, tokenizer, template and the code itself."""
    elsewhere = ("shuffle", "max_length", "chat_template")  # not of the rows, or resolved in the arguments
    keys = {name: value for name, value in config.model_dump().items() if name not in elsewhere}
    code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    tokenizer = shared.tokenizer
    words = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()]
    limits = [shared.max_length, sorted(shared.foreign), num_prompts]
    return hash_json([version("transformers"), version("tokenizers"), code, words, keys, limits])


def _encode_all(config: DataConfig, found: Conversations, encoder: "Encoder", folder: Path, num_prompts: int) -> None:
    """Tokenise the rows of a run and write them into a folder. Raises DataError."""
    stops = Counter[int]()  # the tokens that end turns, by how many rows they end

    def rows_of(numbers: Sequence[int]) -> Iterator[Row]:
        for encoded in _all_encoded(encoder, found, numbers):
            found.count(encoded.counts)
            stops.update(dict.fromkeys(encoded.stops, 0))
            stops.update(encoded.stops[-1:])
            if encoded.fault:
                found.faults.append(encoded.fault)
            yield from encoded.rows

    # Where there are faults already, all rows are read for theirs.
    train, held_out = (range(len(found)), range(0)) if found.faults else split(config, found)
    digests = [write_rows(folder / "train", rows_of(train)), write_rows(folder / "held_out", rows_of(held_out))]
    if found.faults:
        raise first_of(found.faults, found.num_read)
    counts = {name: +counter for name, counter in found.counts.items()}
    for name, kind in (("train", "training"), ("held_out", "held-out")):
        if not len(Rows(folder / name)) and (name == "train" or config.validation is not None):
            rules = "; ".join(f"{number} {rule}" for rule, number in counts["dropped"].items())
            what = f"no {kind} row is left ({rules or 'all are held out'})"
            raise DataError("data", what, "Raise data.max_length, lower data.validation, or give other data")
    known = {
        "fingerprint": digests[0],
        "held_out_fingerprint": digests[1],
        "prompts": [*islice(encoder.prompts(found[i] for i in held_out or train), num_prompts)],
        "stops": [token for token, _ in stops.most_common()],
    }
    (folder / "data.json").write_text(json.dumps(known | counts), encoding="utf-8")


def _all_encoded(encoder: "Encoder", found: Conversations, numbers: Sequence[int]) -> Iterator[Encoded]:
    """Encode these conversations on all cores, or here if they are few. Elsewhere than on Linux forking is not safe."""
    num = min(num_cores(), MOST_PROCESSES, len(numbers) // (8 * CHUNK)) if sys.platform == "linux" else 0
    num_workers = num if num > 1 else 0
    chunks: Any = DataLoader(
        numbers,  # type: ignore[arg-type]
        CHUNK,
        collate_fn=lambda some: [encoder.encode(found[i]) for i in some],
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # it draws a seed: not from training's own numbers
    )
    for some in track(chunks, "Tokenising", console=Console(stderr=True), transient=True, disable=not num_workers):
        yield from some


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the run ends its processes itself
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with a run that is killed


class Encoder:
    """Turns conversations into rows under one tokenizer and chat template."""

    def __init__(self, shared: SharedTokenizer, config: DataConfig) -> None:
        self.tokenizer, self.max_length, self.foreign = shared.tokenizer, shared.max_length, shared.foreign
        self.on_long, self.assistant_only = config.on_long, config.assistant_only
        self.day, self.options = datetime.date.fromisoformat(config.template_date), config.template_options
        # The end of a turn is a special token in most templates; ids, not text, so that content cannot fake one.
        added = self.tokenizer.added_tokens_decoder.values()
        ends = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        self.end_ids = {*self.tokenizer.convert_tokens_to_ids([*ends])}
        self.special = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or "(?!)")
        template = template_text(self.tokenizer)
        self.marks_generation = bool(GENERATION.search(template))
        self.names = names_in(template)

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokenise a conversation → its rows: one, more if it is long and split, or none."""
        try:
            text, spans, said = self.rendered(conversation)
        except DataError as error:
            return Encoded(fault=error)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, where = encoding["input_ids"], conversation.where
        if conversation.text:  # after the beginning of text, if the tokenizer writes one; before the end of text
            first, last = beginning(self.tokenizer), self.tokenizer.eos_token_id
            stops = [] if last is None else [last]
            tokens, counted = [*first, *tokens, *stops], [False] * len(first) + [True] * (len(tokens) + len(stops))
        else:
            counted, stops = self._count(tokens, encoding["offset_mapping"], spans)
        found = Encoded(counts=[("said", what) for what in sorted(said | (set() if stops else {ENDLESS}))], stops=stops)
        if alien := self.foreign.intersection(tokens):
            what = f"the token {self.tokenizer.convert_ids_to_tokens(min(alien))!r} is unknown to one of the two models"
            return Encoded(fault=DataError(where, what, "Use a data.chat_template that both models know"))
        if len(tokens) > self.max_length:
            if self.on_long == "error":
                what = f"the row has {len(tokens)} tokens, data.max_length is {self.max_length}"
                return Encoded(fault=DataError(where, what, "Raise it, or set data.on_long=truncate or split"))
            if self.on_long == "drop":
                return Encoded(counts=[*found.counts, ("dropped", LONG)], stops=stops)
            found.counts.append(("changed", f"{LONG}, split" if self.on_long == "split" else LONG))
        pieces = islice(self._split(tokens, counted), None if self.on_long == "split" else 1)
        for number, (some, counts) in enumerate(pieces, 1):
            # What comes after the last counted token changes nothing in a causal model, and costs time.
            end = max((i + 1 for i, is_counted in enumerate(counts) if is_counted), default=0)
            if end >= 2:  # nothing predicts the first token
                name = conversation.id if number == 1 else f"{conversation.id}#{number}"
                found.rows.append(Row(name, some[:end], counts[:end], where))
        if not found.rows:
            found.counts.append(("dropped", "no counted token left"))
        return found

    def _split(self, tokens: list[int], counted: list[bool]) -> Iterator[tuple[list[int], list[bool]]]:
        """Cut a row into pieces of at most max_length: each begins with the last token of the one before.

        So every counted token is predicted once, by a row that begins as the tokenizer's rows do.
        """
        first = tokens[:1] if tokens[:1] == [self.tokenizer.bos_token_id] else []
        size = self.max_length - len(first)
        yield tokens[: self.max_length], counted[: self.max_length]
        for start in range(self.max_length - 1, len(tokens) - 1, max(1, size - 1)):
            head = len(first) + 1  # the overlap was counted before
            yield first + tokens[start : start + size], [False] * head + counted[start + 1 : start + size]

    def prompts(self, conversations: Iterable[Conversation]) -> Iterator[dict[str, Any]]:
        """Yield conversations up to the assistant's first turn that leave room for an answer, and that turn, rendered."""
        for conversation in conversations:
            messages = list(takewhile(lambda message: message["role"] != "assistant", conversation.messages))
            if not any(m["role"] == "user" for m in messages):
                continue
            reference = str(conversation.messages[len(messages)]["content"] or "")
            with suppress(DataError):  # of a template that repeats the turn elsewhere
                reference = self.turn_of(conversation, len(messages))
            text = self._prefix(conversation, messages, add_generation_prompt=True)
            text += self.header if text else ""
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if reference and text and len(tokens) + MAX_NEW_TOKENS <= self.max_length:
                yield {"messages": messages, "text": text, "tokens": tokens, "reference": reference}

    def turn_of(self, conversation: Conversation, i: int) -> str:
        """Return the assistant's i-th turn as a student that learnt it says it. Raises DataError if it is not found."""
        text, _ = self._render(conversation, conversation.messages)
        start, _, end = self._turn(conversation, text, i, set())
        tokens = self.tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def rendered(self, conversation: Conversation) -> tuple[str, list[Span], set[str]]:
        """Render a conversation → text, where each counted turn is in it, and what is to be noted, such as what is left out.

        Raises DataError if the template refuses the row, or leaves out what must not be.
        """
        if conversation.text:
            return conversation.text, [], set()
        text, marked = self._render(conversation, conversation.messages)
        said, unlearned = self._left_out(conversation, text), conversation.unlearned
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not self.assistant_only:
            if unlearned:
                what = "has a message of weight 0, and data.assistant_only=false counts every token"
                raise DataError(conversation.where, what, "Set data.assistant_only=true")
            return text, [(0, len(text), len(text))], said
        if not self.marks_generation:
            return text, [self._turn(conversation, text, i, said) for i in turns if i not in unlearned], said
        if unlearned:
            if len(marked) != len(turns):
                raise _unfit(conversation)
            marked = [span for i, span in zip(turns, marked, strict=True) if i not in unlearned]
        return text, [self._marked_turn(text, *span) for span in marked], said

    def _marked_turn(self, text: str, start: int, end: int) -> Span:
        """Complete a turn that {% generation %} marks: the token that ends it is the block's last, or follows it."""
        words_end = start + len(text[start:end].rstrip())
        tokens = self.special.finditer(text, start)
        if close := next((t for t in tokens if t.end() == words_end or t.start() == end), None):
            words_end, end = close.start(), max(end, close.end())
        return start, words_end, end

    def _turn(self, conversation: Conversation, text: str, i: int, said: set[str]) -> Span:
        """Find the assistant's i-th message in the rendered text: all behind its prompt. Raises DataError.

        It ends where the conversation that stops here does. A token that is there only because the conversation goes
        on (gpt-oss: <|end|> for <|return|>) is not the assistant's.
        """
        messages, message = conversation.messages, conversation.messages[i]
        behind = self._behind(text, conversation, messages, i)
        words_end = len(text) - len(behind)
        prompt = self._prefix(conversation, messages[:i], add_generation_prompt=True)
        if not prompt:
            start = text.rfind((message["content"] or MARK).strip(), 0, words_end)
        elif text.startswith(prompt):
            start = len(prompt)
        else:  # it writes earlier messages otherwise than in the prompt, as tools before the last question
            rest = self._behind(text, conversation, messages, i - 1)
            asked = self._behind(prompt, conversation, messages[:i], i - 1, add_generation_prompt=True)
            same = num_same(rest, asked)
            if same < len(asked):
                said.add(UNPROMPTED)
            start = len(text) - len(rest) + same
            marked = {**message, "content": f"{MARK}{message['content'] or ''}"}
            marked_text = self._prefix(conversation, [*messages[:i], marked, *messages[i + 1 :]])
            if MARK in marked_text:  # the prompt and the words may begin alike, as <think> and <b>
                start = min(start, num_same(text, marked_text))
        start += len(self.header) if text.startswith(self.header, start) else 0
        alone = text if message is messages[-1] else self._prefix(conversation, messages[: i + 1])
        end = len(alone)
        if not alone or not text.startswith(alone):
            end = words_end + num_same(behind, self._behind(alone, conversation, messages[: i + 1], i))
        if not 0 <= start <= words_end <= end:
            raise _unfit(conversation)
        closing = list(takewhile(lambda token: token.start() < end, self.special.finditer(text, words_end)))
        if closing and closing[-1].end() > end:
            end = closing.pop().start()
        if closing:  # a special token may close a call, too: the last one ends the turn
            words_end, end = closing[-1 if message.get("tool_calls") else 0].span()
        return start, words_end, end

    def _behind(self, text: str, conversation: Conversation, messages: Messages, i: int, **options: Any) -> str:
        """Return what a text of these messages has behind the words of the i-th: it is the same if that says more."""
        longer, _ = self._render(conversation, _saying_more(messages, i), **options)
        if longer.count(MARK) != 1:
            raise _unfit(conversation)
        return text[len(text) - num_same(text[::-1], longer[::-1]) :]

    @functools.cached_property
    def header(self) -> str:
        """What the template writes before an answer and leaves out of the prompt: those that know no prompts do."""
        chat = Conversation("", [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}], "")
        prompt, without = (self._prefix(chat, chat.messages[:1], add_generation_prompt=ask) for ask in (True, False))
        header = self._prefix(chat, chat.messages).partition(MARK)[0].removeprefix(prompt)
        return header if prompt == without and header.strip() else ""

    def _left_out(self, conversation: Conversation, text: str) -> set[str]:
        """Find what the template leaves out of a rendered conversation → in words. Raises DataError for a whole turn."""
        said, messages = set[str](), conversation.messages

        def is_there(words: Any) -> bool:
            return str(words).strip() in text or json.dumps(words, ensure_ascii=False).strip('"') in text

        def look_for(what: str, parts: list[Any]) -> None:
            if not all(map(is_there, parts)):
                said.add(f"{what} dropped or rewritten by the chat template")

        for name, value in conversation.variables.items():
            parts = texts_in(value) if isinstance(value, list | dict) else []  # a text may be a switch
            if not any(map(is_there, parts)):
                look_for(f"column {name}", parts)
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"] or ""
            if role == "assistant":
                *thinking, words = re.split("</?think>", content)
                look_for("thinking", thinking)
                look_for("assistant text", [words])
            elif content.strip() not in text and MARK not in self._prefix(conversation, _saying_more(messages, i)):
                if role not in ("system", "developer"):
                    what = f"messages[{i}]: the chat template leaves out the role {role}"
                    raise DataError(conversation.where, what, "Map it: data.roles, or give a data.chat_template")
                look_for(f"{role} text", [content])
            for key in message.keys() - {"role", "content", "tool_calls"}:
                look_for(key, texts_in(message[key]))
            for call in message.get("tool_calls", []):
                function = call.get("function", call)
                look_for("tool_calls", [function.get("name"), *texts_in(arguments := function.get("arguments"))])
                if isinstance(arguments, str) and is_there(arguments) and arguments.strip() not in text:
                    said.add(QUOTED)
        return said

    def _render(
        self, conversation: Conversation, messages: Messages, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages → the text, and what {% generation %} blocks mark in it. Raises DataError."""
        try:
            texts, marked = render_jinja_template(
                [[{k: v for k, v in message.items() if v is not None} for message in messages]],
                chat_template=self._dated(conversation),
                return_assistant_tokens_mask=self.marks_generation,
                **self.tokenizer.special_tokens_map,
                **self.options | conversation.variables | options,
            )
        except Exception as error:  # its own raise_exception, or anything that a template can do wrong
            what = f"the chat template refuses the conversation: {one_line(error) or type(error).__name__}"
            raise DataError(conversation.where, what, "Fix the row, or give a data.chat_template") from None
        return texts[0], marked[0] if marked else []

    def _dated(self, conversation: Conversation) -> str:
        """The template of a conversation, with the run's day in place of today: else no row is the same tomorrow."""
        template = self.tokenizer.get_chat_template(tools=conversation.variables.get("tools"))
        return CLOCK.sub(lambda found: json.dumps(self.day.strftime(found[1] or found[2])), template)

    def _prefix(self, conversation: Conversation, messages: Messages, **options: Any) -> str:
        """The first messages of a conversation alone; empty if the template refuses them."""
        try:
            return self._render(conversation, messages, **options)[0] if messages else ""
        except DataError:
            return ""

    def _count(
        self, tokens: list[int], offsets: list[tuple[int, int]], spans: list[Span]
    ) -> tuple[list[bool], list[int]]:
        """Mark each turn's tokens → which count, and the special tokens that end turns.

        A turn that no special token ends counts as a whole: its last characters are what ends it. A token that reaches
        into the turn has its first letters, and counts.
        """
        counted, stops, at = [False] * len(tokens), list[int](), 0
        for start, words_end, end in spans:
            while at < len(tokens) and offsets[at][1] <= start:
                at += 1
            while at < len(tokens) and offsets[at][0] < end:
                counted[at] = True
                stops += [tokens[at]] if offsets[at][0] >= words_end and tokens[at] in self.end_ids else []
                at += 1
        if not self.assistant_only:  # the turn's end is among the last tokens, at most a line break follows
            stops = [token for token in tokens[-2:] if token in self.end_ids][-1:]
        return counted, stops


def _unfit(conversation: Conversation) -> DataError:
    what = "the chat template leaves out, repeats or rewrites the assistant's words"
    return DataError(conversation.where, what, "Set data.assistant_only=false, or give a data.chat_template")


def texts_in(value: Any) -> list[Any]:
    """Return the texts and numbers anywhere in a nested value."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in texts_in(part)]
    return [] if value is None or isinstance(value, bool) else [value]


def _saying_more(messages: Messages, i: int) -> Messages:
    """Put a mark at the end of what the i-th message says: of its last tool call's arguments, or of its content."""
    message = messages[i]
    more = {**message, "content": f"{message['content']}{MARK}"}
    if calls := message.get("tool_calls"):
        function = calls[-1].get("function", calls[-1])
        given = function.get("arguments")
        last = {**function, "arguments": {**given, MARK: ""} if isinstance(given, dict) else f"{given}{MARK}"}
        last = {**calls[-1], "function": last} if "function" in calls[-1] else last
        more = {**message, "tool_calls": [*calls[:-1], last]}
    return [*messages[:i], more, *messages[i + 1 :]]


def num_same(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def template_text(tokenizer: Any) -> str:
    """Return the text of a tokenizer's chat templates; some have several, by name."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def names_in(template: str) -> tuple[set[str], set[str]]:
    """Find what a chat template reads → variables beside the messages, and keys of messages: any words in it."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
    variables = {name for name in jinja2.meta.find_undeclared_variables(tree) if not name.endswith("_token")}
    keys = set(re.findall(r"\w+", template))
    return variables - NOT_COLUMNS, keys | (REASONING if keys & REASONING else set())


def beginning(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer writes before a text by itself: its beginning of text, or none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def prepare_tokenizer(shared: SharedTokenizer, config: DataConfig) -> str:
    """Give the tokenizer the run's chat template, so that it is saved with the student → where it is from, in words.

    Raises DataError if there is none, or it is not Jinja.
    """
    tokenizer, where = shared.tokenizer, shared.template
    if config.chat_template:
        where, tokenizer.chat_template = TEMPLATE, config.chat_template
        if "{" not in config.chat_template:
            path = Path(config.chat_template).expanduser()
            if not path.is_file():
                raise DataError(TEMPLATE, f"{path} is not a file", "Give a file, or Jinja text with {{ }}")
            tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise DataError(TEMPLATE, "the tokenizer has neither a template nor an end-of-text token", "Give one")
        where, tokenizer.chat_template = "turns joined by the end-of-text token", JOINED_BY_END_OF_TEXT
        if beginning(tokenizer):  # as the model read it in training; without it Gemma's perplexity is in the billions
            where += f", after {tokenizer.bos_token}"
            tokenizer.chat_template = "{{ bos_token }}" + JOINED_BY_END_OF_TEXT
    template = template_text(tokenizer)
    try:
        variables, _ = names_in(template)
    except jinja2.TemplateSyntaxError as error:
        what = f"is not Jinja: {one_line(error.message or '')} (line {error.lineno})"
        raise DataError(TEMPLATE, what, "Fix it, or give another") from None
    for name in config.template_options.keys() - variables:
        what, hint = f"the chat template does not read {name}", f"It reads {', '.join(sorted(variables)) or 'none'}"
        raise DataError("data.template_options", what, hint)
    if beginning(tokenizer) and "bos_token" not in template and tokenizer.bos_token not in template:
        where += f"; it does not begin with {tokenizer.bos_token}, which the tokenizer puts before plain text"
    if "strftime_now" in template:
        where += f"; it prints today's date, fixed to {config.template_date} (data.template_date)"
    return where
