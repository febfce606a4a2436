"""Secrets out of all that is written down: logs, the record of a run, W&B."""

import re
from typing import Any

SECRET = re.compile(r"(?i)(hf_[A-Za-z0-9]{8,}|\b[a-f0-9]{40}\b|sk-[\w-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@))")
SECRET_KEY = re.compile(r"(?i)(api_?key|token|secret|password|passwd|credential)$")


def redact(value: Any, key: str = "") -> Any:
    """Take secrets out of anything that is written down: by the name of the key, and by the look of the value."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if isinstance(value, str):
        if SECRET_KEY.search(key) and value:
            return "[redacted]"
        # a revision is a commit: 40 hex digits that are no secret
        return value if key == "revision" else SECRET.sub("[redacted]", value)
    return value
