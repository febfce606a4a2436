"""Plain values → a checked Config, or one error with a line for everything that is wrong."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from kdx.config import OPEN_GROUPS, Config, DataConfig, Group, contradictions, leaves
from kdx.data import sources
from kdx.errors import ConfigError, together
from kdx.words import FOREIGN, hint_for

PLAINER = {  # than what pydantic says
    "be None": "be null", "a valid boolean": "true or false", "a valid integer": "a whole number", "a valid ": "a ",
    "a dictionary": "a group of keys", "have at least 1 item after validation, not 0": "not be empty",
}  # fmt: skip


def checked(tree: dict[str, Any], faults: list[ConfigError], typed: set[str], in_yaml: list[str]) -> Config:
    """Check a tree of plain values. Raises one ConfigError with these faults and all others.

    typed: the keys on the command line. in_yaml: the keys that the YAML of the chosen options has.
    """
    own = [f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields]  # type: ignore[union-attr]
    known = list(dict.fromkeys([*own, *(key for key in in_yaml if "." in key)]))
    faults = [*faults, *_of_options(tree, typed, known), *_of_code(tree, typed), *_of_off(tree, typed, known)]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        reported = {fault.args[0] for fault in faults}
        faults += [fault for fault in _of_shape(error, known) if fault.args[0] not in reported]
    if not faults:
        faults = [ConfigError(*contradiction) for contradiction in contradictions(config)] + _of_source(config.data)
    if faults:
        raise together(faults)
    return config


def should(messages: Iterable[str]) -> str:
    """Join what pydantic says of a value, once for each type that it could have: `be a whole number or be null`."""
    text = " or ".join(dict.fromkeys(re.sub(r"^.*? should | or instance of \w+$", "", message) for message in messages))
    for pydantics, ours in PLAINER.items():
        text = text.replace(pydantics, ours)
    return text


def _of_shape(error: ValidationError, known: list[str]) -> list[ConfigError]:
    """One line for every key whose value or name does not fit."""
    found: dict[str, ConfigError] = {}
    for fault in error.errors(include_url=False, include_context=False):
        model: Any = Config
        path: list[str] = []
        for part in fault["loc"]:  # behind the key come the members of a union
            path.append(str(part))
            field = model.model_fields.get(part)
            if not field or not (isinstance(field.annotation, type) and issubclass(field.annotation, Group)):
                break
            model = field.annotation
        key, value = ".".join(path), fault["input"]
        if fault["type"] == "extra_forbidden":
            for name in leaves({key: value}) or [key]:
                hint = hint_for(name, [other for other in known if other != name])
                found[name] = ConfigError(name, "is not a key of kdx", hint)
        elif fault["type"] == "missing":  # one of each group: an option that builds on none of kdx's own lacks many
            hint = f"Set it: {key}=..., or begin your option with: defaults: [NAME, _self_]"
            found.setdefault(".".join(path[:-1]), ConfigError(key, "is missing", hint))
        elif key not in found:
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
            wanted = should(other["msg"] for other in error.errors() if other["loc"][: len(path)] == (*path,))
            choices = re.findall(r"'(\w+)'", wanted)
            near = ["null"] * (value == "None") or get_close_matches(str(value), choices, n=1, cutoff=0.65)
            hint = f"Did you mean {near[0]}? " if near else ""
            hint += f"It should {wanted}. {field.description or '' if field else ''}".rstrip(". ")
            found[key] = ConfigError(key, f"is {shown}", hint)
    return list(found.values())


def _of_options(tree: dict[str, Any], typed: set[str], known: list[str]) -> list[ConfigError]:
    """Further keys of the open groups that look like a typo of a key, or are another tool's word."""
    found = []
    for group in OPEN_GROUPS:
        own = [key.removeprefix(f"{group}.") for key in known if key.startswith(f"{group}.")]
        for name in node if isinstance(node := tree.get(group), dict) else ():
            key = f"{group}.{name}"
            is_foreign = {name, key} & FOREIGN.keys() and f"{group}.name" not in typed  # one's own names are free
            if name not in own and (is_foreign or get_close_matches(name, own, n=1, cutoff=0.8)):
                found.append(ConfigError(key, "is not a key of kdx", hint_for(key, known)))
    return found


def _of_source(data: DataConfig) -> list[ConfigError]:
    """Options that the data source does not have. Plug-ins are not imported yet, so one's own source is checked later."""
    try:
        if data.name in sources._SOURCES:
            sources.check_source(data)
    except ConfigError as error:
        return [error]
    return []


def _of_off(tree: dict[str, Any], typed: set[str], known: list[str]) -> list[ConfigError]:
    """Typed keys that change nothing, because of a choice that was not typed."""
    found, flat, keys = [], leaves(tree), sorted(typed.intersection(known))
    for choice, of, key, off, why in (
        ("adapter=lora", "adapter.", "adapter.name", "none", "the student has no adapter"),
        ("rollout=student", "rollout.", "rollout.name", "none", "nothing is generated"),
        ("data=pairs or data=messages", "data.path", "data.name", "chitchat", "data=chitchat has rows of its own"),
        ("student=hf", "student.path", "student.init", "cut", "the student is cut from the teacher"),
    ):
        if choice.split("=")[0] not in typed and flat.get(key) == off:
            none = [name for name in keys if name.startswith(of) and name != key and flat.get(name) is not None]
            found += [ConfigError(name, f"has no effect: {why}", f"Add {choice}") for name in none]
    return found


def _of_code(tree: dict[str, Any], typed: set[str]) -> list[ConfigError]:
    """A model's own code that YAML asks to run: that must be typed."""
    keys = [key for key, value in leaves(tree).items() if key.endswith(".trust_remote_code") and value is True]
    what = "runs a model's own code, so it must be typed, not only set in YAML"
    return [ConfigError(key, what, f"Type {key}=true") for key in keys if key not in typed]
