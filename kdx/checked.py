"""Plain values → a checked Config, or one error with a line for everything that is wrong."""

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from kdx.config import OPEN_GROUPS, Config, Group, contradictions, leaves
from kdx.errors import ConfigError, together
from kdx.words import FOREIGN, hint_for, is_mistyped

TYPES = {
    "integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false", "null": "null",
    "array": "a list", "object": "a mapping",
}  # fmt: skip
BOUNDS = {
    "minimum": "{:g} or more", "exclusiveMinimum": "above {:g}", "maximum": "at most {:g}",
    "exclusiveMaximum": "below {:g}",
}  # fmt: skip


def checked(tree: dict[str, Any], faults: list[ConfigError], typed: set[str], in_yaml: list[str]) -> Config:
    """Check a tree of plain values. Raises one ConfigError with these faults and all others.

    typed: the keys on the command line. in_yaml: the keys that the YAML of the chosen options has.
    """
    groups: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    own = [f"{group}.{name}" for group, model in groups.items() for name in model.model_fields]
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


def _of_shape(error: ValidationError, tree: dict[str, Any], known: list[str]) -> list[ConfigError]:
    """One line for every key whose value or name does not fit."""
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
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        if kind == "extra_forbidden":
            for name in _leaves(key, value):
                found[name] = ConfigError(
                    name or "=", "is not a key of kdx", hint_for(name, [k for k in known if k != name])
                )
            continue
        what, hint = f"is {shown}", f"Set those: {key}.NAME=..."
        if kind == "missing":  # the first of its group: an option that builds on none of kdx's own lacks many
            what, hint = "is missing", f"Set it: {key}=..., or begin your option with: defaults: [NAME, _self_]"
            found.setdefault(".".join(path[:-1]), ConfigError(key, what, hint))
            continue
        if kind == "model_type":
            what += ", but has keys of its own"
        else:
            near = get_close_matches(str(value), schema.get("enum", ()), n=1, cutoff=0.65)
            hint = (f"Did you mean {near[0]}? " if near else "") + f"Expected {_expected(schema)}"
            hint = f"{hint}. {schema.get('description', '')}".rstrip(". ")
        found.setdefault(key, ConfigError(key, what, hint))
    return list(found.values())


def _leaves(key: str, value: Any) -> list[str]:
    """The keys below an unknown one, as they were typed."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]


def _expected(schema: dict[str, Any]) -> str:
    """Say what a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_expected, schema["anyOf"])))
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    bounds = [text.format(schema[name]) for name, text in BOUNDS.items() if name in schema]
    return TYPES[schema["type"]] + (f" ({', '.join(bounds)})" if bounds else "")


def _of_options(tree: dict[str, Any], typed: set[str], known: list[str]) -> list[ConfigError]:
    """Further keys of the open groups that look like a typo of a key, or are another tool's word."""
    found = []
    for group in OPEN_GROUPS:
        node = tree.get(group)
        for name in node if isinstance(node, dict) else ():
            key = f"{group}.{name}"
            is_foreign = name in FOREIGN and f"{group}.name" not in typed  # of one's own function, names are free
            if key not in known and (is_foreign or is_mistyped(key, known)):
                found.append(ConfigError(key, "is not a key of kdx", hint_for(key, known)))
    return found


def _of_code(tree: dict[str, Any], typed: set[str]) -> list[ConfigError]:
    """Code that a file would have run: a model's own must be asked for by typing it."""
    found = []
    for key, value in leaves(tree).items():
        if key.endswith(".trust_remote_code") and value is True and key not in typed:
            what = "runs a model's own code, so a file alone cannot ask for it"
            found.append(ConfigError(key, what, f"Type {key}=true"))
        if key.endswith("_target_"):
            found.append(ConfigError(key, "names code to run", "kdx runs none that a config names: remove it"))
    return found
