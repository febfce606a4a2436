"""The static checks find each thing that they forbid, and nothing in kdx."""

import pytest
from static_checks import faults_in, main


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(x)",
        "exec('a = 1')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "numpy.load(file, allow_pickle=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=safe)",
    ],
)
def test_each_is_found(source: str) -> None:
    assert [line for line, _ in faults_in(f"\n{source}\n")] == [2]


def test_what_is_allowed() -> None:
    source = "torch.load(f, weights_only=True)\nmodel.eval()\nload(p, trust_remote_code=config.trust_remote_code)\nrun(c, shell=False)"
    assert faults_in(source) == []


def test_kdx_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().out
