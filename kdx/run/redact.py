"""Secrets out of all that is written down: logs, the record of a run, W&B."""

import os
import re
from collections.abc import Iterator
from typing import Any

# Tokens by their look; a revision is a commit, 40 hex digits that are no secret, and so may be a part of a path.
SECRET = re.compile(
    r"(?i)(\bhf_[A-Za-z0-9]{16,}|(?<!revision=)(?<!/)\b[a-f0-9]{40}\b|(?<![\w-])sk-[\w-]{16,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@))"
)
TOKEN = r"(?<!\b(?:bos|cls|eos|pad|sep|unk)_)(?<!\b(?:mask|stop)_)token"  # not a tokenizer's own
NAME = rf"(api_?key|access_?key|{TOKEN}|secret|password|passwd|credential)"
SECRET_KEY = re.compile(rf"(?i){NAME}$")
WORD = re.compile(r"[+~]*[\w./@:-]+\s*=")  # the key of a word as typed
IN_DICT = re.compile(  # of a word: what stands under a secret's key
    rf"""(?i)(?P<key>[{{,]\s*['"]?[\w.-]*{NAME}['"]?\s*+:\s*+)(?!null\b|\?\?\?|''|"")"""
    r"""("[^"]*"|'[^']*'|\[[^\]]*\]|\$\{[^}]*\}|[^,}\]])+"""
)
IN_TEXT = re.compile(  # of a word: a text in it that would itself be taken for a secret's key with its value
    rf"""(?i)(?P<key>[=\[{{(,:]\s*(?P<quote>['"])?[\w./@+~-]*{NAME}\s*+=\s*+)(?!(null|\?\?\?|''|"")\s*([,}}\])'"]|$))"""
    r"""(?(quote)(\\.|(?!(?P=quote)).)+|("[^"]*"|'[^']*'|\[[^\]]*\]|\$\{[^}]*\}|[^,}\])])+)"""
)
# An interpolation, which is kept as it is written: the name it ends on, and no default that says anything.
TAKEN = re.compile(r"""\$\{[\s\w.:'"[\]]+(,\s*(null|''|"")?\s*)?\}""")
NAMED = re.compile(r"""\$\{[\s\w.:'"[\]]*?(\w+)[\s'"\]]*[,}]""")
NOTHING = ("", "''", '""', "???", "null")
HIDDEN = "[redacted]"


def redact(value: Any, key: str = "") -> Any:
    """Take secrets out of anything that is written down.

    By the name of the key (typed ones too), by the look of the value, and whatever a secret-looking environment
    variable holds.
    """
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v, key) for v in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return HIDDEN if SECRET_KEY.search(key) else value
    if not isinstance(value, str):
        return value
    typed = WORD.match(value)
    if typed and SECRET_KEY.search(typed[0].rstrip("= ")) and value[typed.end() :] not in NOTHING:
        return typed[0] + HIDDEN
    if SECRET_KEY.search(key) and value not in NOTHING:
        return HIDDEN
    if typed:
        for pattern in (IN_DICT, IN_TEXT):
            value = pattern.sub(rf"\g<key>{HIDDEN}", value)
    for held in _held_secrets():
        value = value.replace(held, HIDDEN)
    names_a_commit = (typed[0].rstrip("= ") if typed else key).endswith("revision")
    return value if names_a_commit else SECRET.sub(HIDDEN, value)


def secrets_in(tree: Any, key: str = "", *, is_resolved: bool = False) -> Iterator[str]:
    """The keys of a config under which a secret stands in clear, not as ${oc.env:NAME}; or will, once it is resolved."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from secrets_in(value, f"{key}.{name}".lstrip("."), is_resolved=is_resolved)
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from secrets_in(value, f"{key}[{i}]", is_resolved=is_resolved)
    else:
        value = getattr(tree, "text", tree)  # Hydra's parser leaves quotes around some texts
        text = value if isinstance(value, str) else ""
        bare = _without_taken(text) if text else value
        name = re.sub(r"(\[\d+\])+$", "", key)
        named = any(SECRET_KEY.search(taken) for taken in NAMED.findall(text))
        if _has_secret(bare, name) or (is_resolved and (named or _has_secret(value, name))):
            yield key


def _has_secret(value: Any, key: str) -> bool:
    return str(redact(value, key)) != str(value)


def _without_taken(text: str) -> str:
    """A text without its interpolations, of which one may be another's default."""
    while (bare := TAKEN.sub("", text)) != text:
        text = bare
    return text


def _held_secrets() -> list[str]:
    """The values of environment variables that are named like secrets."""
    return [held for name, held in os.environ.items() if SECRET_KEY.search(name) and len(held) >= 8]
