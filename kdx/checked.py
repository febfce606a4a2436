"""What pydantic finds in plain values, as one error with a line for everything that is wrong."""

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from kdx.config import OPEN_GROUPS, Config, Tree, contradictions, leaves
from kdx.errors import ConfigError, did_you_mean, together
from kdx.words import FOREIGN, hint_for

WISHES = {"data.validation": "a number of rows, a share below 1, a file, split:NAME, or null"}  # in place of pydantic's
OPTIONS = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


def checked(tree: Tree, in_yaml: Tree, typed: Collection[str], faults: list[ConfigError]) -> Config:
    """Check a tree of plain values. Raises one ConfigError with these faults and all others.

    in_yaml: what the YAML of the chosen options says. typed: the keys on the command line.
    """
    known = [key for key in leaves(in_yaml) if "." in key]

    def unknown(key: str) -> ConfigError:
        hint, group = hint_for(key, [name for name in known if name != key]), key.split(".")[0]
        what = f"an option of {group}={tree[group].get('name')}" if f"{key}, with" in hint else "a key of kdx"
        return ConfigError(key, f"is not {what}", hint)

    faults = [*faults, *map(unknown, _odd_options(tree, in_yaml, typed))]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        reported = {fault.args[0] for fault in faults}
        faults += [fault for fault in faults_of(error, tree, unknown) if fault.args[0] not in reported]
    if not faults:
        faults = [ConfigError(*contradiction) for contradiction in contradictions(config, typed)]
    if faults:
        raise together(faults)
    return config


def _odd_options(tree: Tree, in_yaml: Tree, typed: Collection[str]) -> list[str]:
    """Find options of the open groups that look like a typo of a key, or are another tool's word."""
    found = []
    for group in OPEN_GROUPS:
        own, values = in_yaml.get(group, {}), tree.get(group)
        is_own = f"{group}.name" in typed  # its options may have any names
        for name in values if isinstance(values, dict) else ():
            is_foreign = not is_own and {name, f"{group}.{name}"} & FOREIGN.keys()
            if name not in own and (is_foreign or get_close_matches(name, own, n=1, cutoff=0.8)):
                found.append(f"{group}.{name}")
    return found


def check_options(
    function: Callable[..., Any], options: dict[str, Any], prefix: str, num_given: int = 0, given: Sequence[str] = ()
) -> None:
    """Check options against a function's signature, past the parameters it is given anyway: names, types, missing.

    Raises one ConfigError with a line for each fault.
    """
    parameters = [*inspect.signature(function).parameters.values()][num_given:]
    parameters = [parameter for parameter in parameters if parameter.name not in given]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    types: dict[str, Any] = {}
    with suppress(NameError):  # an annotation may name what is imported for type checking alone
        types = get_type_hints(function) if inspect.isfunction(function) else {}
    fields: dict[str, Any] = {
        f"option_{i}": (types.get(p.name, Any), Field(... if p.default is p.empty else None, alias=p.name))
        for i, p in enumerate(parameters)
    }
    names = [parameter.name for parameter in parameters]

    def unknown(key: str) -> ConfigError:
        hint = did_you_mean(key, [prefix + name for name in names]) if names else "It takes none"
        return ConfigError(key, f"is not an option of {function.__name__}", f"{hint}. To leave it out: ~{key}")

    try:
        create_model("Options", __config__=OPTIONS, **fields).model_validate(options)
    except ValidationError as error:
        raise together(faults_of(error, options, unknown, prefix)) from None


def faults_of(
    error: ValidationError, tree: Tree, unknown: Callable[[str], ConfigError], prefix: str = ""
) -> list[ConfigError]:
    """Say what pydantic found in a tree of values, once for each key. unknown: what to say of one that does not exist."""
    found: dict[str, ConfigError] = {}
    wanted: dict[str, dict[str, None]] = {}  # of a union each member says what it wants
    for fault in error.errors(include_url=False, include_context=False):
        value: Any = tree
        path: list[str] = []
        for part in map(str, fault["loc"]):  # behind the key come the members of a union
            if isinstance(value, dict) and (part in value or fault["type"] == "missing"):
                path.append(part)
                value = value.get(part)
        key = prefix + ".".join(path)
        if fault["type"] == "extra_forbidden":
            found |= {name: unknown(name) for name in leaves({key: value}) or [key]}
        elif fault["type"] == "missing":
            begin = f", or begin your own {key.partition('.')[0]} option with: defaults: [NAME, _self_]"
            found[key] = ConfigError(key, "is missing", f"Set it: {key}=...{'' if prefix else begin}")
        else:
            wish = re.sub(r"^\w+ should | or instance of \w+", "", fault["msg"])
            wanted.setdefault(key, {})[wish] = None
            shown = json.dumps(value, ensure_ascii=False, default=str)
            near = get_close_matches(str(value), re.findall(r"'(\w+)'", fault["msg"]), n=1)
            near = ["null"] if value == "None" else near
            hint = f"It should be {WISHES[key]}" if key in WISHES else f"It should {' or '.join(wanted[key])}"
            found[key] = ConfigError(key, f"is {shown}", f"Did you mean {near[0]}? {hint}" if near else hint)
    return list(found.values())
