"""Rows as people bring them: what the student learns of each, token by token, or what is said about it."""

import json
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM

from kdx.cli import compose
from kdx.data.batches import Batches
from kdx.data.encode import JOINED_BY_END_OF_TEXT, Encoder, load_data, prepare_tokenizer
from kdx.data.sources import Conversation, check_source
from kdx.distill import distill
from kdx.errors import ConfigError, DataError
from kdx.student import teach_to_stop
from kdx.tokenizer import SharedTokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools, thinking of the last turn alone, tool results as turns of the user: what Qwen's templates do.
QWEN = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.content else '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# enable_thinking=false changes the prompt alone.
SWITCH = QWEN.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
LLAMA = (
    "{{ bos_token }}{% set today = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday is {{ today }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Answers of tools must name the call they belong to, there is no header before the assistant's words, and the tools
# stand before the last question.
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}[TOOLS] {{ tools | tojson }} [/TOOLS]{% endif %}"
    "[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    "[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# gpt-oss: a last answer ends otherwise than an earlier one, and thinking is written only where no answer follows.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    "<|start|>weather to=assistant<|message|>{{ m.content | tojson }}<|end|>{% else %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# The block of a template that marks what the assistant says may hold the end of the turn, its header and a line break.
MARKED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}",
)
MARKED_WORDS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
)
# DeepSeek-R1 and QwQ prompt for a thought, of which an earlier answer has none left.
PROMPTED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TOKENIZERS = {  # a template, special tokens, end of text
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), {}),
    "qwen": (QWEN, ("<|im_start|>", "<|im_end|>"), {}),
    "switch": (SWITCH, ("<|im_start|>", "<|im_end|>"), {}),
    "llama": (LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), {"bos_token": "<|begin|>"}),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), {"bos_token": "<s>", "eos_token": "</s>"}),
    "gpt-oss": (HARMONY, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"), {}),
    "marked": (MARKED, ("<|im_start|>", "<|im_end|>"), {}),
    "marked words": (MARKED_WORDS, ("<|im_start|>", "<|im_end|>"), {}),
    "unprompted": (CHATML[: CHATML.index("{% if")], ("<|im_start|>", "<|im_end|>"), {}),
    "prompted": (PROMPTED, ("<|im_start|>", "<|im_end|>"), {}),
    "lower": (CHATML.replace("m.content", "m.content | lower"), ("<|im_start|>", "<|im_end|>"), {}),
    "plain": (PLAIN, (), {}),
    "base": (None, (), {}),
}
ASK = {"role": "user", "content": "How warm is it?"}
SAY = {"role": "assistant", "content": "Nine degrees."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "9"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WHOLE = "Nine degrees.<|im_end|>"


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


@dataclass
class Case:
    """A row under a tokenizer and a layout, and what must be seen."""

    row: dict[str, Any]
    tokenizer: str = "chatml"
    layout: str = "messages"
    counted: list[str] | None = None  # each unbroken run of counted tokens
    says: list[str] = field(default_factory=list)  # in what is said of the rows
    refused: str = ""  # in the fault
    reads: str = ""  # in the text that the student reads
    stops: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    # ---- turns and their ends
    "a chat": Case(chat(ASK, SAY), counted=[WHOLE], stops=["<|im_end|>"]),
    "two answers": Case(chat(ASK, SAY, ASK, SAY), counted=[WHOLE, WHOLE]),
    "an unanswered last turn": Case(chat(ASK, SAY, ASK, ASK), counted=[WHOLE], says=["unanswered last turn cut off"]),
    "weight 0": Case(chat(ASK, SAY | {"weight": 0}, ASK, SAY | {"weight": 1}), counted=[WHOLE]),
    "train false": Case(chat(ASK, SAY | {"train": False}, ASK, SAY), "qwen", counted=[WHOLE]),
    "nothing that counts": Case(chat(ASK, SAY | {"weight": 0}), refused="no counted token left"),
    "half a weight": Case(chat(ASK, SAY | {"weight": 0.5}), refused="weight is 0.5"),
    "llama": Case(chat(ASK, SAY), "llama", counted=["Nine degrees.<|eot_id|>"], reads="<|begin|><|start_header_id|>system"),
    "gemma": Case(chat(ASK, SAY), "gemma", counted=["Nine degrees.<end_of_turn>"], stops=["<end_of_turn>"]),
    "mistral": Case(chat(ASK, SAY), "mistral", counted=[" Nine degrees.</s>"], stops=["</s>"]),
    "a base model": Case(chat(ASK, SAY), "base", counted=["Nine degrees.<|endoftext|>"], stops=["<|endoftext|>"]),
    "gpt-oss": Case(
        chat(ASK, SAY, ASK, SAY), "gpt-oss", stops=["<|return|>"],
        counted=["<|channel|>final<|message|>Nine degrees.", "<|channel|>final<|message|>Nine degrees.<|return|>"],
    ),
    "a template that marks": Case(chat(ASK, SAY), "marked", counted=[f"<|im_start|>assistant\n{WHOLE}\n"], stops=["<|im_end|>"]),
    "a template that marks the words alone": Case(chat(ASK, SAY), "marked words", counted=[WHOLE], stops=["<|im_end|>"]),
    "tool calls under a template that marks": Case(
        chat(ASK, CALLS, RESULT, SAY), "marked words",
        counted=['{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>', WHOLE],
    ),
    "a template that leaves the assistant out": Case(
        chat(ASK, SAY), refused="leaves out, repeats or rewrites the assistant's words. Set data.assistant_only=false",
        options={"chat_template": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"},
    ),
    "a template that knows no prompts": Case(chat(ASK, SAY, ASK, SAY), "unprompted", counted=[WHOLE, WHOLE]),
    "words that begin like what the prompt ends with": Case(
        chat(ASK, {"role": "assistant", "content": "<b>x</b>"}), "prompted", counted=["<b>x</b><|im_end|>"],
        says=["turns that do not begin with the chat template's generation prompt"],
    ),
    "an assistant that opens": Case(chat(SAY, ASK, SAY), counted=[WHOLE, WHOLE]),
    "a template without ends": Case(
        chat(ASK, SAY), "plain", counted=[" Nine degrees.\n"], stops=[], says=["turns that do not end with a special token"]
    ),
    "words in other letters": Case(chat(ASK, SAY), "lower", counted=["nine degrees.<|im_end|>"], says=["assistant text dropped or rewritten"]),
    "every token": Case(chat(ASK, SAY), options={"assistant_only": False}, reads="How warm", stops=["<|im_end|>"]),
    # ---- roles
    "a system text": Case(chat({"role": "system", "content": "Be brief."}, ASK, SAY), counted=[WHOLE], reads="Be brief."),
    "a developer": Case(chat({"role": "developer", "content": "Be brief."}, ASK, SAY), reads="<|im_start|>developer"),
    "a system text that is refused": Case(
        chat({"role": "system", "content": "Be brief."}, ASK, SAY), "gemma", refused="System role not supported"
    ),
    "a system text left out": Case(
        chat({"role": "system", "content": "Be brief."}, ASK, SAY), "mistral",
        says=["system text dropped or rewritten"], counted=[" Nine degrees.</s>"],
    ),
    "a role left out": Case(
        chat(ASK, {"role": "observation", "content": "It snows."}, SAY), "mistral",
        refused="messages[1]: the chat template leaves out the role observation",
    ),
    "an unknown role": Case(chat(ASK, {"role": "critic", "content": "No."}, SAY), refused='the role is "critic"'),
    "an observation": Case(chat(ASK, {"role": "observation", "content": "It snows."}, SAY), reads="observation\nIt snows."),
    "other names of columns, keys and roles": Case(
        {"turns": [{"who": "sys", "text": "Be brief.", "role": "z"}, {"who": "me", "text": "a"}, {"who": "bot", "text": "Nine degrees."}]},
        counted=[WHOLE], reads="<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>",
        options={"messages_column": "turns", "role_key": "who", "content_key": "text",
                 "roles": {"sys": "system", "me": "user", "bot": "assistant"}},
    ),
    # ---- tools
    "tool calls of qwen": Case(
        chat(ASK, CALLS, RESULT, SAY, tools=TOOLS), "qwen", reads='Tools: [{"type": "function"',
        counted=['<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>', WHOLE],
    ),
    "tools as JSON text": Case(chat(ASK, SAY, tools=json.dumps(TOOLS)), "qwen", reads='Tools: [{"type": "function"'),
    "tools as JSON texts": Case(
        chat(ASK, SAY, tools=[json.dumps(tool) for tool in TOOLS]), "qwen", reads='Tools: [{"type": "function"'
    ),
    "no tools as JSON text": Case(
        chat(ASK, SAY, tools="[]"), counted=[WHOLE],
        options={"chat_template": "{% if tools is defined and tools is not none %}Tools{% endif %}" + CHATML},
    ),
    "tool calls without content": Case(
        chat(ASK, {"role": "assistant", "tool_calls": [CALL]}, RESULT, SAY), "qwen", reads="<tool_response>\n9\n</tool"
    ),
    "tool calls of llama": Case(
        chat(ASK, CALLS, RESULT, SAY), "llama", reads="ipython",
        counted=['{"name": "weather", "arguments": {"city": "Oslo"}}<|eot_id|>', "Nine degrees.<|eot_id|>"],
    ),
    "tool calls of mistral": Case(
        chat(ASK, CALLS, RESULT, SAY), "mistral", reads="[TOOL_RESULTS] 9",
        counted=[f"[TOOL_CALLS] {json.dumps([CALL])}</s>", " Nine degrees.</s>"],
    ),
    "tools of mistral before the last question": Case(
        chat(ASK, CALLS, RESULT, SAY, {"role": "user", "content": "And now?"}, SAY, tools=TOOLS), "mistral",
        reads="[TOOLS]", counted=[f"[TOOL_CALLS] {json.dumps([CALL])}</s>", " Nine degrees.</s>", " Nine degrees.</s>"],
    ),
    "tool calls of gpt-oss": Case(
        chat(ASK, CALLS | {"thinking": "I ask."}, RESULT, SAY), "gpt-oss", stops=["<|return|>", "<|call|>"],
        counted=[' to=weather<|message|>{"city": "Oslo"}<|call|>', "<|channel|>final<|message|>Nine degrees.<|return|>"],
        says=["thinking dropped or rewritten"],
    ),
    "two calls of which one is written": Case(
        chat(ASK, CALLS | {"tool_calls": [CALL, {"function": {"name": "weather", "arguments": {"city": "Bergen"}}}]}, RESULT, SAY),
        "llama", refused="the chat template leaves out, repeats or rewrites the assistant's words",
    ),
    "words beside a call": Case(
        chat(ASK, CALLS | {"content": "Let me look."}, RESULT, SAY), "llama", says=["assistant text dropped"]
    ),
    "tool calls as JSON text": Case(
        chat(ASK, CALLS | {"tool_calls": json.dumps([CALL])}, RESULT, SAY), "llama", reads='{"city": "Oslo"}'
    ),
    "tool calls that are none": Case(chat(ASK, CALLS | {"tool_calls": "weather()"}), refused='"tool_calls" is "weather()"'),
    "no tool calls": Case(chat(ASK, SAY | {"tool_calls": []}), "mistral", counted=[" Nine degrees.</s>"]),
    "tool calls that the template does not write": Case(
        chat(ASK, CALLS, RESULT, SAY), refused="has only tool_calls, which the chat template does not write"
    ),
    "tools that nothing reads": Case(chat(ASK, SAY, tools=TOOLS), says=["column tools"]),
    "tools that the template leaves out": Case(
        chat(ASK, SAY, tools=TOOLS), says=["column tools dropped or rewritten"],
        options={"chat_template": "{% if tools and messages[0].role == 'system' %}{{ tools }}{% endif %}" + CHATML},
    ),
    "arguments as text": Case(
        chat(ASK, {**CALLS, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]}, RESULT, SAY),
        "qwen", says=["tool_calls arguments given as a string"],
    ),
    # ---- thinking
    "thinking": Case(
        chat(ASK, SAY | {"reasoning_content": "It says 9."}), "qwen",
        counted=["<think>\nIt says 9.\n</think>\n\nNine degrees.<|im_end|>"],
    ),
    "thinking that the prompt rules out": Case(
        chat(ASK, SAY | {"reasoning_content": "It says 9."}), "switch", counted=["It says 9.\n</think>\n\nNine degrees.<|im_end|>"],
        says=["turns that do not begin with the chat template's generation prompt"],
        options={"template_options": {"enable_thinking": False}},
    ),
    "thinking by another name": Case(
        chat(ASK, SAY | {"reasoning": "It says 9."}), "gpt-oss", stops=["<|return|>"],
        counted=["<|channel|>analysis<|message|>It says 9.<|end|><|start|>assistant<|channel|>final<|message|>Nine degrees.<|return|>"],
    ),
    "thinking of an earlier turn of gpt-oss": Case(
        chat(ASK, SAY | {"thinking": "It says 9."}, ASK, SAY), "gpt-oss", stops=["<|return|>"],
        counted=["<|channel|>final<|message|>Nine degrees.", "<|channel|>final<|message|>Nine degrees.<|return|>"],
        says=["thinking dropped or rewritten"],
    ),
    "thinking of an earlier turn": Case(
        chat(ASK, SAY | {"reasoning_content": "It says 9."}, ASK, SAY), "qwen", counted=[WHOLE, WHOLE],
        says=["reasoning_content dropped or rewritten"],
    ),
    "thinking in the content": Case(
        chat(ASK, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nNine degrees."}), "qwen", counted=[WHOLE],
        says=["thinking dropped or rewritten"],
    ),
    "thinking that nothing reads": Case(
        chat(ASK, SAY | {"reasoning_content": "It says 9."}), says=["key reasoning_content of messages"], counted=[WHOLE]
    ),
    # ---- columns
    "columns that nothing reads": Case(chat(ASK, SAY, difficulty=3, score=None), says=["column difficulty"]),
    "keys that nothing reads": Case(chat(ASK | {"mood": "curious"}, SAY), says=["key mood of messages"]),
    "a variable of the template": Case(chat(ASK, SAY, date_string="May"), "llama", reads="Today is May"),
    "the clock": Case(chat(ASK, SAY), "llama", reads="Today is 26 Jul 2024"),
    "another day": Case(chat(ASK, SAY), "llama", reads="Today is 01 Feb 2025", options={"template_date": "2025-02-01"}),
    "a variable for all rows": Case(
        chat(ASK, SAY), "llama", reads="Today is May", options={"template_options": {"date_string": "May"}}
    ),
    "a variable of a row before that of all": Case(
        chat(ASK, SAY, date_string="June"), "llama", reads="Today is June", options={"template_options": {"date_string": "May"}}
    ),
    "a variable that the template does not read": Case(
        chat(ASK, SAY), refused="does not read enable_thinking. It reads none", options={"template_options": {"enable_thinking": True}}
    ),
    "a column named as a token": Case(chat(ASK, SAY, bos_token="no"), "llama", says=["column bos_token"], reads="<|begin|>"),
    "a system column": Case(chat(ASK, SAY, system="Be brief."), reads="system\nBe brief."),
    "a system prompt": Case(chat(ASK, SAY, city="Oslo"), reads="You are in Oslo.", options={"system_prompt": "You are in {{ city }}."}),
    # ---- contents
    "text parts": Case(chat({"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "warm?"}]}, SAY), reads="How warm?"),
    "an image": Case(chat({"role": "user", "content": [{"type": "image", "url": "x"}]}, SAY), refused='"content" is'),
    "a blank content": Case(chat(ASK, {"role": "assistant", "content": " "}), refused="expected text that is not blank"),
    "nulls beside": Case(chat(ASK | {"name": None, "tool_calls": None}, SAY), counted=[WHOLE]),
    # ---- ShareGPT and its odd forms
    "sharegpt": Case(
        {"conversations": [{"from": "human", "value": "How warm?"}, {"from": "gpt", "value": "Nine degrees."}], "score": 1},
        layout="sharegpt", counted=[WHOLE], says=["column score"],
    ),
    "sharegpt with roles of the chat": Case(
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "How warm?"}, {"from": "chatgpt", "value": "Nine degrees."}]},
        layout="sharegpt", counted=[WHOLE], reads="system\nBe brief.",
    ),
    "sharegpt with tools": Case(
        {"conversations": [{"from": "human", "value": "How warm?"}, {"from": "function_call", "value": "weather()"}, {"from": "observation", "value": "9"}, {"from": "gpt", "value": "Nine degrees."}], "tools": "[1]"},
        layout="sharegpt", counted=["weather()<|im_end|>", WHOLE], says=['column tools']),
    "sharegpt with a weight": Case(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}, {"from": "human", "value": "c"}, {"from": "gpt", "value": "Nine degrees."}]},
        layout="sharegpt", counted=[WHOLE],
    ),
    "a blank system text with tools": Case(
        chat({"role": "system", "content": "", "tools": TOOLS}, ASK, SAY), counted=[WHOLE], reads='"name": "weather"',
        options={"chat_template": "{% for tool in messages[0]['tools'] %}{{ tool | tojson }}{% endfor %}" + CHATML},
    ),
    "a column that there is not, beside trl's": Case(
        {"prompt": "How warm?", "completion": "Cold.", "response": "Nine degrees."}, layout="pairs",
        options={"source_column": "prompt", "target_column": "respons"}, refused='"respons" is missing',
    ),
    "prompt and chosen as JSON text": Case(
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([SAY])}, layout="pairs", counted=[WHOLE], reads="user\nHow warm is",
        says=["source and target are the columns prompt and chosen"],
    ),
    "an answer that is JSON": Case(
        {"source": "How warm?", "target": '[{"degrees": 9}]'}, layout="pairs", counted=['[{"degrees": 9}]<|im_end|>'],
    ),
    "sharegpt with a blank system text": Case(
        {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "How warm?"}, {"from": "gpt", "value": "Nine degrees."}]},
        "gemma", layout="sharegpt", counted=["Nine degrees.<end_of_turn>"],
    ),
    "sharegpt as JSON text": Case(
        {"conversations": json.dumps([{"from": "human", "value": "How warm?"}, {"from": "gpt", "value": "Nine degrees."}])},
        layout="sharegpt", counted=[WHOLE],
    ),
    "sharegpt as texts": Case({"conversations": ["How warm?", "Nine degrees."]}, layout="sharegpt", counted=[WHOLE], reads="user\nHow warm?"),
    # ---- pairs, preferences, Alpaca
    "pairs": Case({"source": "How warm?", "target": "Nine degrees."}, layout="pairs", counted=[WHOLE]),
    "prompt and completion": Case(
        {"prompt": "How warm?", "completion": "Nine degrees."}, layout="pairs", counted=[WHOLE],
        says=["source and target are the columns prompt and completion"],
    ),
    "prompt and chosen": Case(
        {"prompt": "How warm?", "chosen": "Nine degrees.", "rejected": "Ten."}, layout="pairs", counted=[WHOLE],
        says=["source and target are the columns prompt and chosen", "column rejected"],
    ),
    "prompt and completion beside where the row is from": Case(
        {"prompt": "How warm?", "completion": "Nine degrees.", "source": "web"}, layout="pairs", counted=[WHOLE],
        says=["source and target are the columns prompt and completion"],
    ),
    "lists of messages as pairs": Case(
        {"prompt": [{"role": "system", "content": "Be brief."}, ASK], "completion": [SAY]}, layout="pairs",
        counted=[WHOLE], reads="Be brief.", says=['source and target are the columns prompt and completion']),
    "chosen after a prompt": Case(
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]}, counted=[WHOLE], reads="How warm is it?",
        says=['the column prompt goes before chosen', 'column rejected'], options={"messages_column": "chosen"},
    ),
    "chosen that has its prompt": Case(
        {"prompt": [ASK], "chosen": [ASK, SAY]}, counted=[WHOLE], options={"messages_column": "chosen"}
    ),
    "a prompt as text before chosen": Case(
        {"prompt": "How warm is it?", "chosen": [SAY]}, reads="How warm is it?", options={"messages_column": "chosen"}, says=['the column prompt goes before chosen']),
    "chosen that has its prompt, as pairs": Case(
        {"prompt": "How warm is it?", "chosen": [ASK, SAY], "rejected": [ASK, SAY]}, layout="pairs", counted=[WHOLE],
        reads="<|im_start|>user\nHow warm is it?<|im_end|>\n<|im_start|>assistant",
        says=["source and target are the columns prompt and chosen", "column rejected"],
    ),
    "alpaca": Case(
        {"instruction": "Translate.", "input": "ni grader", "output": "Nine degrees."}, layout="alpaca",
        counted=[WHOLE], reads="Translate.\n\nni grader",
    ),
    "alpaca without input": Case({"instruction": "Speak.", "input": "", "output": "Nine degrees."}, layout="alpaca", reads="Speak.<|im_end|>"),
    "a system column of pairs": Case({"source": "a", "target": "b", "system": "Be brief."}, layout="pairs", reads="Be brief."),
    "columns of another layout": Case({"question": "a", "answer": "b"}, layout="pairs", refused='"source" is missing; the row is an object with question, answer'),
    # ---- text
    "plain text": Case(
        {"text": "The sea is warm.", "url": "x"}, layout="text", counted=["The sea is warm.<|endoftext|>"], says=["column url"]
    ),
    "no text": Case({"content": "The sea."}, layout="text", refused='"text" is missing'),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_student_learns_what_the_row_says_or_it_is_said(name, make_tokenizer, data_config, tmp_path):
    case = CASES[name]
    template, special, tokens = TOKENIZERS[case.tokenizer]
    tokenizer = make_tokenizer(template, special, **tokens)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(case.row) + "\n", encoding="utf-8")
    config = data_config(case.layout, path=str(file), validation=None, **case.options)
    shared = SharedTokenizer(tokenizer, 1000)
    if case.refused:
        with pytest.raises(DataError) as caught:
            load_data(config, shared)
        assert case.refused in str(caught.value)
        return
    data = load_data(config, shared, 1)
    (row,) = data.train
    text = tokenizer.decode(row.tokens)
    said = {*data.said, *data.unused, *data.changed}
    assert len(said) == len(case.says), said
    for words in case.says:
        assert any(words in one for one in said), said
    assert case.reads in text
    if case.counted is not None:
        assert counted_of(tokenizer, row) == case.counted
        for prompt in data.prompts:  # the reference is what the student learns, with thinking and tool calls
            first = counted_of(tokenizer, row, skip_special_tokens=True)[0].strip().removeprefix("assistant\n")
            assert prompt["reference"] == first or "weight" in name  # the first turn, even one of weight 0
    if case.stops is not None:
        assert tokenizer.convert_ids_to_tokens(data.stops) == case.stops
    if (
        case.layout == "messages"
        and "messages" in case.row
        and not {"system", "system_prompt"} & {*case.row, *case.options}
    ):
        plain = [{k: v for k, v in m.items() if k not in ("weight", "train")} for m in case.row["messages"]]
        given = {k: v for k, v in case.row.items() if k not in ("messages", "tools", "bos_token")}
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in read_json(case.row.get("tools")) or []]
        if "strftime_now" not in (template or "strftime_now") or given:  # the day of the run is not today's
            whole = tokenizer.apply_chat_template(plain, tools=tools or None, tokenize=False, **given)
            assert "[{'type'" in whole or whole.startswith(text), whole


def read_json(value):
    return json.loads(value) if isinstance(value, str) else value


def counted_of(tokenizer, row, **how):
    """The text of each unbroken run of counted tokens."""
    runs = groupby(zip(row.tokens, row.counted, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run], **how) for counts, run in runs if counts]


def test_a_prompt_ends_where_the_answer_of_a_row_begins(make_tokenizer, data_config, tmp_path):
    """A template that knows no prompt for an answer writes its header all the same."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(chat(ASK, SAY)), encoding="utf-8")
    tokenizer = make_tokenizer(template, ("<|im_start|>", "<|im_end|>"))
    data = load_data(data_config("messages", path=str(file), validation=None), SharedTokenizer(tokenizer, 1000), 1)
    text = tokenizer.decode(data.train[0].tokens)
    assert text.startswith(data.prompts[0]["text"] + SAY["content"])


def test_what_arrow_adds_to_a_row_is_not_said(make_tokenizer, data_config, tmp_path):
    other = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    rows = [chat(ASK, CALLS, RESULT, SAY), chat(ASK, CALLS | {"tool_calls": [other]}, RESULT, SAY)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = make_tokenizer(QWEN, ("<|im_start|>", "<|im_end|>"))
    config = data_config("messages", path=str(tmp_path / "rows.parquet"), validation=None)
    data = load_data(config, SharedTokenizer(tokenizer, 1000))
    for row, arguments in zip(data.train, ('{"city": "Oslo"}', '{"zone": "UTC"}'), strict=True):
        assert arguments in counted_of(tokenizer, row)[0]


def test_a_base_student_takes_the_teachers_template_and_the_tokens_it_names(make_tokenizer, tmp_path):
    special = ("<|im_end|>", "<|im_start|>")
    template = CHATML.replace("<|im_end|>", "{{ eos_token }}")
    make_tokenizer(template, special, eos_token="<|im_end|>").save_pretrained(tmp_path / "teacher")
    make_tokenizer(None, special).save_pretrained(tmp_path / "student")
    for name in ("teacher", "student"):
        GPT2Config().save_pretrained(tmp_path / name)
    words = [f"{name}.path={tmp_path / name}" for name in ("teacher", "student")]
    shared = load_tokenizer(compose(["teacher=hf", "student=hf", *words]))
    assert shared.template == "the teacher's (saved with the student)"
    text = shared.tokenizer.apply_chat_template([ASK, SAY], tokenize=False)
    assert text.endswith("<|im_start|>assistant\nNine degrees.<|im_end|>\n")


def test_whose_template_is_used_and_a_beginning_of_text_is_written_once_or_said_to_be_missing(
    make_tokenizer, data_config, tmp_path
):
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    lacks = "; it does not begin with <bos>, which the tokenizer puts before plain text"
    for own, options, template, says in (
        (None, {}, "{{ bos_token }}" + JOINED_BY_END_OF_TEXT, "turns joined by the end-of-text token, after <bos>"),
        (CHATML, {}, CHATML, f"the tokenizer's own{lacks}"),
        (GEMMA, {}, GEMMA, "the tokenizer's own"),
        (GEMMA, {"chat_template": CHATML}, CHATML, f"data.chat_template{lacks}"),
        (None, {"chat_template": str(tmp_path / "chat.jinja")}, CHATML, f"data.chat_template{lacks}"),
    ):
        tokenizer = make_tokenizer(own, ("<|im_start|>", "<|im_end|>"), bos_token="<bos>")
        bos = ("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
        shared = SharedTokenizer(tokenizer, 100)
        assert prepare_tokenizer(shared, data_config("messages", **options)) == says
        assert tokenizer.chat_template == template
        (row,) = Encoder(shared, data_config("messages")).encode(Conversation("", [ASK, SAY], "")).rows
        assert row.tokens.count(bos[1]) == (lacks not in says)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"data\.chat_template: .* neither a template nor an end-of-text"):
        prepare_tokenizer(SharedTokenizer(tokenizer, 100), data_config("messages"))


def test_the_saved_student_stops_where_its_rows_do(make_tokenizer):
    class Student:
        class generation_config:
            eos_token_id: Any = None

    tokenizer = make_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))
    end, text = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    for before, after in ((None, end), (text, [text, end]), ([text, end], [text, end])):
        Student.generation_config.eos_token_id = before
        teach_to_stop(Student, tokenizer, [end])
        assert Student.generation_config.eos_token_id == after
        assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama", "gemma", "mistral", "gpt-oss", "marked", "base"])
def test_a_student_that_learns_its_rows_by_heart_stops_where_they_do(make_tokenizer, tmp_path, name):
    """As a user finds out: load the saved student with transformers, apply its template, generate."""
    template, special, tokens = TOKENIZERS[name]
    tokenizer = make_tokenizer(template, special, **tokens)
    tokenizer.save_pretrained(tmp_path / "student")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }  # as base models' are
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(tmp_path / "student")
    chats = [[ASK, SAY], [{"role": "user", "content": "And the sea?"}, {"role": "assistant", "content": "Five."}]]
    lines = [json.dumps({"messages": messages}) for messages in chats * 4]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    words = ["loss=cross_entropy", "teacher=none", "student=hf", f"student.path={tmp_path}/student", "data=messages"]
    words += [f"data.path={tmp_path}/chats.jsonl", "data.validation=null", "train.max_steps=60", "optim.lr=2e-2"]
    words += ["optim.schedule=constant", "train.precision=fp32", "tracking.mode=disabled", "eval.num_prompts=0"]
    distill(compose(words), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student").eval()
    own = AutoTokenizer.from_pretrained(tmp_path / "run/student")
    for messages in chats:
        prompt = own.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        (said,) = model.generate(**prompt, max_new_tokens=40, do_sample=False).tolist()
        answer = said[prompt["input_ids"].shape[1] :]
        assert len(answer) < 40
        assert own.decode(answer, skip_special_tokens=True).strip().endswith(messages[1]["content"])


@pytest.mark.parametrize("assistant_only", [True, False])
def test_long_rows_are_truncated_dropped_or_refused(make_tokenizer, data_config, assistant_only):
    tokenizer = make_tokenizer(JOINED_BY_END_OF_TEXT)
    long = Conversation("long", [ASK, {"role": "assistant", "content": "Fine, thank you. And you?"}], "c.jsonl:7")

    def encoded(max_length, on_long):
        config = data_config("messages", on_long=on_long, assistant_only=assistant_only)
        return Encoder(SharedTokenizer(tokenizer, max_length), config).encode(long)

    (whole,) = encoded(1000, "error").rows
    limit = len(whole.tokens) - 2
    truncated, dropped = encoded(limit, "truncate"), encoded(limit, "drop")
    assert [(row.tokens, row.counted) for row in truncated.rows] == [(whole.tokens[:limit], whole.counted[:limit])]
    assert truncated.counts == [("changed", "longer than data.max_length")]
    assert (dropped.rows, dropped.counts) == ([], [("dropped", "longer than data.max_length")])
    says = (
        f"c.jsonl:7: the row has {limit + 2} tokens, data.max_length is {limit}. Raise it, or set data.on_long=truncate"
    )
    assert says in str(encoded(limit, "error").fault)


def test_a_long_text_becomes_rows_that_count_every_token_once(make_tokenizer, data_config, tmp_path):
    tokenizer = make_tokenizer(None)
    words = "".join(f"word {i}, " for i in range(50))
    file = tmp_path / "docs.jsonl"
    file.write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")
    data = load_data(data_config("text", path=str(file), validation=None), SharedTokenizer(tokenizer, 16))
    assert data.changed == {"longer than data.max_length, split": 1}
    learnt = [
        token for row in data.train for token, counts in zip(row.tokens[1:], row.counted[1:], strict=True) if counts
    ]
    whole = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert learnt == [*whole[1:], tokenizer.eos_token_id]  # nothing predicts the first
    assert max(len(row.tokens) for row in data.train) == 16
    assert len({row.id for row in data.train}) == len(data.train)


def test_a_mixture_has_its_shares_and_its_own_held_out_rows(make_tokenizer, data_config, tmp_path):
    rows = {
        "chat": [chat(ASK, {"role": "assistant", "content": f"degrees {i} " * (i % 4 + 1)}) for i in range(60)],
        "text": [{"text": f"row {i} " * (i % 7 + 1)} for i in range(300)],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    sources = {
        "a": {"layout": "messages", "path": str(tmp_path / "chat.jsonl"), "weight": 7},
        "b": {"layout": "text", "path": str(tmp_path / "text.jsonl"), "weight": 3, "validation": 5},
    }
    config = data_config("mix", sources=sources, validation=4)
    tokenizer = make_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))
    data = load_data(config, SharedTokenizer(tokenizer, 100), 2)
    assert [row.id.split("/")[0] for row in data.held_out] == ["a"] * 4 + ["b"] * 5
    assert len(data.prompts) == 2
    epochs = [data.train.epoch(0, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] == data.train.epoch(0, 0)
    sources_of = {name: {*part} for name, part in data.train.sources.items()}
    for rows_of in epochs:
        assert len(set(rows_of)) == len(rows_of)
        assert {name: len(part & set(rows_of)) for name, part in sources_of.items()} == data.train.drawn
    mean = {name: data.train.num_counted[part].mean() for name, part in data.train.sources.items()}
    expected = {name: number * mean[name] for name, number in data.train.drawn.items()}  # counted tokens of an epoch
    assert expected["a"] / sum(expected.values()) == pytest.approx(0.7, abs=0.01)
    assert sorted(set(epochs[0]) & {*data.train.sources["a"]}) == [*data.train.sources["a"]]  # it runs out first
    batches = Batches(data.train, batch_size=8, micro_batch_size=8, seed=0, shuffle=True, pad_id=0)
    assert sum(len(numbers) for _, numbers in batches.plan(0, batches.steps_per_epoch)) == len(epochs[0])
    for key, value, says in (
        ("weight", 0, "weight: is 0"),
        ("layout", "chats", "layout: is 'chats'"),
        ("pth", "x", "pth: "),
    ):
        with pytest.raises(ConfigError, match=f"data.sources.b.{says}"):
            check_source(data_config("mix", sources=sources | {"b": sources["b"] | {key: value}}))
