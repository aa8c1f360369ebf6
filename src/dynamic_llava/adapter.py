"""A sparsifier's own two files, like an adapter's: in a folder or on the hub, apart from the base model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynamic_llava import hub
from dynamic_llava.card import card
from dynamic_llava.config import LARGEST, SparsityConfig
from dynamic_llava.files import one_line, read_object, replacing, write_json
from dynamic_llava.hub import Access

CONFIG_FILE = "sparsifier_config.json"
WEIGHTS_FILE = "sparsifier.safetensors"
CARD_FILE = "README.md"


def check_merged(module: nn.Module, what: str) -> None:
    """Raise ``ValueError`` if peft holds weights in ``module``: under its names no file of ours loads."""
    if any(type(part).__module__.startswith("peft.") for part in module.modules()):
        raise ValueError(
            f"peft holds weights of {what}: call merge_and_unload() or unload() of the peft model before it "
            "is saved; the peft model's own save_pretrained() writes the adapters alone"
        )


@dataclass(frozen=True)
class Adapter:
    """What the two files hold.

    Attributes
    ----------
    base_model
        Name of the model that the predictors were trained for; empty where that is unknown.
    history
        What they were trained with, for the model card; empty where that is unknown.
    """

    config: SparsityConfig
    hidden_size: int
    base_model: str
    state: dict[str, Tensor]
    history: dict[str, Any] = field(default_factory=dict)

    def anywhere(self) -> Adapter:
        """Return the same without the name of a base model that means nothing on another machine."""
        name = self.base_model
        is_known = name == "nano" or (hub.is_id(name) and not Path(name).is_dir())
        return self if is_known else replace(self, base_model="")

    def save(self, folder: Path, with_card: bool = True) -> None:
        """Write both files, and a model card where the training is known and the folder has none."""
        state = {name: tensor.contiguous() for name, tensor in self.state.items()}
        with replacing(folder / WEIGHTS_FILE) as partial:
            save_file(state, partial, metadata={"format": "pt"})
        head = {"base_model_name_or_path": self.base_model, "hidden_size": self.hidden_size}
        training = {"training": self.history} if self.history else {}
        write_json(folder / CONFIG_FILE, head | self.config.to_dict() | training)
        if with_card and self.history and not (folder / CARD_FILE).exists():
            with replacing(folder / CARD_FILE) as partial:
                partial.write_text(card(self.base_model, self.config, self.history), encoding="utf-8")

    def push(self, repo_id: str, private: bool | None, token: str | None) -> str:
        """Upload what :meth:`save` writes to the hub; return the address of the commit.

        A base model in a folder of this machine goes without its name: elsewhere the path means nothing.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.anywhere().save(Path(folder))
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add sparsifier")
            )

    @classmethod
    def read(cls, source: str | Path, access: Access = hub.DEFAULT) -> Adapter:
        """Read both files from a folder or a hub id.

        Raises
        ------
        FileNotFoundError
            If there is no such folder, no such repository, or a file is missing.
        ValueError
            If a file is broken.
        """
        folder = _folder(source, access)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist: {folder} holds no sparsifier")
        values = read_object(folder / CONFIG_FILE)
        try:
            hidden_size = int(values.pop("hidden_size"))
            if not 1 <= hidden_size <= LARGEST:
                raise ValueError(f"hidden_size is {hidden_size}: it must be a whole number, 1 to {LARGEST}")
            base_model = str(values.pop("base_model_name_or_path", ""))
            history = dict(values.pop("training", {}))
            config = SparsityConfig.from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = one_line(str(error))
            raise ValueError(f"{folder / CONFIG_FILE} is no sparsifier config: {reason}") from error
        path = folder / WEIGHTS_FILE
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is broken: {error}") from error
        for name, tensor in state.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")
        return cls(config, hidden_size, base_model, state, history)

    def without(self, prefixes: Iterable[str]) -> Adapter:
        """Leave out tensors whose names begin so, with a warning: the config's methods need none of them."""
        starts = tuple(prefixes)
        unused = [name for name in self.state if name.startswith(starts)]
        if unused:
            warnings.warn(
                f"the sparsifier's file holds {unused[0]} and {len(unused) - 1} more tensors, which "
                f"image_policy {self.config.image_policy!r} and text_policy {self.config.text_policy!r} do "
                "not use: they are left out",
                stacklevel=3,
            )
        return replace(self, state={name: self.state[name] for name in self.state if name not in unused})

    def check(self, expected: dict[str, Tensor], source: str | Path) -> None:
        """Raise ``ValueError`` naming the first tensor that is missing, unexpected or of another shape."""
        place = Path(source) / WEIGHTS_FILE
        for name in sorted(expected.keys() ^ self.state.keys()):
            raise ValueError(f"{place}: tensor {name} is {'missing' if name in expected else 'unexpected'}")
        for name, tensor in expected.items():
            if self.state[name].shape != tensor.shape:
                shapes = f"{tuple(self.state[name].shape)}, expected {tuple(tensor.shape)}"
                raise ValueError(f"{place}: tensor {name} has shape {shapes}")


def _folder(source: str | Path, access: Access) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir() or not hub.is_id(source):
        return folder
    return hub.fetch(str(source), [CONFIG_FILE, WEIGHTS_FILE], "hub repository", access)
