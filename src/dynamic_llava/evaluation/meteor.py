"""METEOR of an answer against its reference: aligned words, stems and, with WordNet, synonyms."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Meteor:
    """METEOR (Banerjee and Lavie 2005) as nltk computes it, with nltk's own parameters.

    The official code scores single references with ``word_tokenize`` and ``single_meteor_score``, in lower
    case. Here sentences end at ``.``, ``!`` or ``?`` before a space, where ``word_tokenize`` asks a model
    that has to be downloaded; inside a sentence the tokens are the same.

    Attributes
    ----------
    matching : str
        ``exact, stem, synonym``, or ``exact, stem`` where nltk's WordNet corpus is not installed: then scores
        are lower, and compare only with others of the same matching.

    Raises
    ------
    ImportError
        nltk is not installed.
    """

    def __init__(self) -> None:
        if find_spec("nltk") is None:
            raise ImportError("METEOR needs nltk: pip install 'dynamic-llava[eval]'")
        from nltk.corpus import wordnet
        from nltk.tokenize import NLTKWordTokenizer

        self._tokenizer = NLTKWordTokenizer()
        try:
            wordnet.ensure_loaded()
        except LookupError:
            self._wordnet: Any = _NoSynonyms()
            self.matching = "exact, stem"
        else:
            self._wordnet = wordnet
            self.matching = "exact, stem, synonym"

    def __call__(self, answer: str, reference: str) -> float:
        """Return the score of ``answer``, in [0, 1]; 0 if either text is empty."""
        from nltk.translate.meteor_score import single_meteor_score

        score = single_meteor_score(self.tokens(reference), self.tokens(answer), wordnet=self._wordnet)
        return float(score)

    def tokens(self, text: str) -> list[str]:
        """Part a text into words and punctuation marks, in lower case."""
        sentences = SENTENCE_END.split(text.strip().lower())
        return [token for sentence in sentences for token in self._tokenizer.tokenize(sentence)]


class _NoSynonyms:
    """Stands in for WordNet where its corpus is not installed."""

    def synsets(self, _word: str) -> list[Any]:
        return []
