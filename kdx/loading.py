"""What transformers and the hub raise while a model is loaded, as one clear line."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kdx.data.files import nearby
from kdx.errors import MachineError, ModelError, of_hub, out_of_memory


class loading:
    """Turn what transformers and the hub raise while loading into one clear line."""

    def __init__(self, path: str, what: str, key: str, mend: str | None = None) -> None:
        """mend: what to do where nothing is missing; by default, what is in the folder."""
        self.path, self.what, self.key, self.mend = path, what, key, mend

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, ModelError | MachineError):
            return
        if memory := out_of_memory(error):
            raise memory from error
        text = re.sub(r"\s+", " ", str(error)).strip()
        if isinstance(error, ImportError):
            raise MachineError(self.key, f"{self.path} needs a package: {text.rstrip('.')}", "Install it") from error
        if "attn_implementation" in text:
            key = self.key.split(".")[0] + ".attn_implementation"
            raise ModelError(key, f"{self.path} has no attention of that name", "Use auto, eager or sdpa") from error
        if "ignore_mismatched_sizes" in text:
            what = f"the weights in {self.path} have other shapes than its config.json says"
            raise ModelError(self.key, what, "Give the config that belongs to the weights") from error
        folder = Path(self.path)
        if type(error).__name__ == "UnpicklingError":  # of a module that is not imported here
            what = f"{self.path} has weights that hold more than tensors, which could run code"
            raise ModelError(
                self.key, what, "Do not load this checkpoint; ask for its weights as .safetensors"
            ) from None
        if isinstance(error, SafetensorError):
            what = f"the weights in {self.path} are damaged, or were cut short ({text.rstrip('.')})"
            raise ModelError(self.key, what, "Copy them again; from git: git lfs pull") from error
        if self.mend:
            what = f"the {self.what} of {self.path} fails: {type(error).__name__}: {text[:160].rstrip('.')}"
            raise ModelError(self.key, what, self.mend) from error
        if not folder.exists() and (self.path.count("/") != 1 or self.path.startswith((".", "/", "~"))):
            mend = nearby(folder)
            if "Did you" not in mend and re.fullmatch(r"\w[\w.-]*", self.path):
                mend += f". On the hub it is OWNER/{self.path}"
            raise ModelError(self.key, f"{self.path} does not exist", mend) from error
        if not folder.exists() and isinstance(error, OSError | ValueError):
            what = f"{self.path} is no folder here, and the hub could not give its {self.what}"
            mend = "Check the name and the network, log in for gated models (hf auth login), or give a local folder"
            raise of_hub(error, ModelError, self.key, what, mend) from error
        what = f"cannot load the {self.what} in {self.path}: {type(error).__name__}: {text[:240].rstrip('.')}"
        raise ModelError(self.key, what, nearby(folder)) from error
