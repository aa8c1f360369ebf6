"""The model under test, in the state that a golden file asks for.

Legend: B batch, T tokens with one placeholder, N tokens, I image tokens, K pictures.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamic_llava.checkpoints import load_model
from dynamic_llava.checkpoints.official.layout import to_ours
from dynamic_llava.checkpoints.official.projectors import STOCK
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.question import question_mask
from dynamic_llava.core.report import Report
from dynamic_llava.sparsifier import Sparsifier, sparsifier_of
from dynamic_llava.verification.files import GoldenFile

PLACEHOLDER = -200  # the official code's one token for a whole picture
IGNORED = -100  # label of a token without loss


class Subject:
    """A configuration's model with its sparsifier.

    Parameters
    ----------
    checkpoint
        Folder in the official format, as ``load_model`` takes it.
    attention
        ``"sdpa"`` or ``"eager"``.
    device, dtype
        As ``load_model`` takes them. What is compared is on the CPU.

    Raises
    ------
    ValueError
        If the checkpoint has no sparsifier.
    """

    def __init__(
        self, checkpoint: Path, attention: str, device: torch.device | str = "cpu", dtype: str | None = None
    ) -> None:
        model: Any = load_model(checkpoint, dtype, device)
        if sparsifier_of(model) is None:
            raise ValueError(f"{checkpoint} has no sparse_config: nothing to verify")
        self.model = model
        self.sparsifier: Sparsifier = model.sparsifier
        self.config = self.sparsifier.config
        self.sparsifier.detach()
        self.model.set_attn_implementation(attention)
        self.model.generation_config.eos_token_id = None  # golden runs never stop early
        self.image_tokens: int = model.config.image_seq_length
        self._end_with_the_official_vocabulary()

    def _end_with_the_official_vocabulary(self) -> None:
        """Take the row that loading added for the image token out of the logits."""
        head, config = self.model.get_output_embeddings(), self.model.config
        rows = min(config.image_token_id, config.text_config.vocab_size)
        head.weight = nn.Parameter(head.weight.detach()[:rows].clone())
        head.out_features = config.text_config.vocab_size = rows

    def our_name(self, official: str) -> str:
        """Return the name here of a parameter of the official code."""
        return to_ours(official, getattr(self.model.config, "mm_projector_type", STOCK))

    @property
    def report(self) -> Report:
        """What the last call kept."""
        if self.sparsifier.report is None:
            raise ValueError("no call was made yet")
        return self.sparsifier.report

    def settings(self, file: GoldenFile) -> SparsityConfig:
        """Return the checkpoint's settings, changed by a file's name: ``_keep0.2``, ``_instruct_off``."""
        config = dataclasses.replace(self.config)
        if rate := re.search(r"_keep(\d*\.?\d+)", file.name):
            config.image_keep_rate = float(rate[1])
        if "_instruct_off" in file.name:
            config.sparsify_prompt = False
        return config

    @contextmanager
    def attached(self, config: SparsityConfig) -> Iterator[Any]:
        """Attach the sparsifier with ``config`` for the length of the block; yield the model."""
        self.sparsifier.config = config
        self.model.eval()
        with self.sparsifier(self.model):
            yield self.model

    def inputs(self, file: GoldenFile, prefix: str = "") -> dict[str, Tensor]:
        """Return a file's prompt and pictures as transformers takes them: a token for each image token."""
        ids_BT = file[f"{prefix}input_ids"]
        token = self.model.config.image_token_id
        if (ids_BT == token).any():
            raise ValueError(f"{prefix}input_ids holds {token}, which is the model's image token")
        input_ids_BN = self.expand(ids_BT, ids_BT, token)
        return {
            "input_ids": input_ids_BN,
            "attention_mask": torch.ones_like(input_ids_BN),
            "pixel_values": file[f"{prefix}pixel_values"],
        }

    def placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs where the model computes."""
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def expand(self, values_BT: Tensor, ids_BT: Tensor, fill: int) -> Tensor:
        """Repeat ``fill`` for each image token where ``ids_BT`` has the placeholder: ``[B, N]``."""
        rows = []
        for values_T, ids_T in zip(values_BT, ids_BT, strict=True):
            places = (ids_T == PLACEHOLDER).nonzero()
            if len(places) != 1:
                raise ValueError(
                    f"a row of input_ids holds {len(places)} placeholders {PLACEHOLDER}, not one"
                )
            at = int(places[0])
            picture_I = values_T.new_full((self.image_tokens,), fill)
            rows.append(torch.cat([values_T[:at], picture_I, values_T[at + 1 :]]))
        return torch.stack(rows)

    def spans(self, input_ids_BN: Tensor, answer_start_B: Tensor, end_B: Tensor) -> Tensor:
        """Return the half-open spans ``[B, 5, 2]``: system, image, instruct, answer and last question."""
        length = input_ids_BN.shape[1]
        is_image_BN = input_ids_BN == self.model.config.image_token_id
        positions_KI = is_image_BN.flatten().nonzero().view(-1, self.image_tokens)
        prompt_BN = torch.arange(length) < answer_start_B[:, None]
        marker = self.config.prompt_marker
        # All but its last token.
        droppable_BN = question_mask(input_ids_BN, list(positions_KI), prompt_BN, marker)
        image_end_B = positions_KI[:, -1] % length + 1
        image_start_B = image_end_B - self.image_tokens
        question_B = (answer_start_B - 1 - droppable_BN.sum(-1)).maximum(image_end_B)
        bounds = [
            (torch.zeros_like(end_B), image_start_B),
            (image_start_B, image_end_B),
            (image_end_B, answer_start_B),
            (answer_start_B, end_B),
            (question_B, answer_start_B),
        ]
        return torch.stack([torch.stack(bound, dim=-1) for bound in bounds], dim=1)
