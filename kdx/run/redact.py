"""Secrets out of everything that is written down: logs, the record of a run, W&B."""

import os
import re
from typing import Any

HIDDEN = "[redacted]"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<![\w-])sk-[\w-]{16,}")
# Names of keys and environment variables that hold secrets; a tokenizer's own tokens (eos_token) are none.
NAME = re.compile(
    r"(?i)(api_?key|access_?key|secret|password|passwd|credential|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)token)$"
)
WORD = re.compile(r"([+~]*[\w./@-]+)=(?!null$|\?\?\?$|'?\$\{)(.+)", re.DOTALL)  # KEY=VALUE as typed, no interpolation


def redact(value: Any, key: str = "") -> Any:
    """Replace secrets in a value, or in all of a nested config: by the key's name, by their look, by the environment."""
    if isinstance(value, dict):
        return {name: redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, key) for inner in value]
    if value is None or isinstance(value, bool) or value in ("", "???"):
        return value
    if NAME.search(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    if (word := WORD.fullmatch(value)) and NAME.search(word[1]):
        return f"{word[1]}={HIDDEN}"
    for name, secret in os.environ.items():
        if NAME.search(name) and len(secret) >= 8:
            value = value.replace(secret, HIDDEN)
    return TOKEN.sub(HIDDEN, value)
