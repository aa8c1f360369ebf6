"""Scores of sentences against several references: BLEU, ROUGE-L and CIDEr by pycocoevalcap, METEOR by nltk.

pycocoevalcap is the code that captioning papers report with. Its own tokenizer is a Java program; here nltk's
Penn Treebank tokenizer parts the words, and the same punctuation marks are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from dynamic_llava.evaluation.meteor import Meteor

PUNCTUATION = frozenset((
    "''", "'", "``", "`", '"', "(", ")", "{", "}", "[", "]", ".", "?", "!", ",", ":", "-", "--", "...", ";",
))  # fmt: skip
"""What pycocoevalcap leaves out of both texts."""


class Scorers:
    """BLEU-1 and -4, METEOR, ROUGE-L and CIDEr of answers.

    Raises
    ------
    ImportError
        nltk or pycocoevalcap is not installed.
    """

    def __init__(self) -> None:
        if find_spec("pycocoevalcap") is None:
            raise ImportError("CIDEr needs pycocoevalcap: pip install 'dynamic-llava[eval]'")
        self.meteor = Meteor()

    def __call__(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        """Score each answer against its references.

        Returns
        -------
        dict
            ``meteor`` (the best reference counts), ``rouge_l`` and ``cider`` of each answer.
        """
        from pycocoevalcap.rouge.rouge import Rouge

        return {
            "meteor": [
                max(self.meteor(answer, reference) for reference in its)
                for answer, its in zip(answers, references, strict=True)
            ],
            "rouge_l": [
                float(score) for score in Rouge().compute_score(*self._given(answers, references))[1]
            ],
            "cider": self.cider(answers, references),
        }

    def cider(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return CIDEr of each answer; words weigh by how rarely they occur in the references of all."""
        from pycocoevalcap.cider.cider import Cider

        return [float(score) for score in Cider().compute_score(*self._given(answers, references))[1]]

    def bleu(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Return BLEU-1 and BLEU-4 of all answers together, in percent."""
        from pycocoevalcap.bleu.bleu import Bleu

        scores, _ = Bleu(4).compute_score(*self._given(answers, references), verbose=0)
        return {"bleu_1": round(100 * scores[0], 3), "bleu_4": round(100 * scores[3], 3)}

    def _given(
        self, answers: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[Mapping[int, list[str]], Mapping[int, list[str]]]:
        """Return references and answers as pycocoevalcap takes them: words between single spaces."""
        return (
            {number: [self._words(text) for text in its] for number, its in enumerate(references)},
            {number: [self._words(answer)] for number, answer in enumerate(answers)},
        )

    def _words(self, text: str) -> str:
        return " ".join(token for token in self.meteor.tokens(text) if token not in PUNCTUATION)


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of each score, in percent."""
    return {name: round(100 * fmean(values), 3) for name, values in scores.items()}


def examples(
    names: Sequence[str],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    scores: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """Return one entry an answer: picture, answer, references and scores, for paired comparisons."""
    return [
        {"image": name, "answer": answer, "references": list(its)}
        | {score: round(values[number], 5) for score, values in scores.items()}
        for number, (name, answer, its) in enumerate(zip(names, answers, references, strict=True))
    ]
