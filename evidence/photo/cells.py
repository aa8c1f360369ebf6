"""Cells of photo's table: one task under one method at one budget, measured once and kept in a file.

Quality, time and bytes of a cell are those of one run.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from evidence.trainings.methods import share_of_picture
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from dynamic_llava.chat.asking import dense
from dynamic_llava.evaluation import daquar, flickr8k, long_answers
from dynamic_llava.evaluation.batches import Kept, answer, batches, encode_questions
from dynamic_llava.evaluation.descriptions import by_length, configured, mean_costs_of
from dynamic_llava.evaluation.long_answers import Timed
from dynamic_llava.evaluation.scorers import Scorers, examples
from dynamic_llava.evaluation.scoring import score
from dynamic_llava.evaluation.tasks import Question
from dynamic_llava.files import write_json
from dynamic_llava.methods.downsample import downsampled
from dynamic_llava.sparsifier import sparsifier_of

TASKS = ("flickr8k", "daquar", "long-answers")
IMAGE_METHODS = ("learned", "random", "uniform", "fastv", "downsample")
OUTPUT_METHODS = ("learned", "random", "uniform", "h2o", "streaming")
PAIRED = tuple(zip(IMAGE_METHODS, OUTPUT_METHODS, strict=True))
IMAGE_RATES, OUTPUT_RATES = (0.05, 0.1, 0.2, 0.5), (0.2, 0.5)
PARTS = ("image", "output", "both")

BATCH = 10
LONGEST = {"flickr8k": flickr8k.MAX_NEW_TOKENS, "daquar": daquar.MAX_NEW_TOKENS, "long-answers": 160}
"""Longest answers; five sentences of Flickr8k have 70 tokens."""
QUESTIONS = 3  # of a picture of DAQUAR
DENSE_TOKENS = 9  # that the dense model decodes beside each batch, for the clock


@dataclass(frozen=True)
class Cell:
    """A task, and what drops tokens in it; a rate of 1 drops none, whatever the method."""

    task: str
    image: str = ""
    image_rate: float = 1.0
    output: str = ""
    output_rate: float = 1.0

    @property
    def name(self) -> str:
        """What its file is called."""
        kinds = ((self.image, self.image_rate), (self.output, self.output_rate))
        parts = [f"{method}-{rate:g}" if rate < 1 else "all" for method, rate in kinds]
        return f"image-{parts[0]}-output-{parts[1]}"

    @property
    def is_sparse(self) -> bool:
        """Whether a sparsifier has something to do; smaller pictures need none."""
        return self.output_rate < 1 or (self.image_rate < 1 and self.image != "downsample")


def plan(tasks: Sequence[str], parts: Sequence[str]) -> list[Cell]:
    """Return the cells of some tasks, dense ones first.

    Parameters
    ----------
    parts
        ``image``: methods by image tokens, all output tokens kept; ``output``: methods by output tokens, all
        image tokens kept; ``both``: pairs of them. The last two are about long answers alone.
    """
    cells = [Cell(task) for task in tasks]
    if "image" in parts:
        cells += [Cell(*at) for at in product(tasks, IMAGE_METHODS, IMAGE_RATES)]
    if "long-answers" not in tasks:
        return cells
    if "output" in parts:
        cells += [Cell("long-answers", "", 1.0, *at) for at in product(OUTPUT_METHODS, OUTPUT_RATES)]
    if "both" in parts:
        cells += [
            Cell("long-answers", image, image_rate, output, output_rate)
            for (image, output), image_rate, output_rate in product(PAIRED, IMAGE_RATES, OUTPUT_RATES)
        ]
    return cells


def asked(task: str, photos: Path, pictures: int) -> list[Question]:
    """Return the questions about the first pictures of a fixed order, of the test split.

    Parameters
    ----------
    photos
        Folder with ``flickr8k/captions.jsonl`` and ``daquar/qa.jsonl``.
    pictures
        How many.
    """
    captions = photos / "flickr8k" / "captions.jsonl"
    reading: dict[str, Callable[[], list[Question]]] = {
        "flickr8k": lambda: flickr8k.questions(captions),
        "daquar": lambda: daquar.questions(photos / "daquar" / "qa.jsonl"),
        "long-answers": lambda: long_answers.questions(captions, None),
    }
    by_picture: dict[str, list[Question]] = {}
    for question in reading[task]():
        by_picture.setdefault(question.picture, []).append(question)
    names = sorted(by_picture)
    random.Random("pictures of the table").shuffle(names)
    found = [question for name in names[:pictures] for question in by_picture[name][:QUESTIONS]]
    return by_length(found) if task == "long-answers" else found


class Measuring:
    """Measures cells of one model, or finds them measured.

    Parameters
    ----------
    model, processor
        What `dynamic_llava.load` returns.
    questions
        By task.
    folder
        Of the files of this model's cells.
    seed
        Of random dropping.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        questions: dict[str, list[Question]],
        folder: Path,
        seed: int = 0,
    ) -> None:
        self.model, self.processor, self.questions, self.seed = model, processor, questions, seed
        self._folder = folder

    def path(self, cell: Cell) -> Path:
        """Return where a cell lies once it is measured; other questions or seeds have other files."""
        asked = self.questions[cell.task]
        return self._folder / f"{cell.task}-{len(asked)}-seed-{self.seed}" / f"{cell.name}.json"

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """Return a cell's ``numbers`` and ``examples``; scores are in percent, but for ``perplexity``."""
        path = self.path(cell)
        if not path.exists():
            write_json(path, {**asdict(cell), **self.measure(cell, self.questions[cell.task])})
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def measure(self, cell: Cell, asked: Sequence[Question]) -> dict[str, Any]:
        """Measure a cell anew on some of its questions."""
        kept, timed, beside = Kept(), TowerTimed(), TowerTimed()
        texts: list[str] = []
        perplexities: list[float] = []
        with working(self.model, self.processor, cell, self.seed) as adapted:
            for some in batches(asked, BATCH, f"{cell.task} {cell.name}"):
                if cell.task == "long-answers":
                    with dense(self.model):  # in turn with it, so that both meet the same load of the machine
                        beside(self.model, encode_questions(self.processor, some), DENSE_TOKENS)
                    loss_B, length_B = score(self.model, adapted, some, Kept())
                    perplexities += (loss_B / length_B).exp().tolist()
                texts += answer(self.model, adapted, some, kept, LONGEST[cell.task], timed)
            costs = mean_costs_of(self.model, kept.rows)
            of_picture = share_of_picture(self.processor, adapted)
        shares = kept.shares()
        shares["image_tokens_kept"] = round(of_picture * shares["image_tokens_kept"], 4)
        shares_of_one, numbers = JUDGES[cell.task](texts, asked)
        scores = {name: [100 * value for value in values] for name, values in shares_of_one.items()}
        if perplexities:
            scores["perplexity"] = perplexities
        found = {**shares, "kv_bytes": costs["kv_bytes"], **timed.numbers(), **numbers}
        if beside.clocks:
            found |= timed.against(beside)
        names, none = [question.picture for question in asked], [()] * len(texts)
        return {"numbers": found, "examples": examples(names, texts, none, scores)}

    def seconds(self, cell: Cell) -> float:
        """Return how long a cell takes on this machine, judged by one batch after another that warms up."""
        some = self.questions[cell.task][:BATCH]
        self.measure(cell, some)
        start = time.perf_counter()
        self.measure(cell, some)
        return (time.perf_counter() - start) * len(self.questions[cell.task]) / len(some)


@contextmanager
def working(
    model: PreTrainedModel, processor: ProcessorMixin, cell: Cell, seed: int
) -> Iterator[ProcessorMixin]:
    """Let ``model`` drop tokens as a cell says; yield the processor to ask with.

    Raises
    ------
    ValueError
        The model has no sparsifier.
    """
    if sparsifier_of(model) is None:
        raise ValueError("the model has no sparsifier, so nothing can be compared; give one with predictors")
    smaller = cell.image == "downsample" and cell.image_rate < 1
    changes: dict[str, Any] = {
        "sparsify_image": cell.image_rate < 1 and not smaller,
        "sparsify_text": cell.output_rate < 1,
        "image_policy": "uniform" if smaller or not cell.image else cell.image,
        "text_policy": cell.output or "uniform",
        "image_keep_rate": cell.image_rate,
        "text_keep_rate": cell.output_rate,
        "seed": seed,
    }
    with ExitStack() as stack:
        stack.enter_context(configured(model, changes) if cell.is_sparse else dense(model))
        if smaller:
            processor = stack.enter_context(downsampled(model, processor, cell.image_rate))
        yield processor


class TowerTimed(Timed):
    """Notes how much of each batch's prefill was the vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tower: list[float] = []

    def __call__(self, model: PreTrainedModel, inputs: BatchFeature, max_new_tokens: int) -> Tensor:
        """Return the new tokens, int64 [B, new tokens]."""
        with _tower_seconds(model) as seconds:
            tokens_BN = super().__call__(model, inputs, max_new_tokens)
        self.tower.append(sum(seconds))
        return tokens_BN

    def numbers(self) -> dict[str, float]:
        """Return what `Timed` does, and the tower's milliseconds."""
        return {**super().numbers(), "tower_ms": round(1e3 * median(self.tower[1:] or self.tower), 2)}

    def against(self, other: TowerTimed) -> dict[str, float]:
        """Return how many times faster this was than ``other``, medians over batches, the first left out."""
        first = 1 if len(self.clocks) > 1 else 0
        whole, decoder, tokens = [], [], []
        runs = zip(self.clocks, other.clocks, self.tower, other.tower, strict=True)
        for ours, theirs, own, its in list(runs)[first:]:
            whole.append(theirs.prefill / ours.prefill)
            decoder.append((theirs.prefill - its) / (ours.prefill - own))
            if ours.per_token and theirs.per_token:
                tokens.append(median(theirs.per_token) / median(ours.per_token))
        return {
            "prefill_times_faster": round(median(whole), 3),
            "decoder_prefill_times_faster": round(median(decoder), 3),
            "token_times_faster": round(median(tokens), 3) if tokens else 1.0,
        }


@contextmanager
def _tower_seconds(model: PreTrainedModel) -> Iterator[list[float]]:
    tower: Any = model.model.vision_tower
    started: list[float] = []
    seconds: list[float] = []
    handles = [
        tower.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        tower.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - started[-1])),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


Judged = tuple[dict[str, list[float]], dict[str, float]]
"""Scores of each answer by name, and numbers of all answers together."""


def _captions(texts: Sequence[str], asked: Sequence[Question]) -> Judged:
    scorers, references = Scorers(), [question.references for question in asked]
    return scorers(texts, references), scorers.bleu(texts, references)


def _short(texts: Sequence[str], asked: Sequence[Question]) -> Judged:
    return daquar.scores(texts, asked), {}


def _long(texts: Sequence[str], asked: Sequence[Question]) -> Judged:
    said = long_answers.said(texts, asked)["examples"]
    scores = {name: [example[name] for example in said] for name in ("cider", "repetition")}
    return scores, {"words": round(fmean(len(text.split()) for text in texts), 2)}


JUDGES: dict[str, Callable[[Sequence[str], Sequence[Question]], Judged]] = {
    "flickr8k": _captions,
    "daquar": _short,
    "long-answers": _long,
}
