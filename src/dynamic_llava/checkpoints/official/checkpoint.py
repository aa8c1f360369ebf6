"""An official checkpoint as a source of tensors under our names, checked before any is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LlavaForConditionalGeneration

from dynamic_llava.adapter import Adapter
from dynamic_llava.checkpoints.official import config as official
from dynamic_llava.checkpoints.official.projectors import fit_projector
from dynamic_llava.checkpoints.official.tower import find_tower, own_config
from dynamic_llava.checkpoints.weights import Weights
from dynamic_llava.sparsifier import Sparsifier

VOCABULARY_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


class OfficialCheckpoint:
    """Config and tensors of a checkpoint of the official code.

    Parameters
    ----------
    folder
        The checkpoint.
    vision_tower
        Where the tower lies, if not where the checkpoint says.
    image_token_id
        Id of the image placeholder in the checkpoint's tokenizer; None takes the first id that is free. The
        vocabulary grows by the rows that this needs.

    Attributes
    ----------
    raw
        The official ``config.json``.
    config
        Its translation.
    sparsifier, adapter
        Predictors with their weights, in one dtype and each tensor in its own; or None.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a tensor is missing, left over or misshapen, or the config asks for something unknown.
    """

    def __init__(
        self, folder: Path, vision_tower: str | Path | None = None, image_token_id: int | None = None
    ) -> None:
        self.folder = folder
        self.raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = Weights(folder)
        self.projector: str = self.raw.get("mm_projector_type", "linear")
        has_own_tower = any(name.startswith(official.TOWER) for name in self.weights)
        self.tower = find_tower(self.raw, folder, vision_tower, has_own_tower)
        vision = self.tower.config if self.tower else own_config(self.raw, folder)
        source = str(folder / "config.json")
        self.config = cast(Any, official.llava_config(self.raw, vision, source))
        self.rows: int = self.config.text_config.vocab_size
        self.config.image_token_id = self.rows if image_token_id is None else image_token_id
        self.config.text_config.vocab_size = max(self.rows, self.config.image_token_id + 1)
        self.sparsity = official.sparsity_config(self.raw, source)
        self.adapter: Adapter | None = None
        self._origins = self._find_origins()
        self.shapes = expected_shapes(self.config)
        self.sparsifier = self._read_sparsifier()
        self._check_names()

    @property
    def model_paths(self) -> list[str]:
        """Module paths of the model's tensors, in the order in which :meth:`tensors` yields them."""
        own = [path for path in self._origins if not path.startswith("sparsifier.")]
        return [*own, *(self.tower.names if self.tower else ())]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield module path and tensor of the model, without the sparsifier, file by file."""
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
            generation = GenerationConfig.from_pretrained(self.folder)
        if not generation.do_sample:  # Vicuna's has flags of sampling all the same, which cannot be saved
            generation.temperature = generation.top_p = 1.0
        if text.vocab_size > self.rows:
            generation.suppress_tokens = [self.config.image_token_id]
        return generation

    def _find_origins(self) -> dict[str, str]:
        """Official name of each module path; the copy of a tower that lies elsewhere stays out."""
        names = [name for name in self.weights if official.has_counterpart(name)]
        if self.tower:
            names = [name for name in names if not name.startswith(official.TOWER)]
        origins = {official.to_ours(name, self.projector): name for name in names}
        if self.sparsity is None:
            return origins
        # The official code makes no predictor for what its config switches off, and ignores its tensors.
        unused = tuple(f"sparsifier.{name}." for name in official.predictors_off(self.sparsity))
        return {path: name for path, name in origins.items() if not path.startswith(unused)}

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

    def _read_sparsifier(self) -> Sparsifier | None:
        if self.sparsity is None:
            name = next((name for name in self.weights if name.startswith(official.PREDICTORS)), None)
            if name is not None:
                raise ValueError(
                    f"{self.weights.files[name]}: tensor {name} belongs to a predictor, but config.json has "
                    "no sparse_config"
                )
            return None
        sparsifier = Sparsifier(self.sparsity, self.config.text_config.hidden_size)
        expected = {f"sparsifier.{name}": tensor for name, tensor in sparsifier.state_dict().items()}
        self.shapes |= {path: tensor.shape for path, tensor in expected.items()}
        off = official.predictors_off(self.sparsity)
        for path in expected:
            if path not in self._origins and path.split(".")[1] not in off:
                name = official.to_official(path, self.projector)
                raise ValueError(f"{self.folder}: tensor {name} is missing")
        found = {path: self._read(path) for path in expected if path in self._origins}
        dtype = next((tensor.dtype for tensor in found.values()), torch.float32)
        state = {
            path.removeprefix("sparsifier."): found.get(path, torch.zeros_like(tensor, dtype=dtype))
            for path, tensor in expected.items()
        }
        sparsifier.load_state_dict(state)
        self.adapter = Adapter(self.sparsity, sparsifier.hidden_size, "", state)
        return sparsifier.to(dtype)

    def _check_names(self) -> None:
        found = {*self._origins, *(self.tower.names if self.tower else ())}
        optional = {path for path in self.shapes if path.startswith("sparsifier.")}
        for path in sorted(self.shapes.keys() - found - optional):
            if path == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            raise ValueError(f"{self.folder}: tensor {official.to_official(path, self.projector)} is missing")
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
