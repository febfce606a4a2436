"""Plain values → a checked Config, or one error with a line for everything that is wrong."""

import math
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from kdx.config import OPEN_GROUPS, Config, Group, contradictions, dotted
from kdx.errors import ConfigError, together
from kdx.words import FOREIGN, hint_for, is_mistyped

TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
TYPES |= {"array": "a list", "object": "a mapping"}
BOUNDS = {"minimum": "{:g} or more", "exclusiveMinimum": "above {:g}", "maximum": "at most {:g}"}
BOUNDS |= {"exclusiveMaximum": "below {:g}"}


def checked(tree: dict[str, Any], faults: list[ConfigError], typed: set[str], in_yaml: list[str]) -> Config:
    """Check a tree of plain values. Raises one ConfigError with these faults and all others.

    typed: the keys on the command line. in_yaml: the keys that the YAML of the chosen options has.
    """
    own = [f"{group}.{name}" for group, model in _groups().items() for name in model.model_fields]
    known = list(dict.fromkeys([*own, *(key for key in in_yaml if "." in key)]))
    faults = [*faults, *_of_options(tree, typed, known), *_of_code(tree, typed)]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = _of_shape(error, tree, known)
        reported = {fault.args[0] for fault in faults}
        faults += [fault for fault in found if fault.args[0] not in reported]
    if not faults:
        faults = [ConfigError(*contradiction) for contradiction in contradictions(config)]
    if faults:
        raise together(faults)
    return config


def show(value: Any) -> str:
    """Write a value as YAML would; quotes tell text from numbers."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _groups() -> dict[str, type[Group]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def _of_shape(error: ValidationError, tree: dict[str, Any], known: list[str]) -> list[ConfigError]:
    """One line for every key whose value or name does not fit."""
    missing: dict[str, list[str]] = {}
    found: dict[str, ConfigError] = {}
    for fault in error.errors(include_url=False, include_context=False):
        model: Any = Config
        value: Any = tree
        schema: dict[str, Any] = {}
        path: list[str] = []
        for part in fault["loc"]:  # behind the key come the members of a union
            path.append(str(part))
            value = value.get(part) if isinstance(value, dict) else value
            if part not in model.model_fields:
                break
            schema, model = model.model_json_schema()["properties"][part], model.model_fields[part].annotation
            if not (isinstance(model, type) and issubclass(model, Group)):
                break
        key, kind = ".".join(path), fault["type"]
        if kind == "missing":
            missing.setdefault(".".join(path[:-1]), []).append(path[-1])
        elif kind == "extra_forbidden":
            for name in _leaves(key, value):
                found.setdefault(name, ConfigError(name, "is not a key of kdx", _hint_for(name, [k for k in known if k != name])))
        elif kind == "model_type":
            what = f"is {show(value)}, but has keys of its own"
            found.setdefault(key, ConfigError(key, what, f"Set those: {key}.NAME=..."))
        else:
            near = get_close_matches(str(value), schema.get("enum", ()), n=1, cutoff=0.65)
            hint = (f"Did you mean {near[0]}? " if near else "") + f"Expected {_expected(schema)}"
            meaning = schema.get("description", "").rstrip(".")
            found.setdefault(key, ConfigError(key, f"is {show(value)}", f"{hint}. {meaning}".rstrip(". ")))
    for group, names in missing.items():
        if group and len(names) > 2:
            hint = "Build the option on one of kdx's own: defaults: [NAME, _self_]"
            found[group] = ConfigError(group, f"has no {', '.join(names)}", hint)
        else:
            keys = [f"{group}.{name}".lstrip(".") for name in names]
            found |= {key: ConfigError(key, "is missing", f"Set it: {key}=...") for key in keys}
    return list(found.values())


def _leaves(key: str, value: Any) -> list[str]:
    """The keys below an unknown one, as they were typed."""
    if not isinstance(value, dict) or not value or key in ("experiment", "recipe", "pair"):
        return [key]
    return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]


def _hint_for(key: str, known: list[str]) -> str:
    if key.split(".")[0] in ("experiment", "recipe", "pair"):
        return f'Begin the YAML of that {key.split(".")[0]} with the line "# @package _global_"'
    return hint_for(key, known)


def _expected(schema: dict[str, Any]) -> str:
    """Say what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_expected, schema["anyOf"])))
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    bounds = [text.format(schema[name]) for name, text in BOUNDS.items() if name in schema]
    return TYPES[schema["type"]] + (f" ({', '.join(bounds)})" if bounds else "")


def _of_options(tree: dict[str, Any], typed: set[str], known: list[str]) -> list[ConfigError]:
    """Further keys of the open groups that look like a typo of a key, or hold a number that is none."""
    found = []
    for group in OPEN_GROUPS:
        node = tree.get(group)
        for name, value in node.items() if isinstance(node, dict) else ():
            key = f"{group}.{name}"
            is_foreign = name in FOREIGN and f"{group}.name" not in typed  # of one's own function, names are free
            if key not in known and (is_foreign or is_mistyped(key, known)):
                found.append(ConfigError(key, "is not a key of kdx", hint_for(key, known)))
            elif name not in _groups()[group].model_fields and not _is_finite(value):
                found.append(ConfigError(key, f"is {show(value)}", "Set a finite number"))
    return found


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _of_code(tree: dict[str, Any], typed: set[str]) -> list[ConfigError]:
    """Code that a file would have run: a model's own must be asked for by typing it."""
    found = []
    for group in ("teacher", "student"):
        key, node = f"{group}.trust_remote_code", tree.get(group)
        if isinstance(node, dict) and node.get("trust_remote_code") is True and key not in typed:
            found.append(
                ConfigError(key, "runs a model's own code, so a file alone cannot ask for it", f"Type {key}=true")
            )
    for key in dotted(tree):
        if key.endswith("_target_"):
            found.append(ConfigError(key, "names code to run", "kdx runs none that a config names: remove it"))
    return found
