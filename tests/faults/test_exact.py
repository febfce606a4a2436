"""A run stopped anywhere and gone on with is the straight run, bit for bit; under another config it is refused."""

import json
import os
import re
import shutil
import signal
from functools import partial

import pytest
from processes import free_port
from runs import (
    compose,
    config_of,
    outcome,
    signal_at,
    start,
    start_command,
    status,
    steps_of,
    straight,
    words_of,
    write_dialogpt,
    write_pairs,
)

from kdx.run import checkpoint
from kdx.run.files import MANIFEST, seal

EPOCHS = "train.epochs=2.5"  # of 9 steps: 23
KINDS = {
    "dropout, accumulation 4, 2.5 epochs": (),
    "8-bit optimizer": ("optim=adamw_8bit",),
    "bf16 autocast": ("train.precision=bf16",),
    "keep=best, early stopping": (
        "train.eval_every=2", "train.keep=best", "train.early_stopping.patience=3", "optim.lr=0.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_gone_on_with(place, tmp_path, full, figure, kind):
    config = config_of(place, EPOCHS, "train.save_every=100", *KINDS[kind])
    expected, _ = straight(config, tmp_path / "straight")
    last = steps_of(tmp_path / "straight")[-1]
    assert last == 23 or ("best" in kind and last < 23)
    is_best = "best" in kind
    points = [2, last // 2, last - 1] if full else [last // 2]
    if is_best and not full:
        points = [last - 1]  # some measures were worse by then
    equal = 0
    for step in points:
        run_dir = tmp_path / f"at-{step}"
        assert start(config, run_dir, signal_at(step)).code == 143
        assert status(run_dir)["step"] == step
        if is_best:
            (run_dir / "checkpoints" / "best.safetensors").unlink()  # the checkpoint has its own
        again = start(config, run_dir)
        assert again.code == 0, again.text
        assert "going on from" in again.text
        equal += outcome(run_dir) == expected
    figure(f"exact resume, {kind}: {equal}/{len(points)} bitwise equal")
    assert equal == len(points)


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory):
    """A run of its own files, stopped at step 5 of 9."""
    folder = tmp_path_factory.mktemp("drift")
    shutil.copytree(place, folder / "place")
    words = ("train.micro_batch_size=2", "train.max_steps=9", "optim.schedule=constant")
    run = start(config_of(folder / "place", *words), folder / "run", signal_at(5))
    assert run.code == 143
    assert "to go on: the same call of distill" in run.text  # it was not typed
    return folder, words


def other_data(place):
    write_pairs(place / "pairs.jsonl", 41)


def other_teacher(place):
    shutil.rmtree(place / "teacher")
    write_dialogpt(place / "teacher", 2, 16, pickled=False, seed=7)


def other_tokenizer(place):
    """Two ids change places: the rows' tokens change, and so does what the teacher says."""
    for model in ("teacher", "student"):
        file = place / model / "vocab.json"
        vocab = json.loads(file.read_text())
        a, b = list(vocab)[60:62]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        file.write_text(json.dumps(vocab))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (other_data, "fingerprint"),
        ("optim.lr=2e-2", "optim.lr"),
        ("train.micro_batch_size=4", "train.micro_batch_size"),
        ("teacher.micro_batch_size=4", "teacher.micro_batch_size"),
        (other_teacher, "teacher_digest"),
        (other_tokenizer, "tokenizer_digest"),
        ("train.seed=3", "train.seed"),
        ("loss=reverse_kl", "loss.name"),
    ],
    ids=["data", "lr", "accumulation", "teacher's layout", "teacher", "tokenizer", "seed", "loss"],
)
def test_another_run_is_refused(stopped, tmp_path, figure, change, key):
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    place = folder / "place"
    if callable(change):
        kept = shutil.copytree(place, tmp_path / "kept")
        change(place)  # in place: the config's words stay the same
        config = config_of(place, *words)
    else:
        words = [word for word in words if word.split("=")[0] != change.split("=")[0]]
        config = config_of(place, *words, change)
    run = start(config, tmp_path / "run")
    code = run.code
    if callable(change):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
    assert code == 2, run.text
    told = [line.removeprefix("kdx: error: ") for line in run.text.splitlines() if line.startswith("kdx: error: ")]
    assert f"was begun with another {key}" in told[0] or f", {key}" in told[0]
    assert re.fullmatch(r"  key +was +now", told[1])
    assert any(re.match(rf"  {re.escape(key)} +\S+ +\S+", line) for line in told[2:]), told
    figure(f"another {key}: refused")


@pytest.mark.parametrize(("schedule", "code"), [("constant", 0), ("cosine", 2)])
def test_a_longer_run(place, tmp_path, schedule, code):
    """Under a constant rate the first steps of a longer run are those of the shorter one."""
    words = (
        "train.micro_batch_size=4",
        f"optim.schedule={schedule}",
        "train.save_every=2",
        "train.keep_checkpoints=true",
        "train.log_every=3",  # the last step of the shorter run is none of those that the longer one tells of,
        "train.eval_every=5",  # but one where it measures
    )
    short, long = (config_of(place, *words, f"train.max_steps={steps}") for steps in (5, 8))
    straight(short, tmp_path / "run")
    again = start(long, tmp_path / "run")
    assert again.code == code, again.text
    if code == 0:
        assert outcome(tmp_path / "run") == straight(long, tmp_path / "straight")[0]
        assert start(short, tmp_path / "run").code == 2  # and not shorter again
    else:
        assert "was begun with another train.max_steps" in again.text


def damage_newest(run_dir):
    newest = checkpoint.found(run_dir)[0] / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(content)


def test_stopped_where_a_damaged_checkpoint_is_newer(place, tmp_path):
    """The stop is a stop, and the run is not done."""
    config = config_of(place, "train.max_steps=12", "train.micro_batch_size=4", "train.save_every=2")
    assert start(config, tmp_path / "run", signal_at(8)).code == 143
    damage_newest(tmp_path / "run")
    assert start(config, tmp_path / "run", signal_at(7)).code == 143
    assert status(tmp_path / "run")["state"] == "interrupted"
    again = start(config, tmp_path / "run")
    assert again.code == 0, again.text
    assert outcome(tmp_path / "run") == straight(config, tmp_path / "straight")[0]


def test_a_longer_run_that_fails_leaves_the_shorter_one_done(place, tmp_path):
    """Its data is another now: the run that is there stays done, under its own words, and with its summary."""
    shutil.copytree(place, tmp_path / "place")
    words = ("train.micro_batch_size=4", "optim.schedule=constant", "train.keep_checkpoints=true")
    short, long = (config_of(tmp_path / "place", *words, f"train.max_steps={steps}") for steps in (2, 4))
    straight(short, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("status.json", "config.yaml", "summary.json")}
    pairs = (tmp_path / "place/pairs.jsonl").read_bytes()
    other_data(tmp_path / "place")
    assert start(long, tmp_path / "run").code == 2
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
    (tmp_path / "place/pairs.jsonl").write_bytes(pairs)
    assert "is done already" in " ".join(finished(start(short, tmp_path / "run")).split())

    assert start(long, tmp_path / "run", signal_at(3)).code == 143
    (tmp_path / "run/status.json").unlink()  # the shorter run's summary makes the longer one not done
    again = start(long, tmp_path / "run")
    assert "step-00000003" in finished(again)
    assert json.loads((tmp_path / "run/summary.json").read_text())["run"]["steps"] == 4


def finished(run):
    assert run.code == 0, run.text
    return run.text


def test_a_full_disk_at_the_end_costs_no_student(place, tmp_path):
    config = config_of(place, "train.max_steps=3", "train.save_every=3", "train.micro_batch_size=4")
    run = start(config, tmp_path / "run", refuse_to_save)
    assert "A stop while the last measures are taken would lose the run" in " ".join(finished(run).split())
    assert outcome(tmp_path / "run") == straight(config, tmp_path / "straight")[0]


def refuse_to_save():
    def save(run_dir, *_, **__):
        raise checkpoint.not_saved(run_dir, "a checkpoint", OSError(28, "No space left on device"))

    checkpoint.save = save


def test_a_stop_while_the_results_are_written_is_one(place, tmp_path):
    """All is there; but in a sweep no other job begins."""
    config = config_of(place, "train.max_steps=2", "train.micro_batch_size=4")
    assert start(config, tmp_path / "run", signal_in_results).code == 143
    assert status(tmp_path / "run")["state"] == "done"
    assert outcome(tmp_path / "run") == straight(config, tmp_path / "straight")[0]


def signal_in_results():
    from kdx import distill

    known = distill.save_student

    def save(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        known(*given)

    distill.save_student = save


MEASURES = {  # which taking of measures is met, at which step, by what
    "SIGTERM on the way": (2, 4, signal.SIGTERM),
    "SIGTERM at the end": (3, 6, signal.SIGTERM),
    "SIGKILL at the end": (3, 6, signal.SIGKILL),
}


@pytest.fixture(scope="module")
def measured(place, tmp_path_factory):
    """A run that measures at step 4 and at its end, step 6, saves nothing on the way, and what it ends in."""
    words = ("train.max_steps=6", "train.eval_every=4", "train.micro_batch_size=4", "student.save_dtype=bf16")
    config = config_of(place, *words, "train.save_every=0", "train.log_every=4")
    return config, straight(config, tmp_path_factory.mktemp("measured") / "run")[0]


@pytest.mark.parametrize("kind", MEASURES)
def test_measures_may_be_cut_short(measured, tmp_path, figure, kind):
    """They can be taken again: the stop does not wait for them, and costs no step of the training before them."""
    call, step, number = MEASURES[kind]
    config, expected = measured
    run = start(config, tmp_path / "run", partial(signal_in_measures, call, number))
    assert run.code == (143 if number == signal.SIGTERM else -number), run.text
    assert checkpoint.is_at(tmp_path / "run", step)
    if number == signal.SIGTERM:
        assert f"stopped after step {step}; to go on: " in " ".join(run.text.split())
        assert status(tmp_path / "run")["state"] == "interrupted"
    again = start(config, tmp_path / "run")
    assert again.code == 0, again.text
    assert outcome(tmp_path / "run") == expected
    assert not (tmp_path / "run/checkpoints").exists()
    figure(f"{kind} of the measures: nothing trained anew, bitwise equal")


def signal_in_measures(call, number):
    """A signal to the run itself at the second batch of held-out rows, when they are measured for the nth time."""
    from kdx.evaluate import HeldOut

    known, calls = HeldOut.measure, 0

    def measure(self, model, precision, advance):
        nonlocal calls
        calls += 1
        batches = 0

        def advance_and_signal():
            nonlocal batches
            batches += 1
            assert batches == 1 or calls != call, "it did not end"
            if calls == call:
                os.kill(os.getpid(), number)
            advance()

        return known(self, model, precision, advance_and_signal)

    HeldOut.measure = measure


def other_versions():
    from kdx.run import identity as drift

    known = drift.versions
    drift.versions = lambda **more: known(**more) | {"torch": "0.0"}


def test_other_library_versions_are_marked(stopped, tmp_path):
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    again = start(config_of(folder / "place", *words), tmp_path / "run", partial(other_versions))
    assert again.code == 0, again.text
    assert "this run is no longer exact: torch" in " ".join(again.text.split())
    (mark,) = json.loads((tmp_path / "run" / "summary.json").read_text())["run"]["other_versions"]
    assert mark.endswith("up to step 5, then 0.0")


def marks_of(run_dir):
    return json.loads((run_dir / "summary.json").read_text())["run"]["other_versions"]


def test_a_store_that_comes_or_goes_is_marked(stopped, tmp_path):
    """What it keeps was computed in other batches: the last bits differ."""
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    store = f"teacher.store_dir={tmp_path / 'store'}"
    again = start(config_of(folder / "place", *words, "teacher.store=on", store), tmp_path / "run")
    assert again.code == 0, again.text
    assert marks_of(tmp_path / "run") == ["teacher.store off up to step 5, then on"]

    with_store = config_of(folder / "place", *words, "teacher.store=on", store)
    assert start(with_store, tmp_path / "other", signal_at(5)).code == 143
    shutil.rmtree(tmp_path / "store")
    again = start(with_store, tmp_path / "other")
    assert again.code == 0, again.text
    (mark,) = marks_of(tmp_path / "other")
    assert mark.startswith("the teacher's store lacks rows that this run kept")


def on_two_processes(place, run_dir):
    """As torchrun starts them → the text of rank 0."""
    words = words_of(place, "train.max_steps=6", "train.save_every=4", "train.keep_checkpoints=true")
    words += [f"hydra.run.dir={run_dir}"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [run_dir.with_name(f"rank-{rank}.log") for rank in "01"]
    ranks = [start_command(words, place, log, RANK=str(i), LOCAL_RANK=str(i), **shared) for i, log in enumerate(logs)]
    assert [rank.code for rank in ranks] == [0, 0], [rank.text for rank in ranks]
    return ranks[0].text


def test_two_processes_go_on_exactly_and_one_is_refused(place, tmp_path, figure):
    """Each process has dropout of its own; the checkpoint of step 4 in the folder of a run that never ended."""
    run_dir = tmp_path / "run"
    on_two_processes(place, run_dir)
    expected = outcome(run_dir)
    for name in ("status.json", "summary.json", "student/model.safetensors"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "checkpoints/step-00000006")
    alone = start(compose(words_of(place, "train.max_steps=6", "train.keep_checkpoints=true")), run_dir)
    assert alone.code == 2, alone.text
    assert re.search(r"processes +2 +1", alone.text)
    assert "step-00000004" in on_two_processes(place, run_dir)
    assert outcome(run_dir) == expected
    figure("two processes: resumed and bitwise equal, on one refused")


def checkpoint_of_another(run):
    state = next(run.glob("checkpoints/step-*")) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"of": "another"}))
    (state.parent / MANIFEST).unlink()
    seal(state.parent)


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (lambda run: (run / "config.yaml").unlink(), 2, "config.yaml: is missing: what the run was begun with"),
        (lambda run: (run / "untouched.json").write_text("{"), 3, "untouched.json: is missing or damaged"),
        (checkpoint_of_another, 2, "is a checkpoint of another run"),
    ],
    ids=["no config", "damaged untouched.json", "another's checkpoint"],
)
def test_a_record_that_is_gone_is_not_made_anew(stopped, tmp_path, change, code, told):
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    change(tmp_path / "run")
    again = start(config_of(folder / "place", *words), tmp_path / "run")
    assert again.code == code, again.text
    assert told in again.text


def test_samples_may_be_asked_for_later(stopped, tmp_path):
    folder, words = stopped
    shutil.copytree(folder / "run", tmp_path / "run")
    again = start(config_of(folder / "place", *words, "tracking.samples=true"), tmp_path / "run")
    assert again.code == 0, again.text
    (first, *_) = json.loads((tmp_path / "run/samples.json").read_text())
    assert (first["untouched"], first["teacher"]) == (None, None)
    assert first["student"] is not None


def test_best_weights_that_are_damaged_become_no_student(place, tmp_path):
    words = (EPOCHS, "train.save_every=100", *KINDS["keep=best, early stopping"])
    run_dir = tmp_path / "run"
    assert start(config_of(place, *words), run_dir, flip_best).code == 3
    assert "the best weights, of step" in run_dir.with_name("run.log").read_text()
    assert not (run_dir / "student").exists()


def flip_best():
    from kdx import distill

    known = distill.choose_weights

    def choose(run, state, folder, measure):
        file = folder.path / "checkpoints/best.safetensors"
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
        return known(run, state, folder, measure)

    distill.choose_weights = choose
