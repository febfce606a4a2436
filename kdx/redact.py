"""Secrets out of all that is written down: logs, the record of a run, W&B."""

import os
import re
from collections.abc import Iterator
from typing import Any

# Tokens by their look; a revision is a commit, 40 hex digits that are no secret.
SECRET = re.compile(
    r"(?i)(\bhf_[A-Za-z0-9]{16,}|(?<!revision=)(?<!snapshots/)\b[a-f0-9]{40}\b|(?<![\w-])sk-[\w-]{16,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@))"
)
SECRET_KEY = re.compile(r"(?i)(api_?key|access_?key|token|secret|password|passwd|credential)$")
WORD = re.compile(r"[+~]*[\w./-]+=")  # the key of a word as typed
TAKEN = re.compile(r"\$\{([\w.:]+)(,null)?\}")  # an interpolation, which is kept as it is written
HIDDEN = "[redacted]"


def redact(value: Any, key: str = "") -> Any:
    """Take secrets out of anything that is written down.

    By the name of the key (typed ones too), by the look of the value, and whatever a secret-looking environment
    variable holds.
    """
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if not isinstance(value, str):
        return value
    typed = WORD.match(value)
    if typed and SECRET_KEY.search(typed[0].rstrip("=")):
        return typed[0] + HIDDEN
    if SECRET_KEY.search(key) and value:
        return HIDDEN
    for held in _held_secrets():
        value = value.replace(held, HIDDEN)
    names_a_commit = (typed[0].rstrip("=") if typed else key).endswith("revision")
    return value if names_a_commit else SECRET.sub(HIDDEN, value)


def secrets_in(tree: Any, key: str = "", *, is_resolved: bool = False) -> Iterator[str]:
    """The keys of a config under which a secret stands in clear, not as ${oc.env:NAME}; or will, once it is resolved."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from secrets_in(value, f"{key}.{name}".lstrip("."), is_resolved=is_resolved)
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from secrets_in(value, f"{key}[{i}]", is_resolved=is_resolved)
    elif isinstance(tree, str):
        named = any(SECRET_KEY.search(taken[1]) for taken in TAKEN.finditer(tree))
        bare = TAKEN.sub("", tree)
        if redact(bare, key) != bare or (is_resolved and (named or redact(tree, key) != tree)):
            yield key


def _held_secrets() -> list[str]:
    """The values of environment variables that are named like secrets."""
    return [held for name, held in os.environ.items() if SECRET_KEY.search(name) and len(held) >= 8]
