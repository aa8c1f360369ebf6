"""The modes of a decoder's pass: cached, without cache, and masked at full length.

Each mode is one class with the same three methods: ``open`` gives the mask of the dense layers, ``select``
what enters the sparse layers, ``close`` ends the pass. ``select`` is the only place where tokens are dropped.
"""

from __future__ import annotations

from dynamic_llava.core.passes.base import Inputs, Pass, Tokens
from dynamic_llava.core.passes.cached import CachedPass
from dynamic_llava.core.passes.masked import MaskedPass
from dynamic_llava.core.passes.recompute import PromptState, RecomputePass

__all__ = ["CachedPass", "Inputs", "MaskedPass", "Pass", "PromptState", "RecomputePass", "Tokens"]
