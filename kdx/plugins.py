"""The user's own losses and data sources: modules that KDX_PLUGINS names, and entry points kdx.plugins."""

import ast
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from kdx.errors import ConfigError, KdxError

INSTALLED = {"site-packages", "dist-packages"}


def named() -> list[str]:
    """The modules that KDX_PLUGINS names."""
    return [name.strip() for name in os.environ.get("KDX_PLUGINS", "").split(",") if name.strip()]


def load() -> None:
    """Import them. Raises ConfigError."""
    names = named()
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: list[tuple[str, Callable[[], object]]] = [(n, lambda n=n: importlib.import_module(n)) for n in names]  # type: ignore[misc]
    found += [(entry.module, entry.load) for entry in entry_points(group="kdx.plugins")]
    for name, start in found:
        try:
            start()
        except KdxError:
            raise
        except (Exception, SystemExit) as error:  # a script that ends is no module
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            raise ConfigError("KDX_PLUGINS", what, "Give module names, with their folder on PYTHONPATH") from error


def keep(run_dir: Path) -> None:
    """Keep their source in the run's folder."""
    for name in _all():
        home = _home(name)
        for source in _sources(name):
            kept = run_dir / "plugins" / (source.relative_to(home) if home else source.name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            if not kept.exists():  # what made the student stays, whatever the file says now
                shutil.copyfile(source, kept)


def digest() -> str | None:
    """A digest of their source, which a run that goes on must find as it was; None if there are none."""
    sources = list(dict.fromkeys(source for name in _all() for source in _sources(name)))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16] if sources else None


def _all() -> list[str]:
    return sorted({*named(), *(entry.module for entry in entry_points(group="kdx.plugins"))})


def _home(name: str) -> Path | None:
    """The folder that a module, or its outermost package, lies in."""
    top = sys.modules.get(name.partition(".")[0])
    places = [*getattr(top, "__path__", ()), *filter(None, [getattr(top, "__file__", None)])]  # of a package its folder
    return Path(places[0]).parent if places else None


def _sources(name: str) -> list[Path]:
    """The files of an imported module, or of the whole package, and of what they import from the folder it lies in."""
    file, home = Path(getattr(sys.modules.get(name), "__file__", None) or ""), _home(name)
    if file.suffix != ".py" or home is None:
        return []
    todo = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    found: list[Path] = []
    while todo:
        source = todo.pop(0)
        if source not in found:
            found.append(source)
            todo += [] if INSTALLED & {*source.parts} else _imported(source, home)
    return sorted(found)


def _imported(source: Path, home: Path) -> list[Path]:
    """The files below a folder that a source imports, by any name that leads to one."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = source.parents[min(node.level, len(source.parents)) - 1] if node.level else home
            above = package.relative_to(home).parts if package.is_relative_to(home) else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    names = [name for name in names if name.partition(".")[0] not in ("", "kdx")]
    places = [home.joinpath(*name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in dict.fromkeys(files) if file.is_file()]
