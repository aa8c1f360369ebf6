"""What a decoder costs: floating-point operations and K/V bytes, dense and sparse.

Legend: N tokens, C hidden size, F feed-forward size, Q query width (heads x head size), G key width.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynamic_llava.costs.shape import DecoderShape

FLOP_UNITS = {"PFLOPs": 1e15, "TFLOPs": 1e12, "GFLOPs": 1e9, "MFLOPs": 1e6}


def prefill_flops(shape: DecoderShape, tokens: float, kept: float, layer: int) -> float:
    """FLOPs of a prefill of which ``kept`` tokens enter the layers >= ``layer``, without predictors."""
    dense = layer * shape.layer_flops(tokens, tokens)
    return dense + (shape.layers - layer) * shape.layer_flops(kept, kept)


def paper_flops(shape: DecoderShape, tokens: float, kept: float, layer: int) -> float:
    """FLOPs as the paper counts: ``32 N C^2 + 4 N^2 C`` a layer, as if the feed-forward size were 4 C.

    Over image tokens alone it gives the paper's prefill: 10.1 TFLOPs for LLaVA-1.5-7B, 2.49 where 115 of 576
    are kept. Over output tokens alone it gives its decoding, one pass over the finished answer: 2.745 TFLOPs
    for 159 tokens (in the paper 2.75), 1.52 where 83.6 are kept. This share is inferred: the paper prints
    means over answers as whole tokens, 84 of 159 (tables 3, 5 and 17).
    """

    def one_layer(tokens: float) -> float:
        return 32 * tokens * shape.hidden**2 + 4 * tokens**2 * shape.hidden

    return layer * one_layer(tokens) + (shape.layers - layer) * one_layer(kept)


@dataclass(frozen=True)
class Answering:
    """An answer of N tokens after a prompt, of which a share stays in the context of the layers >= l.

    Every output token is fed back once, and sees itself whether it stays or not. The kept ones lie evenly
    among them, so their number may be fractional. Predictors are not counted.

    Parameters
    ----------
    shape
        Sizes of the decoder.
    layer
        Layer l, the first one that drops tokens.
    prompt, prompt_kept
        Tokens of the prompt, image tokens included, and how many of them the layers >= l hold.
    output
        Output tokens.
    output_keep_rate
        Share of the output tokens that the layers >= l hold on to, in (0, 1].
    """

    shape: DecoderShape
    layer: int
    prompt: float
    prompt_kept: float
    output: int
    output_keep_rate: float

    @property
    def cached_flops(self) -> float:
        """FLOPs of all steps with a K/V cache: one query each, over the context so far."""
        shape, growth = self.shape, (self.output - 1) / 2  # mean number of earlier output tokens
        dense = shape.layer_flops(self.output, self.prompt + growth + 1)
        sparse = shape.layer_flops(self.output, self.prompt_kept + self.output_keep_rate * growth + 1)
        return self._over_layers(dense, sparse)

    @property
    def uncached_flops(self) -> float:
        """FLOPs of all steps without a cache: each computes prompt and output so far anew."""
        dense = self.shape.passes_flops(self.output, self.prompt + 1, 1)
        sparse = self.shape.passes_flops(self.output, self.prompt_kept + 1, self.output_keep_rate)
        return self._over_layers(dense, sparse)

    def kv_bytes(self, element_size: int) -> float:
        """Bytes of the K/V cache at the end, where one number takes ``element_size`` bytes."""
        held = self._over_layers(
            self.prompt + self.output, self.prompt_kept + self.output_keep_rate * self.output
        )
        return held * self.shape.kv_bytes_per_token(element_size)

    def kv_bytes_read(self, first: int, last: int, element_size: int) -> float:
        """Bytes of keys and values that decoding output tokens ``first`` to ``last`` reads, mean of a step.

        Each step reads the token itself, too.
        """
        before = (first + last) / 2  # output tokens, mean
        dense, sparse = self.prompt + before, self.prompt_kept + self.output_keep_rate * before
        return self._over_layers(dense + 1, sparse + 1) * self.shape.kv_bytes_per_token(element_size)

    def _over_layers(self, dense: float, sparse: float) -> float:
        return self.layer * dense + (self.shape.layers - self.layer) * sparse


def flop_unit(flops: float) -> str:
    """Return the largest of `FLOP_UNITS` of which there is at least one."""
    return next((unit for unit, size in FLOP_UNITS.items() if flops >= size), "MFLOPs")
