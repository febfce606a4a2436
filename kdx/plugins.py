"""The user's own losses, sources and samplers: modules that KDX_PLUGINS names, and entry points kdx.plugins."""

import importlib
import os
import shutil
import sys
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from kdx.errors import ConfigError, KdxError


def load() -> None:
    """Import every plug-in. Raises ConfigError."""
    if os.environ.get("KDX_PLUGINS") and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in modules():
        try:
            importlib.import_module(name)
        except KdxError:
            raise
        except Exception as error:
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            raise ConfigError("KDX_PLUGINS", what, "Name modules in this folder or on PYTHONPATH") from error


def files() -> dict[Path, Path]:
    """Find the files of the user's modules, of a package all, without importing them → their names below its folder."""
    found: dict[Path, Path] = {}
    for name in sorted({name.partition(".")[0] for name in modules()}):
        spec = find_spec(name) or PathFinder.find_spec(name, [os.getcwd()])
        if spec and spec.origin:
            file = Path(spec.origin)
            is_package = file.name == "__init__.py"
            sources = sorted(file.parent.rglob("*.py")) if is_package else [file]
            found |= {source: source.relative_to(file.parents[is_package]) for source in sources}
    return found


def keep(run_dir: Path) -> None:
    """Copy the source of every plug-in into the run's folder."""
    for source, name in files().items():
        kept = run_dir / "plugins" / name
        if source.resolve() != kept.resolve():  # the kept one may be used to resume
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, kept)


def modules() -> list[str]:
    """List the modules that KDX_PLUGINS names and those of installed packages."""
    named = [name.strip() for name in os.environ.get("KDX_PLUGINS", "").split(",") if name.strip()]
    return list(dict.fromkeys([*named, *(entry.module for entry in entry_points(group="kdx.plugins"))]))
