"""Whether Dynamic-LLaVA's own predictors decide: what knows no other method asks here."""

from __future__ import annotations

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods.image.learned import Learned as LearnedImage
from dynamic_llava.methods.output.learned import Learned as LearnedOutput
from dynamic_llava.methods.registry import image_method, output_method


def is_predicted(config: SparsityConfig) -> bool:
    """Return whether the learned methods decide on image tokens and on output tokens."""
    image = image_method(config.image_policy, config.image_options)
    output = output_method(config.text_policy, config.text_options)
    return isinstance(image, LearnedImage) and isinstance(output, LearnedOutput)
