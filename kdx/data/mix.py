"""Several sources in one run, each with its own layout and weight: `data=mix`."""

from importlib import resources
from typing import Any

import yaml
from pydantic import ValidationError

from kdx.config import DataConfig, Tree
from kdx.errors import ConfigError

ONE_SOURCES = ("name", "path", "subset", "split", "take")  # keys of a source; the mixture's others are its defaults


def parts_of(config: DataConfig) -> dict[str, tuple[DataConfig, float]]:
    """Return each source of a mixture as a config of its own, and its share of the counted tokens. Raises ConfigError.

    A source has what it says, else what its layout in conf/data says, else what the mixture says. Data that is no mixture
    is its own only source, without a name.
    """
    if config.name != "mix":
        return {"": (config, 1.0)}
    sources = config.options.get("sources")
    hint = "data.sources.a='{layout: messages, path: chat.jsonl, weight: 0.7}'"
    if not isinstance(sources, dict) or not sources or not all(isinstance(given, dict) for given in sources.values()):
        raise ConfigError("data.sources", "names no sources", f"Give each a layout, a path and a weight: {hint}")
    if not config.shuffle:
        raise ConfigError("data.shuffle", "is false, but a mixture samples its rows", "Leave it out")
    general = {key: value for key, value in config.model_dump().items() if key not in (*ONE_SOURCES, "sources")}
    found, weights = {}, {}
    for name, given in sources.items():
        where, weight = f"data.sources.{name}", given.get("weight")
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ConfigError(f"{where}.weight", f"is {weight!r}, expected a number above 0", hint)
        if "chat_template" in given:
            raise ConfigError(f"{where}.chat_template", "cannot be set for one source", "Set data.chat_template")
        own = {key: value for key, value in given.items() if key not in ("layout", "weight")}
        keys = {"subset": None, "split": "train", "take": None} | general | _layout(given.get("layout"), where) | own
        try:
            found[name] = DataConfig(**keys)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ConfigError(f"{where}.{fault['loc'][0]}", fault["msg"], "conf/data has its keys") from None
        weights[name] = float(weight)
    return {name: (part, weights[name] / sum(weights.values())) for name, part in found.items()}


def _layout(name: Any, where: str) -> Tree:
    """Read the keys that a layout of conf/data and those it builds on set themselves. Raises ConfigError."""
    folder = resources.files("kdx.conf") / "data"
    names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f"{where}.layout", f"is {name!r}", f"Choices: {', '.join(set(names) - {'mix'})}")
    keys = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    below: Tree = {}
    for base in keys.pop("defaults", []):
        if base not in ("_self_", "custom"):
            below |= _layout(base, where)
    return {key: value for key, value in (below | keys).items() if value != "???"}
