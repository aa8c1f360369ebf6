"""The one description of what a sparsifier does: where it sits, what it may drop, and how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

LARGEST, MOST_LAYERS = 2**16, 256  # of predictors and decoders; what is beyond is a mistake in a file


@dataclass
class SparsityConfig:
    """Settings of a :class:`~dynamic_llava.Sparsifier`; read anew at every call of an attached model.

    Parameters
    ----------
    layer
        Layer l, the first sparse layer. Layers 0 to l-1 stay dense (l >= 1).
    image_policy, text_policy
        The method that drops image tokens, and output tokens: the name of a file in ``methods/image`` and
        ``methods/output``, such as ``"learned"`` (the predictors of Dynamic-LLaVA), of a method that was
        registered, or a method object. ``dynamic-llava methods`` lists them.
    image_options, text_options
        Settings of those methods by name, where they are not the method's own defaults.
    image_keep_rate
        Share of image tokens kept, in (0, 1]: ``int(n * rate)``, at least one, of each picture.
    text_keep_rate
        Share of output tokens kept that training aims at and that policies without a predictor use, in (0,
        1].
    prompt_keep_rate
        The same for prompt tokens; only meaningful with ``sparsify_prompt``.
    sparsify_image, sparsify_text
        Whether image tokens (in the prefill) and output tokens (while decoding) are dropped at all.
    sparsify_prompt
        Whether tokens of the last question are dropped too, by ``text_policy`` (the learned one has a third
        predictor, made only where this is set at the start). Off: the paper measured that it hurts.
    prompt_marker
        Token ids that the last question starts with: what follows their last occurrence after the pictures
        may be dropped, or everything after the pictures where they do not occur. By default the "USER:" of
        Llama's tokenizer, as in the official code.
    d_model, nhead, dim_feedforward, num_layers
        Shape of the image predictor; ``d_model`` is also the width of the text predictor.
    min_answer_length, min_prompt_length
        LEN of the paper: in training, rows with fewer answer (question) tokens keep all and pay no penalty.
    ratio_weight
        Weight of the keep-rate penalties in the training loss.
    text_margins
        Quantiles 0 to 1, evenly spaced, of the learned policy's keep margin on unseen answers. With them,
        ``text_keep_rate`` is a dial: the margin above which that share lies decides. Without (official
        checkpoints), the greater logit does, whatever the rate.
    masked_softmax
        Whether training takes dropped keys out of the softmax (paper, eq. 6). False, for ablations: they only
        lose their values.
    dropped_key_bound
        How many times the strongest kept key a dropped one may weigh in the gradient to its own mask. 1e6 is
        about what the official eps allows; 1 trains far more steadily, see docs/decisions.md.
    softmax_eps
        Eps of the masked softmax in training. 0: dropped and future keys weigh exactly nothing. The official
        code has 1e-6, which lets a little of them through; the pass then takes a slower path.
    seed
        Seed of the random policy.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    layer: int = 2
    image_policy: str = "learned"
    text_policy: str = "learned"
    image_options: Mapping[str, Any] = field(default_factory=dict)
    text_options: Mapping[str, Any] = field(default_factory=dict)
    image_keep_rate: float = 0.2
    text_keep_rate: float = 0.5
    prompt_keep_rate: float = 0.7
    sparsify_image: bool = True
    sparsify_text: bool = True
    sparsify_prompt: bool = False
    prompt_marker: tuple[int, ...] = (11889, 29901)
    d_model: int = 512
    nhead: int = 8
    dim_feedforward: int = 2048
    num_layers: int = 2
    min_answer_length: int = 50
    min_prompt_length: int = 25
    ratio_weight: float = 100.0
    text_margins: tuple[float, ...] = ()
    masked_softmax: bool = True
    dropped_key_bound: float = 1e6
    softmax_eps: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_marker", "text_margins"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise ValueError(f"{name} is {given!r}: it must be a list of numbers")
            setattr(self, name, tuple(given))  # JSON has lists
        self.validate()

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first setting that is out of range."""
        for name in ("sparsify_image", "sparsify_text", "sparsify_prompt", "masked_softmax"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be True or False")
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 1:
            raise ValueError(
                f"layer is {self.layer!r}: the first sparse layer is a whole number >= 1, layer 0 stays dense"
            )
        for name in ("image_keep_rate", "text_keep_rate", "prompt_keep_rate"):
            rate = getattr(self, name)
            if not _is_number(rate) or not 0 < rate <= 1:
                raise ValueError(f"{name} is {rate}: a keep rate must be greater than 0 and at most 1")
        for name in ("image_policy", "text_policy"):
            policy = getattr(self, name)
            if policy == "" or policy is None or isinstance(policy, int | float | list | dict):
                raise ValueError(f"{name} is {policy!r}: give the name of a method")
        for name in ("image_options", "text_options"):
            options = getattr(self, name)
            if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
                raise ValueError(f"{name} is {options!r}: it must map the names of settings to their values")
        for name in ("d_model", "nhead", "dim_feedforward", "num_layers"):
            size, most = getattr(self, name), MOST_LAYERS if name == "num_layers" else LARGEST
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
                raise ValueError(f"{name} is {size!r}: it must be a whole number, 1 to {most}")
        if self.d_model % self.nhead:
            raise ValueError(
                f"d_model {self.d_model} cannot be split into {self.nhead} heads: choose a multiple of nhead"
            )
        if self.d_model % 4:
            raise ValueError(
                f"d_model is {self.d_model}: the predictors halve it twice, choose a multiple of 4"
            )
        margins = self.text_margins
        is_rising = all(map(_is_number, margins)) and list(margins) == sorted(margins)
        if len(margins) == 1 or not is_rising:
            raise ValueError(f"text_margins is {margins}: it must be empty, or two or more rising quantiles")
        for name in ("min_answer_length", "min_prompt_length", "ratio_weight", "softmax_eps"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ValueError(f"{name} is {value!r}: it must be a number and not negative")
        bound = self.dropped_key_bound
        if bound != math.inf and not (_is_number(bound) and bound > 0):
            raise ValueError(f"dropped_key_bound is {bound!r}: it must be a number greater than 0")
        for name, numbers in (("seed", (self.seed,)), ("prompt_marker", self.prompt_marker)):
            if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be of whole numbers")

    @property
    def text_threshold(self) -> float:
        """Keep margin above which an output token stays under the learned policy; 0 without quantiles."""
        if not self.text_margins:
            return 0.0
        place = (1 - self.text_keep_rate) * (len(self.text_margins) - 1)
        low = min(int(place), len(self.text_margins) - 2)
        below, above = self.text_margins[low : low + 2]
        return below + (place - low) * (above - below)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, ready for JSON; a method object is refused, for it has no name there."""
        for name in ("image_policy", "text_policy"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} is a {type(getattr(self, name)).__name__}: only a method's name can be written"
                )
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsityConfig:
        """Build a config from ``to_dict``'s result; an unknown name raises ``ValueError``."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown sparsity settings: {', '.join(unknown)}")
        return cls(**values)


def _is_number(value: Any) -> bool:
    """Tell whether a value is a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
