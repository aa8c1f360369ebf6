"""How long a prefill and an output token take on this machine: dense, sparse, side by side.

A run takes one set of weights and some contenders: ways to hold the context. Each phase runs them in turn,
A B A B, so that noise of the machine hits all alike, on the same tokens.
"""

from dynamic_llava.bench.run import Progress, run
from dynamic_llava.bench.settings import PHASES, Settings, known_contenders

__all__ = ["PHASES", "Progress", "Settings", "known_contenders", "run"]
