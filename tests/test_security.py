"""Files from elsewhere run no code: pickled weights, a model's own Python, templates that reach for Python."""

import json
import os
import pickle
from pathlib import Path

import pytest
from processes import in_process
from standins import write_pairs


class MakesAFolder:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


def edit(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def pickled(teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()
    (teacher / "pytorch_model.bin").write_bytes(pickle.dumps({"w": MakesAFolder()}))


def coded(teacher: Path) -> None:
    (teacher / "evil_model.py").write_text("import os\nos.mkdir('marker')\n")
    auto = {"AutoConfig": "evil_model.EvilConfig", "AutoModelForCausalLM": "evil_model.EvilModel"}
    edit(teacher / "config.json", model_type="evil", auto_map=auto)


def coded_tokenizer(teacher: Path) -> None:
    (teacher / "evil_tokens.py").write_text("import os\nos.mkdir('marker')\n")
    auto = {"AutoTokenizer": [None, "evil_tokens.EvilTokenizer"]}
    edit(teacher / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto)


ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.mark.parametrize(
    ("lay", "word"),
    [
        (pickled, "train.seed=0"),
        (coded, "train.seed=0"),
        (coded_tokenizer, "train.seed=0"),
        (lambda teacher: None, f'data.template.user="{ESCAPE}"'),
        (lambda teacher: None, f'data.chat_template="{ESCAPE}"'),
    ],
    ids=["pickled weights", "code of a model", "code of a tokenizer", "row template", "chat template"],
)
def test_nothing_is_run(beside_models, models, capfd, lay, word):
    (beside_models / "teacher").unlink()
    (beside_models / "teacher").mkdir()
    for file in (models / "teacher").iterdir():
        (beside_models / "teacher" / file.name).write_bytes(file.read_bytes())
    lay(beside_models / "teacher")
    write_pairs(Path("t.jsonl"))
    typed = ["teacher=./teacher", "student=./student", "data=pairs", "data.path=t.jsonl", "data.validation=2"]
    code, _, lines = in_process(capfd, *typed, "train.max_steps=1", "tracking.mode=disabled", word)
    assert (code, lines[-1].startswith("kdx: error: ")) == (2, True), lines
    assert not Path("marker").exists()
