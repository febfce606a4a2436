"""What code here may not do, since it would run code that a file brings along: python tests/static_checks.py

No pickle (torch.load only with weights_only=True, numpy without allow_pickle), no eval or exec, no shell, no model
code from the hub unless a configuration asks for it.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec"}
BANNED_TRUE = {"shell", "trust_remote_code", "allow_pickle"}


def faults_in(source: str) -> list[tuple[int, str]]:
    """The line and reason of everything in a file that is not allowed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"imports {n}") for n in names if n.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                found.append((node.lineno, f"calls {name}"))
            given = {k.arg: k.value for k in node.keywords}
            for key in BANNED_TRUE & given.keys():
                if isinstance(given[key], ast.Constant) and given[key].value:  # type: ignore[attr-defined]
                    found.append((node.lineno, f"passes {key}=True"))
            safe = given.get("weights_only")
            if name.endswith("torch.load") and not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append((node.lineno, "calls torch.load without weights_only=True"))
    return found


def main() -> int:
    files = [file for folder in ("kdx", "benchmarks", "conf") for file in sorted((ROOT / folder).rglob("*.py"))]
    faults = [f"{file.relative_to(ROOT)}:{line}: {why}" for file in files for line, why in faults_in(file.read_text())]
    print("\n".join(faults) or f"{len(files)} files: no pickle, eval, exec, shell or foreign code")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
