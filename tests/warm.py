"""Imported once by the process that all runs are forked from: a run of one step, which loads what is loaded late."""

import gc
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import runs
from accelerate.state import AcceleratorState, GradientState

with tempfile.TemporaryDirectory() as _folder, open(os.devnull, "w") as _nowhere, redirect_stdout(_nowhere):
    os.environ.setdefault("TQDM_DISABLE", "1")
    _place = runs.make_place(Path(_folder))
    runs.distill(runs.config_of(_place, "train.max_steps=1"), Path(_folder) / "run")
AcceleratorState._reset_state(reset_partial_state=True)  # some of those forked are one of several processes
GradientState._reset_state()
gc.collect()
gc.freeze()  # else the collector of every process forked from this one copies all that is there
