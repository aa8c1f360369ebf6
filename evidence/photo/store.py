"""Fills the package ``dynamic-llava-photo``: what training changed in photo-base, and its model card.

    python -m evidence.photo.store runs/photo/dynamic/model packages/photo/dynamic_llava_photo --metrics FILE

Metrics are files that ``dynamic-llava evaluate --output`` wrote; the card has a table of them. Prints how
much of the decoder's change is kept (squared entries of its matrices), and the bytes written.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dynamic_llava import load_model
from dynamic_llava.adapter import CARD_FILE, CONFIG_FILE, Adapter
from dynamic_llava.chat.asking import dense
from dynamic_llava.evaluation.tables import SCORES
from dynamic_llava.files import read_object, replacing
from dynamic_llava.photo.change import CODES, change_of, decoded, write_change
from dynamic_llava.photo.trained import CHANGE

CARD = Path(__file__).with_name("card.md")
STEP = 1.0
NONE = "None was given when this package was filled."


@dataclass(frozen=True)
class Stored:
    """What was written: the share of the decoder's squared change that is kept, and all bytes."""

    kept: float
    size: int


def store(
    base: Any,
    trained: Any,
    source: Path,
    folder: Path,
    step: float,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> Stored:
    """Write change, predictors and card of a trained model to the folder of the package.

    Parameters
    ----------
    base, trained
        The models.
    source
        Folder of ``trained``; its predictors are stored in half precision, without the name of a folder.
    folder
        Of the package.
    step
        What the change of the decoder's matrices is rounded to, see `change_of`.
    metrics
        Results of ``dynamic-llava evaluate``.
    """
    before, after = weights(base), weights(trained)
    change = change_of(before, after, step)
    write_change(change, folder / CHANGE)
    adapter = Adapter.read(source) if (source / CONFIG_FILE).is_file() else None
    if adapter is not None:
        state = {name: tensor.half() for name, tensor in adapter.state.items()}
        replace(adapter.anywhere(), state=state).save(folder, with_card=False)
    kept = kept_share(before, after, change)
    with replacing(folder / CARD_FILE) as partial:
        partial.write_text(card(adapter, step, kept, metrics), encoding="utf-8")
    return Stored(kept, sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))


def kept_share(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], change: Mapping[str, Tensor]
) -> float:
    """Return the share of the squared change of the decoder's matrices that rounding keeps."""
    whole = lost = 0.0
    for name in before:
        if f"{name}.{CODES}" in change:
            moved = after[name] - before[name]
            whole += moved.square().sum().item()
            lost += (moved - decoded(change, name)).square().sum().item()
    return 1 - lost / whole if whole else 1.0


def weights(model: Any) -> dict[str, Tensor]:
    """Return a stock model's weights by module path."""
    with dense(model):
        return {name: weight.detach() for name, weight in model.named_parameters()}


def card(adapter: Adapter | None, step: float, kept: float, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the model card: `CARD` with what is known of this training in its places."""
    recipe = {} if adapter is None else adapter.history
    parts = {
        "step": f"{step:g}",
        "kept": f"{100 * kept:.1f}",
        "predictors": "no predictors: it answers dense" if adapter is None else "two predictors",
        "metrics": "\n".join(_metrics(metrics)) or NONE,
        "recipe": f"```yaml\n{recipe['recipe'].rstrip()}\n```" if "recipe" in recipe else NONE,
    }
    text = CARD.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def _metrics(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each score of each result."""
    if results:
        yield from ("| task | questions | image tokens kept | score | percent |", "|-|-|-|-|-|")
    for result in results:
        numbers = result["numbers"]
        for score, label in SCORES.items():
            if score in numbers:
                asked = f"{result['task']} | {result['questions']:,} | {numbers['image_tokens_kept']:.0%}"
                yield f"| {asked} | {label} | {numbers[score]:.1f} |"


def main() -> None:
    """Store a trained model's change."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=float, default=STEP, help=f"of the rounding; default: {STEP:g}")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[], help="results of evaluate")
    given = parser.parse_args()
    metrics = [read_object(path) for path in given.metrics]
    for path, result in zip(given.metrics, metrics, strict=True):
        if "numbers" not in result:
            parser.error(f"{path}: is no result of dynamic-llava evaluate; leave it out")
    base, trained = load_model("photo-base"), load_model(given.model)
    stored = store(base, trained, given.model, given.folder, given.step, metrics)
    print(f"kept {stored.kept:.1%} of the change, {stored.size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
