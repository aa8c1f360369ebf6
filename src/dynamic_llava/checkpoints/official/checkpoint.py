"""An official checkpoint as a source of tensors under our names, checked before any is used."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dynamic_llava.adapter import Adapter
from dynamic_llava.checkpoints.generation import check_generation
from dynamic_llava.checkpoints.official import layout
from dynamic_llava.checkpoints.official.config import llava_config, predictors_off, sparsity_config
from dynamic_llava.checkpoints.official.processor import (
    IMAGE_TOKEN,
    build_image_processor,
    build_processor,
    read_tokenizer,
)
from dynamic_llava.checkpoints.official.projectors import fit_projector
from dynamic_llava.checkpoints.official.tower import CONFIG_FILES, TOWER_FILES, Tower, find_tower, own_config
from dynamic_llava.checkpoints.tokenizer import has_tokenizer
from dynamic_llava.checkpoints.weights import Weights
from dynamic_llava.config import SparsityConfig
from dynamic_llava.hub import Access
from dynamic_llava.sparsifier import Sparsifier

VOCABULARY_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


class OfficialCheckpoint:
    """Config, processor and tensors of a checkpoint of the official code, each made when asked for, and once.

    Parameters
    ----------
    folder
        The checkpoint.
    raw
        Its ``config.json``.
    weights
        Its tensors by their official names; None where only its config and its processor are asked for.
    vision_tower
        Where the tower lies, if not where the checkpoint says.
    access
        How the hub is reached for a tower there.

    Raises
    ------
    FileNotFoundError
        Raised by its parts, if a file of theirs is missing.
    ValueError
        Raised by its parts, if a tensor is missing, left over or misshapen, or the config asks for something
        unknown.
    """

    def __init__(
        self,
        folder: Path,
        raw: dict[str, Any],
        weights: Weights | None,
        vision_tower: str | Path | None,
        access: Access,
    ) -> None:
        self.folder = folder
        self.raw = raw
        self._weights = weights
        self.vision_tower = vision_tower
        self.access = access
        self.projector: str = raw.get("mm_projector_type", "linear")

    @property
    def weights(self) -> Weights:
        """Its tensors by their official names."""
        if self._weights is None:
            raise ValueError(f"{self.folder}: the weights were not asked for")
        return self._weights

    @cached_property
    def tower(self) -> Tower | None:
        """The vision tower; None where the checkpoint's own copy counts, or, without weights, may count."""
        files = CONFIG_FILES if self._weights is None else TOWER_FILES
        has_own = self._weights is None or any(name.startswith(layout.TOWER) for name in self._weights)
        return find_tower(self.raw, self.folder, self.vision_tower, has_own, files, self.access)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, which knows ``<image>``; None where the checkpoint has none."""
        return read_tokenizer(self.folder, self.raw) if has_tokenizer(self.folder) else None

    @cached_property
    def image_processor(self) -> LlavaImageProcessorPil:
        """What is done to a picture before the tower sees it."""
        place = self.tower.folder if self.tower else self.folder
        return build_image_processor(self.raw, self._vision, place)

    @cached_property
    def processor(self) -> LlavaProcessor | None:
        """Tokenizer, handling of pictures and conversation; None where there is no tokenizer."""
        if self.tokenizer is None:
            return None
        return build_processor(self.folder, self.raw, self._vision, self.tokenizer, self.image_processor)

    @cached_property
    def config(self) -> Any:
        """The translated config; the vocabulary grows by the row that the image token needs."""
        config: Any = llava_config(self.raw, self._vision, str(self.folder / "config.json"))
        rows = config.text_config.vocab_size
        token: Any = rows if self.tokenizer is None else self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        config.image_token_id = token
        config.text_config.vocab_size = max(rows, token + 1)
        return config

    @property
    def rows(self) -> int:
        """Rows of the vocabulary in the files."""
        return int(self.raw["vocab_size"])

    @cached_property
    def sparsity(self) -> SparsityConfig | None:
        """The settings of the predictors; None where there are none."""
        return sparsity_config(self.raw, str(self.folder / "config.json"))

    @cached_property
    def adapter(self) -> Adapter | None:
        """The predictors with their settings, each tensor in its own type; None where there are none."""
        if self.sparsity is None:
            name = next((name for name in self.weights if name.startswith(layout.PREDICTORS)), None)
            if name is not None:
                raise ValueError(
                    f"{self.weights.files[name]}: tensor {name} belongs to a predictor, but config.json has "
                    "no sparse_config"
                )
            return None
        off = predictors_off(self.sparsity)
        for path in self._predictors:
            if path not in self._origins and path.split(".")[1] not in off:
                name = layout.to_official(path, self.projector)
                raise ValueError(f"{self.folder}: tensor {name} is missing")
        found = {path: self._read(path) for path in self._predictors if path in self._origins}
        dtype = next((tensor.dtype for tensor in found.values()), torch.float32)
        state = {
            path.removeprefix("sparsifier."): found.get(path, torch.zeros_like(tensor, dtype=dtype))
            for path, tensor in self._predictors.items()
        }
        return Adapter(self.sparsity, self.config.text_config.hidden_size, "", state)

    @cached_property
    def shapes(self) -> dict[str, Any]:
        """Shape of every tensor of the model and the predictors by module path."""
        return expected_shapes(self.config) | {path: t.shape for path, t in self._predictors.items()}

    @property
    def model_paths(self) -> list[str]:
        """Module paths of the model's tensors, in the order in which :meth:`tensors` yields them."""
        own = [path for path in self._origins if not path.startswith("sparsifier.")]
        return [*own, *(self.tower.names if self.tower else ())]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield module path and tensor of the model, without the sparsifier, file by file."""
        self._check_names()
        for path in self.model_paths:
            if self.tower and path in self.tower.names:
                yield path, self._checked(path, self.tower.read(path))
            else:
                yield path, self._read(path)

    def aside(self) -> dict[str, Tensor]:
        """Return the official tensors without a counterpart here, by their official names."""
        used = set(self._origins.values())
        return {name: self.weights.read(name) for name in self.weights if name not in used}

    def generation_config(self) -> GenerationConfig:
        """Return the checkpoint's own settings of generation, without the image token among the answers."""
        text = self.config.text_config
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = GenerationConfig(**{name: getattr(text, name) for name in names})
        if (self.folder / "generation_config.json").is_file():
            check_generation(self.folder, text)
            generation = GenerationConfig.from_pretrained(self.folder)
        if not generation.do_sample:  # Vicuna's has flags of sampling all the same, which cannot be saved
            generation.temperature = generation.top_p = 1.0
        if text.vocab_size > self.rows:
            generation.suppress_tokens = [self.config.image_token_id]
        return generation

    @cached_property
    def _vision(self) -> CLIPVisionConfig:
        return self.tower.config if self.tower else own_config(self.raw, self.folder, self.access)

    @cached_property
    def _origins(self) -> dict[str, str]:
        """Official name of each module path; the copy of a tower that lies elsewhere stays out."""
        names = [name for name in self.weights if layout.has_counterpart(name)]
        if self.tower:
            names = [name for name in names if not name.startswith(layout.TOWER)]
        origins = {layout.to_ours(name, self.projector): name for name in names}
        if self.sparsity is None:
            return origins
        # The official code makes no predictor for what its config switches off, and ignores its tensors.
        unused = tuple(f"sparsifier.{name}." for name in predictors_off(self.sparsity))
        return {path: name for path, name in origins.items() if not path.startswith(unused)}

    @cached_property
    def _predictors(self) -> dict[str, Tensor]:
        """Tensors that the settings ask for by module path, not those of the checkpoint."""
        if self.sparsity is None:
            return {}
        fresh = Sparsifier(self.sparsity, self.config.text_config.hidden_size).state_dict()
        return {f"sparsifier.{name}": tensor for name, tensor in fresh.items()}

    def _read(self, path: str) -> Tensor:
        tensor = self._checked(path, self.weights.read(self._origins[path]))
        return self._grown(tensor) if path in VOCABULARY_ROWS else tensor

    def _grown(self, rows_VC: Tensor) -> Tensor:
        """Add rows for the image token; as the mean of all they differ from padding and score low."""
        missing = self.config.text_config.vocab_size - self.rows
        if missing == 0:
            return rows_VC
        mean_1C = rows_VC.float().mean(0, keepdim=True).to(rows_VC.dtype)
        return torch.cat([rows_VC, mean_1C.expand(missing, -1)])

    def _checked(self, path: str, tensor: Tensor) -> Tensor:
        shape = tuple(self.shapes[path])
        expected = (self.rows, *shape[1:]) if path in VOCABULARY_ROWS else shape
        if tensor.shape != expected:
            raise ValueError(
                f"{self.file_of(path)}: tensor {self._origins.get(path, path)} has shape "
                f"{tuple(tensor.shape)}, expected {expected}"
            )
        return tensor

    def _check_names(self) -> None:
        """Account for every tensor, before one of the model's is read."""
        _ = self.adapter  # it says better what is wrong with predictors
        found = {*self._origins, *(self.tower.names if self.tower else ())}
        for path in sorted(self.shapes.keys() - found - self._predictors.keys()):
            if path == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            raise ValueError(f"{self.folder}: tensor {layout.to_official(path, self.projector)} is missing")
        for path in sorted(found - self.shapes.keys()):
            name = self._origins.get(path, path)
            file = self.weights.files.get(name, self.folder)
            raise ValueError(f"{file}: tensor {name} has no place in the model that config.json describes")

    def file_of(self, path: str) -> Path:
        """Return the file that a module path is read from."""
        origin = self._origins.get(path)
        if origin is not None:
            return self.weights.files[origin]
        return self.tower.file(path) if self.tower else self.folder


def expected_shapes(config: Any) -> dict[str, Any]:
    """Return the shape of every tensor of a model by module path, without allocating any."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        fit_projector(model)
        return {name: tensor.shape for name, tensor in model.state_dict().items()}
