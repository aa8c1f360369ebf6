"""What every contender is given: the same prompts, pictures and output tokens.

Legend: B batch, N prompt tokens, I image tokens, T output tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynamic_llava.bench.building import AS_TENSOR, Subject


@dataclass(frozen=True)
class Workload:
    """Prompts of one picture each, and the output tokens that are fed back after them.

    Parameters
    ----------
    prompt_BN
        Token ids: one token, the picture's placeholders, the other text tokens.
    pictures_BIC
        Pictures behind tower and projector.
    fed_BT
        Token ids; drawn, not the contenders' own, so that all do the same work.
    as_tensor
        Whether the model takes encoded pictures as one tensor, not one by one.
    """

    prompt_BN: Tensor
    pictures_BIC: Tensor
    fed_BT: Tensor
    as_tensor: bool = False

    @property
    def batch(self) -> int:
        """Rows B."""
        return self.prompt_BN.shape[0]

    @property
    def prompt(self) -> int:
        """Tokens N of a prompt, image tokens included."""
        return self.prompt_BN.shape[1]

    @property
    def image_tokens(self) -> int:
        """Tokens I of a picture."""
        return self.pictures_BIC.shape[1]

    @property
    def output(self) -> int:
        """Output tokens T."""
        return self.fed_BT.shape[1]

    def with_image_tokens(self, tokens: int) -> Workload:
        """Return the workload with pictures of their first ``tokens`` tokens."""
        ids_B1, after_BN = self.prompt_BN[:, :1], self.prompt_BN[:, 1 + self.image_tokens - tokens :]
        ids_BN = torch.cat([ids_B1, after_BN], dim=1)
        return replace(self, prompt_BN=ids_BN, pictures_BIC=self.pictures_BIC[:, :tokens])

    def part(self, batch: int, output: int) -> Workload:
        """Return the first rows and the first output tokens."""
        ids_BN, pictures_BIC = self.prompt_BN[:batch], self.pictures_BIC[:batch]
        return replace(self, prompt_BN=ids_BN, pictures_BIC=pictures_BIC, fed_BT=self.fed_BT[:batch, :output])

    def pictures(self) -> dict[str, Any]:
        """Return the pictures as the stock model takes encoded ones."""
        pooled: Any = self.pictures_BIC if self.as_tensor else list(self.pictures_BIC)
        encoded: Any = BaseModelOutputWithPooling(last_hidden_state=self.pictures_BIC, pooler_output=pooled)
        encoded.deepstack_features = []  # Qwen3-VL asks for them; a preset has none
        return {"mm_encoder_outputs": {"image": encoded}}

    def prompt_inputs(self) -> dict[str, Any]:
        """Return the arguments of a prefill."""
        return {"input_ids": self.prompt_BN, **self.pictures()}

    def all_inputs(self) -> dict[str, Any]:
        """Return the arguments of a step without a cache at the end of the answer."""
        return {"input_ids": torch.cat([self.prompt_BN, self.fed_BT], dim=1), **self.pictures()}


def draw(subject: Subject, batch: int, text_tokens: int, output: int, seed: int) -> Workload:
    """Draw a workload from a seed."""
    config = subject.model.config
    generator = torch.Generator().manual_seed(seed)
    hidden, high = config.text_config.hidden_size, config.text_config.vocab_size - 1
    ids = torch.randint(3, high, (batch, text_tokens + output), generator=generator)  # 0 to 2 are special
    ids += ids >= config.image_token_id  # the placeholder of a picture must not be drawn
    picture_BI = torch.full((batch, subject.image_tokens), config.image_token_id)
    prompt_BN = torch.cat([ids[:, :1], picture_BI, ids[:, 1:text_tokens]], dim=1)
    pictures_BIC = torch.randn(batch, subject.image_tokens, hidden, generator=generator) * hidden**-0.5
    device, dtype = subject.model.device, subject.model.dtype
    fed_BT, as_tensor = ids[:, text_tokens:].to(device), config.model_type in AS_TENSOR
    return Workload(prompt_BN.to(device), pictures_BIC.to(device, dtype), fed_BT, as_tensor)
