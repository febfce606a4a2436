"""Conversations → tokens, and which of them the student must learn; kept under $KDX_CACHE as memory-mapped arrays."""

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from os.path import commonprefix
from pathlib import Path
from typing import Any

import xxhash
from jinja2 import TemplateSyntaxError
from rich.console import Console
from rich.progress import track
from transformers.utils.chat_template_utils import render_jinja_template

from kdx.config import DataConfig, as_dict
from kdx.data.batches import Row, Rows, write_rows
from kdx.data.files import at_home, source_files
from kdx.data.sources import Conversation, Conversations, read_conversations, split
from kdx.errors import DataError, first_of, one_line
from kdx.run.devices import num_cores
from kdx.run.files import cache_dir, locked, whole_folder
from kdx.run.identity import content_hash

log = logging.getLogger(__name__)

CHUNK = 512  # conversations given to a process at once
MOST_PROCESSES = 8  # each takes some 100 MB of its own
MARK = "\ue000{}\ue001"  # stands for a message's content; private characters, so that no template treats it specially
TEMPLATE = "data.chat_template"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a block in which a template marks what the assistant says
JOINED_BY_END_OF_TEXT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
FALLBACK = "turns joined by the end-of-text token"

Span = tuple[int, int, int]  # of an assistant turn in the text: start, end of its words, end
Outcome = Row | DataError | str  # a row, what is wrong with it, or the rule by which it is dropped


@dataclass
class Data:
    """The rows of a run."""

    train: Rows
    held_out: Rows
    prompts: list[dict[str, Any]]  # of the sample answers: {"messages", "text", "reference"}
    dropped: Counter[str]  # rule → number of rows
    changed: Counter[str]
    fingerprint: str  # of the training rows as the models see them
    held_out_fingerprint: str
    template: str  # where the chat template is from


def load_data(
    config: DataConfig, tokenizer: Any, max_length: int, num_prompts: int = 0, answer_length: int = 0
) -> Data:
    """Read, check and tokenise the data of a run, or map what a run with the same data has left in the cache.

    Gives the tokenizer the run's chat template. Processes that ask for the same data at once wait for the first one.
    num_prompts: conversations whose opening leaves room for an answer of `answer_length` tokens. Raises DataError with
    all faults.
    """
    template = prepare_tokenizer(tokenizer, config)
    encoder = Encoder(tokenizer, max_length, config.on_long, config.assistant_only)
    root = cache_dir() / "data"
    root.mkdir(parents=True, exist_ok=True)
    about = _digest(config, tokenizer, max_length, num_prompts, answer_length)
    with locked(root / f"{about}.lock"):
        files = source_files(config)
        found = read_conversations(config, root, encoder.rendered) if files is None else None
        content = found.content() if found is not None else "".join(map(content_hash, files or []))
        folder = root / xxhash.xxh3_128_hexdigest((about + content).encode())
        if not folder.is_dir():
            found = found or read_conversations(config, root, encoder.rendered)
            with whole_folder(folder) as beside:
                _encode_all(config, found, encoder, beside, num_prompts, answer_length)
    known = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    for note in known.pop("notes"):
        log.warning("%s", note)
    known |= {name: Counter(known[name]) for name in ("dropped", "changed")}
    return Data(Rows(folder / "train"), Rows(folder / "held_out"), **known, template=template)


def _digest(config: DataConfig, tokenizer: Any, *numbers: int) -> str:
    """All that decides the rows but the content of the data: keys, tokenizer, template and the code itself."""
    elsewhere = ("shuffle", "max_length", "chat_template")  # not of the rows, or resolved in the arguments
    keys = {name: value for name, value in as_dict(config).items() if name not in elsewhere}
    code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    words = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()]
    made = [version("transformers"), version("tokenizers"), code, words, keys, numbers]
    return xxhash.xxh3_128_hexdigest(json.dumps(made, sort_keys=True, default=str).encode())


def _encode_all(
    config: DataConfig, found: Conversations, encoder: "Encoder", folder: Path, num_prompts: int, answer_length: int
) -> None:
    """Tokenise the rows of a run and write them into a folder. Raises DataError."""
    faults, dropped, changed = found.faults, found.dropped, found.changed

    def rows_of(numbers: Sequence[int]) -> Iterator[Row]:
        for outcome, is_truncated in _outcomes(encoder, found, numbers):
            changed["longer than data.max_length"] += is_truncated
            if isinstance(outcome, Row):
                yield outcome
            elif isinstance(outcome, DataError):
                faults.append(outcome)
            else:
                dropped[outcome] += 1

    if faults:  # the others' faults are shown along with them
        deque(rows_of(range(len(found))), maxlen=0)
        raise first_of(faults)
    parts = dict(zip(("train", "held_out"), split(config, found), strict=True))
    digests = [write_rows(folder / name, rows_of(numbers)) for name, numbers in parts.items()]
    if faults:
        raise first_of(faults)
    for name, numbers in parts.items():
        if numbers and not len(Rows(folder / name)):
            rules = "; ".join(f"{number} {rule}" for rule, number in (+dropped).items())
            kind = "training" if name == "train" else "held-out"
            raise DataError("data", f"no {kind} row is left ({rules})", "Raise data.max_length, or give other data")
    opened = (found[i] for i in parts["held_out"] or parts["train"])
    known = {
        "fingerprint": digests[0],
        "held_out_fingerprint": digests[1],
        "prompts": encoder.prompts(opened, num_prompts, answer_length),
        "dropped": +dropped,
        "changed": +changed,
        "notes": found.notes,
    }
    (folder / "data.json").write_text(json.dumps(known), encoding="utf-8")


_work: tuple["Encoder", Conversations] | None = None  # of a process that encodes


def _outcomes(encoder: "Encoder", found: Conversations, numbers: Sequence[int]) -> Iterator[tuple[Outcome, bool]]:
    """Encode these conversations on all cores, or here if they are few. Elsewhere than on Linux forking is not safe."""
    num_processes = min(num_cores(), MOST_PROCESSES, len(numbers) // (8 * CHUNK)) if sys.platform == "linux" else 1
    if num_processes < 2:
        yield from (encoder.encode(found[i]) for i in numbers)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_processes, context, _start_worker, (encoder, found)) as pool:
        done = pool.map(_encode, numbers, chunksize=CHUNK)
        yield from track(done, "Tokenising", len(numbers), console=Console(stderr=True), transient=True)


def _start_worker(encoder: "Encoder", found: Conversations) -> None:
    global _work
    _work = encoder, found
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the run ends its processes itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """End a process that encodes when its run was killed: it would wait for work, with all its memory, forever."""
    if run := multiprocessing.parent_process():
        run.join()
        os._exit(1)


def _encode(number: int) -> tuple[Outcome, bool]:
    assert _work is not None
    encoder, found = _work
    return encoder.encode(found[number])


class Encoder:
    """Turns conversations into rows under one tokenizer and chat template."""

    def __init__(self, tokenizer: Any, max_length: int, on_long: str, assistant_only: bool) -> None:
        self.tokenizer, self.max_length, self.on_long = tokenizer, max_length, on_long
        self.assistant_only = assistant_only
        # The end of a turn is a special token in most templates; ids, not text, so that content cannot fake one.
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.end_ids, self.ends = set(tokenizer.all_special_ids) | set(special), tuple(special.values())
        self.marks_generation = bool(GENERATION.search(tokenizer.chat_template or ""))
        self._edges: dict[tuple[str, ...], dict[int, tuple[int, int]]] = {}

    def encode(self, conversation: Conversation) -> tuple[Outcome, bool]:
        """Tokenise → the row, what is wrong with it, or the rule that drops it; and whether it was truncated."""
        try:
            text, spans = self.rendered(conversation)
        except DataError as error:
            return error, False
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = encoding["input_ids"]
        is_long = len(tokens) > self.max_length
        if is_long and self.on_long == "error":
            what = f"the row has {len(tokens)} tokens, data.max_length is {self.max_length}"
            return DataError(conversation.where, what, "Raise it, or set data.on_long=truncate"), False
        if is_long and self.on_long == "drop":
            return "longer than data.max_length", False
        counted = self._count(tokens, encoding["offset_mapping"], spans)
        # What comes after the last counted token changes nothing in a causal model, and costs time.
        end = max((i + 1 for i, counts in enumerate(counted[: self.max_length]) if counts), default=0)
        if end < 2:  # nothing predicts the first token
            return "no counted token left", is_long
        return Row(conversation.id, tokens[:end], counted[:end], conversation.where), is_long

    def prompts(self, conversations: Iterable[Conversation], number: int, room: int) -> list[dict[str, Any]]:
        """The first conversations up to the assistant's first turn that leave room for an answer, and that turn."""
        found: list[dict[str, Any]] = []
        for conversation in conversations if number else ():
            messages = list(takewhile(lambda message: message["role"] != "assistant", conversation.messages))
            if not any(m["role"] == "user" for m in messages):
                continue
            text = self._prefix(conversation, messages, add_generation_prompt=True)
            length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if text and length + room <= self.max_length:
                reference = conversation.messages[len(messages)]["content"]
                found.append({"messages": messages, "text": text, "reference": reference})
            if len(found) == number:
                break
        return found

    def rendered(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Render the chat template, and find each assistant turn in the text. Raises DataError if it refuses the row.

        A content is found by a mark in its place: what stands before and after the mark is the template's, even if it
        rewrites contents.
        """
        if self.assistant_only and self.marks_generation:
            return self._generated(conversation)
        text = self._template(conversation, conversation.messages)
        if not self.assistant_only:
            return text, [(0, len(text), len(text))]
        spans = []
        for i, (lead, tail) in self._edges_of(conversation).items():
            mark, marked = MARK.format(i), [*conversation.messages]
            marked[i] = {"role": "assistant", "content": mark}
            before, is_there, after = self._template(conversation, marked).partition(mark)
            start, end = len(before) - lead, len(text) - len(after)
            if not (is_there and text.startswith(before[:start]) and text.endswith(after) and start <= end):
                raise _unfit(conversation)
            spans.append((start, start + len(text[start:end].rstrip()), end + tail))
        return text, spans

    def _generated(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text, and the turns that the template's own {% generation %} marks, each with the token that ends it."""
        try:
            (text,), (marked,) = render_jinja_template(
                conversations=[conversation.messages],
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _refused(conversation, error) from None
        spans = []
        for start, end in marked:
            words = text[start:end].rstrip()
            if not words.endswith(self.ends):
                end += next((len(token) for token in self.ends if text.startswith(token, end)), 0)
            spans.append((start, start + len(words), end))
        return text, spans

    def _edges_of(self, conversation: Conversation) -> dict[int, tuple[int, int]]:
        """How far each assistant turn reaches beyond its content, to both sides; the same for the same roles.

        What follows the generation prompt is the assistant's to say.
        """
        roles = tuple(message["role"] for message in conversation.messages)
        if roles in self._edges:
            return self._edges[roles]
        marked = [{"role": role, "content": MARK.format(i)} for i, role in enumerate(roles)]
        text = self._template(conversation, marked)
        edges = {}
        for i, mark in ((i, marked[i]["content"]) for i, role in enumerate(roles) if role == "assistant"):
            if text.count(mark) != 1:
                raise _unfit(conversation)
            start = text.index(mark)
            end = start + len(mark)
            prompt = self._prefix(conversation, marked[:i], add_generation_prompt=True)
            ignored = prompt == self._prefix(conversation, marked[:i])  # add_generation_prompt: then a header, or space
            has_prompt = text.startswith(prompt) and not (ignored and text[len(prompt) : start].strip())
            # The turn ends where the conversation, stopped here, ends or continues differently; under a template that
            # writes a last turn in another way, before the next content.
            same = len(commonprefix([text, self._prefix(conversation, marked[: i + 1])]))  # noqa: RUF071 (characters)
            if same < end:
                same = text.find(MARK[0], end) if MARK[0] in text[end:] else len(text)
            edges[i] = (start - len(prompt) if has_prompt else 0, same - end)
        self._edges[roles] = edges
        return edges

    def _template(self, conversation: Conversation, messages: list[dict[str, str]], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # its own raise_exception, or anything that a template can do wrong
            raise _refused(conversation, error) from None

    def _prefix(self, conversation: Conversation, messages: list[dict[str, str]], **options: Any) -> str:
        """The first messages of a conversation alone; empty if the template refuses them."""
        try:
            return self._template(conversation, messages, **options) if messages else ""
        except DataError:
            return ""

    def _count(self, tokens: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> list[bool]:
        """Mark each assistant turn's tokens up to and with the special token that ends it.

        A turn that no special token ends counts as a whole: its last characters are what ends it. A token that reaches
        into the turn has its first letters, and counts.
        """
        counted = [False] * len(tokens)
        at = 0
        for start, words_end, end in spans:
            while at < len(tokens) and offsets[at][0] < start and offsets[at][1] <= start:
                at += 1
            first = at
            while at < len(tokens) and offsets[at][0] < end:
                at += 1
                if self.assistant_only and offsets[at - 1][0] >= words_end and tokens[at - 1] in self.end_ids:
                    break
            counted[first:at] = [True] * (at - first)
        return counted


def _refused(conversation: Conversation, error: Exception) -> DataError:
    what = f"the chat template refuses the conversation: {one_line(error) or type(error).__name__}"
    return DataError(conversation.where, what, "Fix the row, or give a data.chat_template")


def _unfit(conversation: Conversation) -> DataError:
    what = "the chat template leaves out, repeats or rewrites the assistant's words"
    return DataError(conversation.where, what, "Set data.assistant_only=false, or give a data.chat_template")


def prepare_tokenizer(tokenizer: Any, config: DataConfig) -> str:
    """Give the tokenizer the run's chat template, so that it is saved with the student → where it is from, in words.

    Raises DataError if there is none, or it is not Jinja.
    """
    where = "the tokenizer's own"
    if config.chat_template:
        where = TEMPLATE
        tokenizer.chat_template = config.chat_template
        if "{" not in config.chat_template:
            path = at_home(config.chat_template, TEMPLATE)
            if not path.is_file():
                raise DataError(TEMPLATE, f"{path} is not a file", "Give a file, or Jinja text with {{ }}")
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        try:
            render_jinja_template([], chat_template=tokenizer.chat_template)  # of no conversation: it only compiles
        except TemplateSyntaxError as error:
            what = f"is not Jinja: {one_line(error.message or '')} (line {error.lineno})"
            raise DataError(TEMPLATE, what, "Fix it, or give another") from None
    elif not tokenizer.chat_template:
        if tokenizer.eos_token is None:
            raise DataError(TEMPLATE, "the tokenizer has neither a template nor an end-of-text token", "Give one")
        where, tokenizer.chat_template = FALLBACK, JOINED_BY_END_OF_TEXT
    return where
