"""The user's own losses, sources and samplers: modules that KDX_PLUGINS names, and entry points kdx.plugins."""

import importlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from kdx.errors import ConfigError, KdxError, did_you_mean


def load() -> None:
    """Import every plug-in. Raises ConfigError."""
    if os.environ.get("KDX_PLUGINS") and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in _all():
        try:
            importlib.import_module(name)
        except KdxError:
            raise
        except Exception as error:
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            raise ConfigError("KDX_PLUGINS", what, "Name modules whose folder is on PYTHONPATH") from error


def files() -> dict[Path, Path]:
    """Find the files of the user's modules, of a package all, without importing them → their names below its folder."""
    found: dict[Path, Path] = {}
    for name in sorted({name.partition(".")[0] for name in _all()}):
        spec = find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])
        if spec and spec.origin:
            file = Path(spec.origin)
            is_package = file.name == "__init__.py"
            sources = sorted(file.parent.rglob("*.py")) if is_package else [file]
            found |= {source: source.relative_to(file.parents[is_package]) for source in sources}
    return found


def keep(run_dir: Path) -> None:
    """Copy the source of every plug-in into the run's folder, once."""
    for source, name in files().items():
        kept = run_dir / "plugins" / name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, kept)


def option_faults(
    function: Callable[..., Any], options: dict[str, Any], prefix: str, num_given: int = 0, given: Sequence[str] = ()
) -> list[ConfigError]:
    """Check options against a function's signature, past the parameters it is given anyway: names, types, missing."""
    parameters = {p.name: p for p in [*inspect.signature(function).parameters.values()][num_given:]}
    parameters = {name: parameter for name, parameter in parameters.items() if name not in given}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    hints: dict[str, Any] = {}
    with suppress(NameError):  # an annotation may name what is imported for type checking alone
        hints = get_type_hints(function) if inspect.isfunction(function) else {}
    found = []
    for name, value in options.items():
        if name not in parameters:
            hint = did_you_mean(name, list(parameters)) if parameters else "It takes none"
            hint += "" if hint.startswith("Did you") else f". To leave it out: ~{prefix}{name}"
            found.append(ConfigError(prefix + name, "is not an option here", hint))
        elif wrong := _unlike(value, hints.get(name, Any)):
            found.append(ConfigError(prefix + name, f"is {value!r}", wrong))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            found.append(ConfigError(prefix + name, "is missing", f"Set it: {prefix}{name}=..."))
    return found


def _unlike(value: Any, wanted: Any) -> str:
    """Say what a value should be, if it is not of the annotated type."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    from kdx.checked import should

    try:
        TypeAdapter(wanted, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        return f"It should {should(fault['msg'] for fault in error.errors())}"
    except (PydanticUserError, TypeError):  # an annotation that only its author understands
        pass
    return ""


def _all() -> list[str]:
    """List the modules that KDX_PLUGINS names and those of installed packages."""
    named = [name.strip() for name in os.environ.get("KDX_PLUGINS", "").split(",") if name.strip()]
    return list(dict.fromkeys([*named, *(entry.module for entry in entry_points(group="kdx.plugins"))]))
