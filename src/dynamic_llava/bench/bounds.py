"""What a contender must compute and read at least: the bounds of its speed-up.

A prefill is bound by floating-point operations, decoding with a cache by the bytes that each step reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamic_llava.bench.building import size_in_bytes
from dynamic_llava.bench.contenders import Contender
from dynamic_llava.bench.workload import Workload
from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs.decisions import image_decision_flops, output_decision_flops
from dynamic_llava.costs.flops import Answering, prefill_flops
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.methods.top_k import keep_count


@dataclass(frozen=True)
class Work:
    """The least work of one contender on a workload.

    Parameters
    ----------
    contender
        Who works.
    work
        What is fed.
    kept_share
        Share of the output tokens that stay, as measured.
    """

    contender: Contender
    work: Workload
    kept_share: float = 1.0

    def prefill_flops(self) -> float:
        """FLOPs of the prefill: layers, image predictor, and the head for the last token."""
        return self._pass_flops(self.work.prompt, self._prompt_kept)

    def uncached_flops(self) -> float:
        """FLOPs of the last step without a cache, which computes prompt and answer anew."""
        tokens, output = self.work.prompt + self.work.output, self.work.output
        flops = self._pass_flops(tokens, self._prompt_kept + self.kept_share * output)
        return flops + self.work.batch * output * output_decision_flops(self._config, self._shape.hidden)

    def decode_bytes(self, first: int, last: int) -> float:
        """Bytes that decoding output tokens ``first`` to ``last`` reads, mean of a step.

        The weights, and keys and values of the context with the token itself.
        """
        answering = Answering(
            self._shape,
            self._config.layer,
            self.work.prompt,
            self._prompt_kept,
            self.work.output,
            self.kept_share,
        )
        model = self.contender.model
        read = answering.kv_bytes_read(first, last, model.dtype.itemsize)
        return weight_bytes(model) + self._predictor_bytes + self.work.batch * read

    def _pass_flops(self, tokens: float, kept: float) -> float:
        text = self.contender.model.config.text_config
        flops = prefill_flops(self._shape, tokens, kept, self._config.layer)
        flops += 2 * self._shape.hidden * text.vocab_size
        flops += image_decision_flops(self._config, self._shape.hidden, self.work.image_tokens)
        return self.work.batch * flops

    @property
    def _config(self) -> SparsityConfig:
        """What it drops; stock transformers is a sparsifier that drops nothing."""
        if self.contender.sparsifier is None:
            return SparsityConfig(layer=1, sparsify_image=False, sparsify_text=False)
        return self.contender.sparsifier.config

    @property
    def _shape(self) -> DecoderShape:
        return self.contender.shape

    @property
    def _prompt_kept(self) -> int:
        tokens, config = self.work.image_tokens, self._config
        kept = keep_count(tokens, config.image_keep_rate) if config.sparsify_image else tokens
        return self.work.prompt - tokens + kept

    @property
    def _predictor_bytes(self) -> int:
        sparsifier = self.contender.sparsifier
        if sparsifier is None or sparsifier.text_predictor is None or not sparsifier.config.sparsify_text:
            return 0
        return size_in_bytes(sparsifier.text_predictor.parameters())


def weight_bytes(model: Any) -> int:
    """Return the bytes of the weights that each decoded token reads: layers, norm and head."""
    decoder = model.model.language_model
    return sum(size_in_bytes(part.parameters()) for part in (decoder.layers, decoder.norm, model.lm_head))
