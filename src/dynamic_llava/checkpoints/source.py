"""What the user named, resolved once: its folder, its kind, and each of its parts, read when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from transformers import CONFIG_MAPPING, ProcessorMixin

from dynamic_llava import families, hub
from dynamic_llava.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from dynamic_llava.checkpoints.configs import made_from
from dynamic_llava.checkpoints.generation import check_generation
from dynamic_llava.checkpoints.official.checkpoint import OfficialCheckpoint
from dynamic_llava.checkpoints.official.config import is_official
from dynamic_llava.checkpoints.official.tower import Tower
from dynamic_llava.checkpoints.processor import read_processor
from dynamic_llava.checkpoints.tokenizer import has_tokenizer
from dynamic_llava.checkpoints.weights import Weights
from dynamic_llava.files import first_line, read_object
from dynamic_llava.hub import Access
from dynamic_llava.photo import base_folder, trained_folder

SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt", WEIGHTS_FILE]
HUB_FILES = [*SMALL_FILES, "*.safetensors", "*.bin"]
Kind = Literal["stock", "official", "predictors"]


class Source:
    """A checkpoint, as the user named it. Nothing is read before it is asked for, nor twice.

    Parameters
    ----------
    name
        A folder, a hub id, or a name in `OWN`.
    vision_tower
        Where the tower of an official checkpoint lies, if not where its config says.
    access
        How the hub is reached. Its revision is that of ``name``; where that is a folder of predictors alone,
        that of the base model. The tower, and the base of predictors on the hub, come from their main branch.
    has_weights
        Whether the model's and the tower's weights are fetched; without them only configs and processor are
        there, and the predictors where they are files of their own.

    Attributes
    ----------
    folder
        Where it lies on this machine; what a hub id names is fetched.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint; its parts raise this if a file of theirs is missing.
    ValueError
        Raised by its parts, if a file of theirs is broken.
    """

    def __init__(
        self,
        name: str | Path,
        vision_tower: str | Path | None = None,
        access: Access = hub.DEFAULT,
        has_weights: bool = True,
    ) -> None:
        self.name = name
        self.vision_tower = vision_tower
        self.access = access
        self.has_weights = has_weights
        self.folder = resolve(name, access, HUB_FILES if has_weights else SMALL_FILES)

    @property
    def is_on_hub(self) -> bool:
        """Whether it was named by a hub id."""
        return self.name not in OWN and not Path(self.name).expanduser().is_dir()

    @property
    def title(self) -> str:
        """The name that finds it again: a hub id, one of `OWN`, or where its folder lies."""
        return str(self.name) if self.is_on_hub or self.name in OWN else str(self.folder.absolute())

    @cached_property
    def kind(self) -> Kind:
        """``stock`` (transformers', perhaps with predictors), ``official``, or ``predictors`` alone."""
        if not self._has("config.json") and self._has(CONFIG_FILE):
            return "predictors"
        return "official" if is_official(self.raw) else "stock"

    @cached_property
    def raw(self) -> dict[str, Any]:
        """``config.json`` as it stands there, of a kind of model that can be loaded."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {self.folder} is no checkpoint")
        try:
            raw = read_object(path)
            model_type = raw["model_type"]
        except KeyError as error:
            raise ValueError(f"{path} is no model config: it has no {error}") from error
        if not isinstance(model_type, str):
            raise ValueError(f"{path} is no model config: model_type is {model_type!r}, it must be a name")
        if model_type not in families.known() and not is_official(raw):
            raise ValueError(
                f"{self.folder} holds a {model_type} model: {', '.join(families.known())} (transformers), "
                "llava_llama, llava_mistral and dynamic_llava_llama (official) can be loaded; "
                f"{families.PAGE} says how to add one"
            )
        return raw

    @cached_property
    def config(self) -> Any:
        """Config of the stock model; that of an official checkpoint is translated."""
        if self.kind == "official":
            return self.official.config
        kind = CONFIG_MAPPING[self.raw["model_type"]]
        with made_from(self.folder / "config.json", kind.__name__.removesuffix("Config")):
            config: Any = kind.from_dict(self.raw)
        check_generation(self.folder, config.get_text_config())
        return config

    @cached_property
    def weights(self) -> Weights:
        """The tensors, by their names in the files."""
        named = self.raw.get("transformers_weights") if self.kind == "stock" else None
        return Weights(self.folder, named)

    @cached_property
    def official(self) -> OfficialCheckpoint:
        """What only an official checkpoint has."""
        weights = self.weights if self.has_weights else None
        return OfficialCheckpoint(self.folder, self.raw, weights, self.vision_tower, self.access)

    @cached_property
    def tower(self) -> Tower | None:
        """The vision tower, where it lies apart from the checkpoint."""
        return self.official.tower if self.kind == "official" else None

    @cached_property
    def processor(self) -> ProcessorMixin | None:
        """Tokenizer, handling of pictures and chat template; None without a tokenizer, or for text alone."""
        if self.kind == "predictors":
            return self.base.processor
        if not has_tokenizer(self.folder):
            return None
        if self.kind == "official":
            return self.official.processor
        return read_processor(self.folder, self.config) if families.family_of(self).kinds else None

    @cached_property
    def adapter(self) -> Adapter | None:
        """The predictors and their settings, where there are any."""
        if self.kind == "official":
            return self.official.adapter
        return Adapter.read(self.folder) if self._has(CONFIG_FILE) or self._has(WEIGHTS_FILE) else None

    @cached_property
    def base(self) -> Source:
        """The model that predictors alone were trained for."""
        base = cast(Adapter, self.adapter).base_model
        if not base:
            raise FileNotFoundError(
                f"{self.folder / 'config.json'} does not exist: {self.folder} is no checkpoint, and its "
                "sparsifier names no base model; load the model, then attach Sparsifier.from_pretrained(...)"
            )
        named = f"{self.folder / CONFIG_FILE} names {base} as base model"
        if Path(base).expanduser().resolve() == self.folder.resolve():
            raise ValueError(f"{named}, its own folder, which holds no model")
        access = self.access.elsewhere() if self.is_on_hub else self.access
        try:
            found = Source(base, self.vision_tower, access, self.has_weights)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{named}, which cannot be found ({first_line(error)}): write there where it lies "
                "now, or load it and attach Sparsifier.from_pretrained(...)"
            ) from error
        if found.kind == "predictors":
            raise ValueError(
                f"{named}, which holds predictors alone: write there the model that they go with"
            )
        return found

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()


def _nano() -> Path:
    return Path(str(resources.files("dynamic_llava") / "models" / "nano"))


OWN: dict[str | Path, Callable[[], Path]] = {
    "nano": _nano,
    "photo": trained_folder,
    "photo-base": base_folder,
}
"""Models that need no hub: what comes with this package, and what is built from installed packages."""


def resolve(name: str | Path, access: Access = hub.DEFAULT, files: Sequence[str] = HUB_FILES) -> Path:
    """Return the local folder of a checkpoint: itself, that of one of `OWN`, or a download of a hub id."""
    if name in OWN:
        return OWN[name]()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not hub.is_id(name):
        raise FileNotFoundError(f"{name}: no such checkpoint; give a folder, a hub id (owner/name), or nano")
    return hub.fetch(str(name), files, "hub model", access)
