"""Conversations → tokens, and which of them the student must learn to say."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateSyntaxError

from kdx.config import DataConfig
from kdx.data.batches import Row
from kdx.data.files import at_home
from kdx.data.sources import Conversation
from kdx.data.templates import LONGEST, Unbounded, bounded, each, fault_of, is_plain
from kdx.errors import SKIP, DataError, first_of

log = logging.getLogger(__name__)

TOKENISED_TOGETHER = 512  # conversations given to the tokenizer at once: its threads share them
ROUND = 50  # characters of a message, written as a dict, besides its content
MARK = "\ue000{}\ue001"  # stands for a message's content; private characters, so that no template takes it for anything
TEMPLATE = "data.chat_template"
Span = tuple[int, int, int]  # of an assistant turn in the text: start, end of what is said, end
TALK = [
    {"role": role, "content": content}
    for role, content in zip(
        ("system", *("user", "assistant") * 2), ("Be brief.", "Hello", "Hi!", "So?", "Yes."), strict=True
    )
]
JOINED_BY_END_OF_TEXT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around contents: literals[0], content of message order[0], literals[1], …

    An assistant turn begins `lead` characters before its content (what follows the generation prompt is the
    assistant's to say) and ends at most `tail` characters after it.
    """

    literals: list[str]
    order: list[int]
    edges: dict[int, tuple[int, int]]  # message → (lead, tail)


@dataclass
class Encoder:
    """Turns a conversation into a Row under one tokenizer and chat template."""

    tokenizer: Any
    max_length: int
    on_long: str
    assistant_only: bool

    def __post_init__(self) -> None:
        # The end of a turn is a special token in most templates; ids, not text, so that content cannot fake one.
        self.end_ids = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self.dropped, self.truncated = Counter[str](), Counter[str]()
        self._frames: dict[tuple[str, ...], Frame] = {}
        self._kept: dict[int, tuple[list[dict[str, str]], Any]] = {}  # messages, by their id, and what became of them
        self._is_plain = is_plain(self.tokenizer.chat_template)
        # What a template writes for each message: its own text, and as often as it may a special token or all of a row.
        template = str(self.tokenizer.chat_template)
        self._often = len(re.findall(r"\{\{|[+~]", template))
        self._always = len(template) + self._often * len(str(self.tokenizer.special_tokens_map))

    def encode(self, *parts: Sequence[Conversation]) -> list[list[Row]]:
        """Tokenise, and count what was dropped or truncated under which rule. Raises DataError with all faults."""
        encoded = [self._encoded(conversations) for conversations in parts]
        refused = _of_template([fault for _, found, _ in encoded for fault in found], sum(map(len, parts)))
        faults = refused + [fault for _, _, found in encoded for fault in found]
        if faults:
            raise first_of(faults, SKIP if refused else "Mend them")
        return [rows for rows, _, _ in encoded]

    def faults(self, conversations: Sequence[Conversation]) -> list[DataError]:
        """What encode would refuse."""
        _, refused, long = self._encoded(conversations)
        return [*_of_template(refused, len(conversations)), *long]

    def refused(self, conversations: Sequence[Conversation]) -> list[DataError | None]:
        """Why the chat template refuses each conversation, or None; encode renders none of them again."""
        told = list(self._each(self._render, conversations))
        self._kept |= {id(conversation.messages): (conversation.messages, text) for conversation, text in told}
        refused = [text if isinstance(text, DataError) else None for _, text in told]
        for fault in _of_template([fault for fault in refused if fault], len(refused)):
            if fault.args[0] == TEMPLATE:
                raise fault
        return refused

    def prompts(self, conversations: Sequence[Conversation], number: int, room: int) -> list[dict[str, Any]]:
        """The first conversations up to the assistant's first turn that leave room for an answer, and what was said."""

        def text_of(conversation: Conversation) -> str | None:
            messages = _opening(conversation)
            has_user = any(m["role"] == "user" for m in messages)
            return self._template(conversation, messages, add_generation_prompt=True) if has_user else None

        found: list[dict[str, Any]] = []
        for conversation, text in self._each(text_of, conversations):
            if isinstance(text, str) and self._length(text) + room <= self.max_length:
                messages = _opening(conversation)
                said = conversation.messages[len(messages)]["content"]
                found.append({"messages": messages, "text": text, "reference": said})
            if len(found) == number:
                break
        return found

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _each(
        self, function: Callable[[Conversation], Any], conversations: Sequence[Conversation]
    ) -> Iterator[tuple[Conversation, Any]]:
        """Each conversation and what the template makes of it, or why it refuses it. Raises DataError if that has no end."""
        try:
            yield from each(function, conversations, is_plain=self._is_plain and self._is_small)
        except Unbounded as fault:
            what = f"the chat template {fault} for this row"
            raise DataError(fault.item.where, what, "Give another: data.chat_template=FILE") from None

    def _is_small(self, conversation: Conversation) -> bool:
        """Whether a plain template cannot make too much of it, even if it writes all messages for each message."""
        size = sum(len(message["content"]) + ROUND for message in conversation.messages)
        return len(conversation.messages) * (self._always + self._often * size) <= LONGEST

    def _encoded(self, conversations: Sequence[Conversation]) -> tuple[list[Row], list[DataError], list[DataError]]:
        """The rows, what the chat template refuses, and what is too long where that is an error."""
        rows: list[Row] = []
        refused: list[DataError] = []
        long: list[DataError] = []
        for rendered in _together(self._rendered(conversations), refused):
            texts = [text for _, text, _ in rendered]
            encoding = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            tokenised = zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True)
            for (conversation, _, spans), tokens, offsets in tokenised:
                row = Row(conversation.id, tokens, self._count(tokens, offsets, spans), conversation.where)
                is_long = len(tokens) > self.max_length
                if is_long and self.on_long == "error":
                    what = f"the row has {len(tokens)} tokens, data.max_length is {self.max_length}"
                    long.append(DataError(conversation.where, what, "Raise it, or set data.on_long=truncate"))
                    continue
                if is_long and self.on_long == "truncate":
                    row = row.up_to(self.max_length)
                    self.truncated["longer than data.max_length"] += 1
                if is_long and self.on_long == "drop":
                    self.dropped["longer than data.max_length"] += 1
                elif row.num_counted == 0:
                    self.dropped["no counted token left"] += 1
                else:
                    rows.append(row.without_tail())
        return rows, refused, long

    def _rendered(self, conversations: Sequence[Conversation]) -> Iterator[tuple[Conversation, Any]]:
        """Each conversation and its rendering, or why the template refuses it."""
        if all(id(conversation.messages) in self._kept for conversation in conversations):
            return ((c, self._kept.pop(id(c.messages))[1]) for c in conversations)
        return self._each(self._render, conversations)

    def _render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text under the chat template, and each assistant turn in it."""
        text = self._template(conversation, conversation.messages)
        if not self.assistant_only:
            return text, [(0, len(text), len(text))]
        frame = self._frame(conversation)
        places = _places(text, frame, conversation.messages) or self._rewritten(conversation, text, frame)
        spans = []
        for i, (lead, tail) in frame.edges.items():
            start, end = places[i][0] - lead, places[i][1]
            spans.append((start, start + len(text[start:end].rstrip()), end + tail))
        return text, spans

    def _frame(self, conversation: Conversation) -> Frame:
        """Render marks in place of the contents: they show where each content stands, whatever the contents say."""
        roles = tuple(message["role"] for message in conversation.messages)
        if roles in self._frames:
            return self._frames[roles]
        marked = [{"role": role, "content": MARK.format(i)} for i, role in enumerate(roles)]
        text = self._template(conversation, marked)
        pieces = re.split(MARK.format(r"(\d+)"), text)
        literals, order = pieces[0::2], [int(number) for number in pieces[1::2]]
        said = [i for i, role in enumerate(roles) if role == "assistant"]
        if [i for i in order if i in said] != said:
            raise _unfit(conversation)
        edges = {}
        for i in said:
            start = text.index(marked[i]["content"])
            end = start + len(marked[i]["content"])
            prompt = self._prefix(conversation, marked[:i], add_generation_prompt=True)
            ignored = prompt == self._prefix(conversation, marked[:i])  # add_generation_prompt: then a header, or space
            has_prompt = text.startswith(prompt) and not (ignored and text[len(prompt) : start].strip())
            # The turn ends where the conversation, stopped here, ends or goes on differently; under a template that
            # writes a last turn in another way, before the next content.
            stopped = self._prefix(conversation, marked[: i + 1])
            same = len(commonprefix([text, stopped]))  # noqa: RUF071 (characters, not parts of a path)
            tail = same - end if same >= end else len(literals[order.index(i) + 1])
            edges[i] = (start - len(prompt) if has_prompt else 0, tail)
        self._frames[roles] = Frame(literals, order, edges)
        return self._frames[roles]

    def _rewritten(self, conversation: Conversation, text: str, frame: Frame) -> dict[int, tuple[int, int]]:
        """Find each assistant turn under a template that rewrites contents: mark one, and see what stays the same."""
        messages, places = conversation.messages, {}
        for i, (lead, _) in frame.edges.items():
            mark = MARK.format(i)
            marked = [m if j != i else {"role": m["role"], "content": mark} for j, m in enumerate(messages)]
            before, _, after = self._template(conversation, marked).partition(mark)
            start, end = len(before), len(text) - len(after)
            if not (text.startswith(before[: start - lead]) and text.endswith(after) and start - lead <= end):
                raise _unfit(conversation)
            places[i] = (start, end)
        return places

    def _template(self, conversation: Conversation, messages: list[dict[str, str]], **options: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
            return bounded(text, (message["content"] for message in messages))
        except MemoryError:
            raise
        except Exception as error:  # its own raise_exception, or anything that a template can do wrong
            what = f"the chat template refuses the conversation: {str(error).rstrip('.') or type(error).__name__}"
            raise DataError(conversation.where, what, "Mend the row, or give a data.chat_template") from None

    def _prefix(self, conversation: Conversation, messages: list[dict[str, str]], **options: Any) -> str:
        """The first messages of a conversation alone; some templates refuse such a part."""
        try:
            return self._template(conversation, messages, **options) if messages else ""
        except DataError:
            return ""

    def _count(self, tokens: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> list[bool]:
        """Mark each assistant turn's tokens up to and with the special token that ends it.

        A turn that no special token ends is counted whole: its last characters are what ends it. A token that reaches
        into the turn holds its first letters, and counts.
        """
        counted = [False] * len(tokens)
        at = 0
        for start, content_end, end in spans:
            while at < len(tokens) and offsets[at][0] < start and offsets[at][1] <= start:
                at += 1
            first = at
            while at < len(tokens) and offsets[at][0] < end:
                at += 1
                if self.assistant_only and offsets[at - 1][0] >= content_end and tokens[at - 1] in self.end_ids:
                    break
            counted[first:at] = [True] * (at - first)
        return counted


def _of_template(refused: list[DataError], num_rows: int) -> list[DataError]:
    """What a template refuses; where that is every row, for one reason, the fault is its own."""
    reasons = {fault.args[1] for fault in refused}
    if len(reasons) != 1 or not 1 < len(refused) == num_rows:
        return refused
    what = reasons.pop().replace("the conversation", f"all {num_rows} rows", 1)
    return [DataError(TEMPLATE, what, "Mend it, or give another: data.chat_template=FILE")]


def _together(
    told: Iterator[tuple[Conversation, Any]], refused: list[DataError]
) -> Iterator[list[tuple[Conversation, str, list[Span]]]]:
    """Lists of many rendered conversations, or of fewer long ones; what is refused goes to a list of its own."""
    group: list[tuple[Conversation, str, list[Span]]] = []
    size = 0
    for conversation, rendered in told:
        if isinstance(rendered, DataError):
            refused.append(rendered)
            continue
        group.append((conversation, *rendered))
        size += len(rendered[0])
        if len(group) == TOKENISED_TOGETHER or size > LONGEST:
            yield group
            group, size = [], 0
    if group:
        yield group


def _opening(conversation: Conversation) -> list[dict[str, str]]:
    """What is said before the assistant's first turn."""
    return list(takewhile(lambda message: message["role"] != "assistant", conversation.messages))


def _unfit(conversation: Conversation) -> DataError:
    what = "the chat template leaves out, repeats or rewrites what the assistant says"
    return DataError(conversation.where, what, "Set data.assistant_only=false, or give a data.chat_template")


def _places(text: str, frame: Frame, messages: list[dict[str, str]]) -> dict[int, tuple[int, int]]:
    """Where each content stands, if the template wrote all of them as they are or stripped; else nothing."""
    places, at = {}, len(frame.literals[0])
    for i, literal in zip(frame.order, frame.literals[1:], strict=True):
        for content in (messages[i]["content"], messages[i]["content"].strip()):
            if text.startswith(content + literal, at):
                break
        else:
            return {}
        places[i] = (at, at + len(content))
        at += len(content) + len(literal)
    return places if text.startswith(frame.literals[0]) and at == len(text) else {}


def prepare_tokenizer(tokenizer: Any, config: DataConfig) -> str:
    """Give the tokenizer the chat template of the run, so that it is saved with the student; say where it is from."""
    if config.chat_template:
        path = at_home(config.chat_template, TEMPLATE)
        is_file = "{" not in config.chat_template
        if is_file and not path.is_file():
            what = f"{path} is not a file" if path.exists() else f"{path} does not exist"
            raise DataError(TEMPLATE, what, "Give a file, or Jinja text with {{ }}")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8") if is_file else config.chat_template
        except UnicodeDecodeError as error:
            raise DataError(str(path), f"is not UTF-8 (byte {error.start})", "Save it as UTF-8") from None
        _try_out(tokenizer, "it")
        return "data.chat_template"
    if tokenizer.chat_template:
        _try_out(tokenizer, "the chat template that the tokenizer brings")
        return "the tokenizer's own"
    if tokenizer.eos_token is None:
        raise DataError(TEMPLATE, "the tokenizer has neither template nor end-of-text token", "Give one")
    tokenizer.chat_template = JOINED_BY_END_OF_TEXT
    return "turns joined by the end-of-text token"


def _try_out(tokenizer: Any, whose: str) -> None:
    """Refuse a chat template that is not Jinja, or without end in time or size. Raises DataError."""

    def write() -> str | None:
        for messages in (TALK, TALK[1:], TALK[1:3], TALK[1:2]):  # some refuse a system message, or to end so
            for is_asked in (False, True):
                try:
                    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_asked)
                    bounded(text, ())
                except TemplateSyntaxError as error:
                    return f"is not Jinja: {error} (line {error.lineno})"
                except MemoryError:
                    raise
                except Exception:
                    pass  # it is Jinja, made for other conversations than this one
        return None

    template = tokenizer.chat_template
    fault = None if is_plain(template) else fault_of(f"chat {template} {tokenizer.special_tokens_map}", write)
    if fault:
        raise DataError(TEMPLATE, f"{whose} {fault}", "Give another: data.chat_template=FILE")
