"""The user's own losses and data sources: modules that KDX_PLUGINS names, and entry points kdx.plugins."""

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
_helpers: dict[str, set[str]] = {}  # modules that stand beside a plug-in, and were imported with it


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
        before = {*sys.modules}
        try:
            start()
        except KdxError:
            raise
        except (Exception, SystemExit) as error:  # a script that ends is no module
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            raise ConfigError("KDX_PLUGINS", what, "Give module names, with their folder on PYTHONPATH") from error
        _helpers.setdefault(name, set()).update(_beside(name, {*sys.modules} - before))


def _beside(name: str, modules: set[str]) -> set[str]:
    """Those of some modules that lie in a plug-in's folder, or below it, and are not installed."""
    top = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
    if top is None:
        return set()
    home = Path(top).parents[1] if Path(top).name == "__init__.py" else Path(top).parent
    others = {"kdx", *sys.stdlib_module_names}
    files = {m: Path(getattr(sys.modules.get(m), "__file__", None) or "/") for m in modules}
    own = {m: file for m, file in files.items() if m.partition(".")[0] not in others and file.is_relative_to(home)}
    return {m for m, file in own.items() if not INSTALLED & {*file.parts}}


def keep(run_dir: Path) -> None:
    """Keep their source in the run's folder."""
    for name in _all():
        _keep_source(name, run_dir / "plugins")


def digest() -> str | None:
    """A digest of their source, which a run that goes on must find as it was; None if there are none."""
    sources = [source for name in _all() for source in _sources(name)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16] if sources else None


def _all() -> list[str]:
    names = {*named(), *(entry.module for entry in entry_points(group="kdx.plugins"))}
    inside = tuple(f"{name}." for name in names)  # of a package all files are its sources
    helpers = {helper for name in names for helper in _helpers.get(name, ())}
    return sorted(names | {helper for helper in helpers if not helper.startswith(inside)})


def _sources(name: str) -> list[Path]:
    """The files of an imported module, or of the whole package."""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    if file.suffix != ".py":
        return []
    return sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


def _keep_source(name: str, folder: Path) -> None:
    is_package = hasattr(sys.modules.get(name), "__path__")
    for source in _sources(name):
        root = Path(str(sys.modules[name].__file__)).parent
        kept = folder / (Path(name) / source.relative_to(root) if is_package else source.name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():  # what made the student stays, whatever the file says now
            shutil.copyfile(source, kept)
