"""What the walk over a configuration refuses, key by key; tests/faults/test_hostile.py has the real command."""

from contextlib import nullcontext

import pytest

from kdx import hostile
from kdx.errors import ConfigError


@pytest.mark.parametrize(
    "key", ["run.dir", "sweep.dir", "sweep.subdir", "output_subdir", "launcher.submitit_folder", "launcher.temp_folder"]
)
@pytest.mark.parametrize("value", ["/x", "~/x", "../x", "a/../../x"])
def test_no_folder_of_a_file_leads_outside(key, value):
    tree = {"job": {}, "launcher": {"submitit_folder": None, "temp_folder": None}, "run": {"dir": "x"}}
    tree |= {"sweep": {"dir": "x", "subdir": "x"}, "output_subdir": None}
    hostile.refuse_untyped(tree)
    *groups, name = key.split(".")
    node = tree
    for group in groups:
        node = node[group]
    node[name] = value
    with pytest.raises(ConfigError, match="leads outside this folder"):
        hostile.refuse_untyped(tree)


@pytest.mark.parametrize(
    ("path", "value", "may"),
    [
        ("hydra.sweeper.sampler", "optuna.samplers.TPESampler", True),
        ("hydra.sweeper.x.sampler", "optuna.samplers.TPESampler", False),
        ("loss.sampler", "optuna.samplers.TPESampler", False),
        ("loss", "hydra_plugins.x.JoblibLauncher", False),
    ],
)
def test_what_may_be_a_target_and_where(path, value, may):
    node = {"_target_": value}
    for name in reversed(path.split(".")):
        node = {name: node}
    with nullcontext() if may else pytest.raises(ConfigError, match="names code to run"):
        hostile.refuse_code(node)
