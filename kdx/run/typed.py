"""What was typed for a run: kept in its folder, without secrets, and read again to go on or to start anew from it."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path

import yaml

from kdx.errors import ConfigError, MachineError
from kdx.run.files import read_yaml, write_beside
from kdx.run.redact import redact

WORDS, COMMAND = "overrides.yaml", "command.txt"


def keep(run_dir: Path, words: list[str], argv: list[str]) -> None:
    """Keep what a run begins with, never over an earlier record. Raises MachineError."""
    texts = {WORDS: _text(words), COMMAND: _command(argv)}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if not (run_dir / name).exists():
                write_beside(run_dir / name, text)
    except OSError as error:
        raise MachineError(str(run_dir), f"cannot write there: {error.strerror}", "Choose another folder") from None


def renew(run_dir: Path, words: list[str], argv: list[str]) -> None:
    """Keep the words that a run goes on with, which need not be those it began with. Raises OSError."""
    if (run_dir / WORDS).is_file() and told(run_dir) != redact(words):
        write_beside(run_dir / WORDS, _text(words))
    if flags_in(argv) not in ([], told_flags(run_dir)):
        write_beside(run_dir / COMMAND, _command(argv))


def _command(argv: list[str]) -> str:
    return shlex.join(["python", "-m", "kdx", *redact(argv)]) + "\n"


def _text(words: list[str]) -> str:
    return str(yaml.safe_dump(redact(words), allow_unicode=True))


def told(run_dir: Path) -> list[str]:
    """The words of a run; nothing if they are not kept, or damaged: they are only told."""
    file = run_dir / WORDS
    words = read_yaml(file) if file.is_file() else []
    return [str(word) for word in words] if isinstance(words, list) else []


def recalled(folder: Path, asked: str) -> list[str]:
    """The words of a run, to be obeyed again. asked: by what. Raises ConfigError."""
    file = folder / WORDS
    if not file.is_file():
        what = f"{folder} is not a run folder (it has no {WORDS})"
        raise ConfigError(asked, what, "Name a folder that kdx made, as in outputs/2026-11-24/02-45-09-123456")
    words = read_yaml(file)  # a run without words has [] there: an empty file is damaged
    if not isinstance(words, list) or not all(
        isinstance(w, str) and not w.lstrip("+~").startswith("hydra") for w in words
    ):
        raise ConfigError(str(file), "holds words that are not a run's", "Do not use this folder")
    code = [word for word in words if "trust_remote_code" in word]
    for word in code:
        print(f"kdx: {word} is not taken from {folder}: type it again if that code may run", file=sys.stderr)
    return [word for word in words if word not in code]


def flags(run_dir: Path) -> list[str]:
    """The flags of a run's command that name one's own YAML; none if it is not kept. Raises ConfigError."""
    file = run_dir / COMMAND
    try:
        return flags_in(shlex.split(file.read_text(encoding="utf-8")) if file.is_file() else [])
    except ValueError as error:
        raise ConfigError(str(file), f"is not a command ({error})", "Do not use this folder") from None


def flags_in(typed: list[str]) -> list[str]:
    """Those flags among the words of a command."""
    found: list[str] = []
    for i, word in enumerate(typed):
        if word.startswith(("--config-", "-cd", "-cn", "-cp")):
            found += [word] if "=" in word else typed[i : i + 2]
    return found


def told_flags(run_dir: Path) -> list[str]:
    """The same, where they are only told."""
    with suppress(ConfigError):
        return flags(run_dir)
    return []


def last_run() -> Path:
    """The run under outputs/ whose status changed last, of its own or of a sweep. Raises ConfigError."""
    found = [file for depth in ("*/*", "sweeps/*/*") for file in Path("outputs").glob(f"{depth}/status.json")]
    if not found:
        raise ConfigError("run.resume=last", "there is no run under outputs/", "Name a run folder")
    return max(found, key=lambda file: file.stat().st_mtime).parent
