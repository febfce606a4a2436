"""The user's own losses and data sources: modules that KDX_PLUGINS names, and entry points kdx.plugins."""

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from kdx.errors import ConfigError, KdxError


def named() -> list[str]:
    """The modules that KDX_PLUGINS names."""
    return [name.strip() for name in os.environ.get("KDX_PLUGINS", "").split(",") if name.strip()]


def load(run_dir: Path | None) -> None:
    """Import them, and keep their source in the run's folder if there is one. Raises ConfigError."""
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
        except Exception as error:
            what = f"cannot import {name}: {type(error).__name__}: {error}"
            raise ConfigError("KDX_PLUGINS", what, "Give module names, with their folder on PYTHONPATH") from error
        if run_dir is not None:
            _keep_source(name, run_dir / "plugins")


def _keep_source(name: str, folder: Path) -> None:
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        return
    is_package = Path(file).name == "__init__.py"
    for source in Path(file).parent.rglob("*.py") if is_package else [Path(file)]:
        kept = folder / (Path(name) / source.relative_to(Path(file).parent) if is_package else source.name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():  # what made the student stays, whatever the file says now
            shutil.copyfile(source, kept)
