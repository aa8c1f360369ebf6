"""The model card of predictors: what they belong to, what made them, and how they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynamic_llava import hub
from dynamic_llava.config import SparsityConfig

HEAD = """\
library_name: dynamic-llava
pipeline_tag: image-text-to-text
tags:
- dynamic-llava
- token-pruning"""
LOADING = """\
```python
import dynamic_llava

model, processor = dynamic_llava.load("FOLDER_OR_HUB_ID")  # of this card; it finds the base model by its name
```"""
ATTACHING = """\
```python
from dynamic_llava import Sparsifier

Sparsifier.from_pretrained("FOLDER_OR_HUB_ID").attach(model)  # to the model that they were trained with
```"""


def card(base_model: str, config: SparsityConfig, history: Mapping[str, Any]) -> str:
    """Return the text of ``README.md``, with the hub's front matter.

    Parameters
    ----------
    base_model
        Name of the model that the predictors were trained for; empty where that is unknown.
    config
        Their settings.
    history
        What they were trained with: ``recipe`` (its text), ``data`` (name and number of entries by
        setting), ``steps``, ``metrics`` (numbers by name) and ``license``; any may be missing.
    """
    license_id = history.get("license")
    is_on_hub = hub.is_id(base_model) and not Path(base_model).is_dir() if base_model else False
    front = [HEAD]
    if is_on_hub:
        front.append(f"base_model: {base_model}\nbase_model_relation: adapter")
    if license_id:
        front.append(f"license: {license_id}")
    name = base_model or "a model that has no public name"
    unchanged = " and were not changed" if base_model else ""
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# Dynamic-LLaVA predictors for {name}",
        "Two small networks that decide which image tokens and which output tokens a vision-language model "
        f"keeps. They belong to **{name}**, whose weights are not in here{unchanged}.",
        "## How to load",
        LOADING if base_model else ATTACHING,
        "## Keep rates",
        *_rates(config),
        "## Training",
        *_training(history),
        "## Licence",
        _licence(license_id, name),
    ]
    return "\n\n".join(parts) + "\n"


def _rates(config: SparsityConfig) -> Iterator[str]:
    rows = [
        ("image tokens", config.sparsify_image, config.image_policy, config.image_keep_rate),
        ("output tokens", config.sparsify_text, config.text_policy, config.text_keep_rate),
    ]
    lines = [
        f"| {kind} | {policy if is_on else 'off'} | {rate if is_on else 1.0:g} |"
        for kind, is_on, policy, rate in rows
    ]
    yield "\n".join(["| kind | policy | keep rate |", "|-|-|-|", *lines])
    yield f"Layers below {config.layer} see every token. The rates are settings: `model.sparsifier.config`."


def _training(history: Mapping[str, Any]) -> Iterator[str]:
    for name, data in history.get("data", {}).items():
        yield f"`{name}`: {data['name']}, {data['entries']:,} entries."
    if "steps" in history:
        yield f"{history['steps']:,} optimizer steps."
    if history.get("metrics"):
        rows = [f"| {name} | {value:.4g} |" for name, value in history["metrics"].items()]
        yield "\n".join(["| metric | at the end |", "|-|-|", *rows])
    if "recipe" in history:
        yield "The recipe, for `dynamic-llava train`:"
        yield f"```yaml\n{history['recipe'].rstrip()}\n```"


def _licence(license_id: str | None, name: str) -> str:
    own = f"`{license_id}`, as the recipe says." if license_id else "The author has named none."
    return (
        f"{own} The predictors were made with {name} and the data above, whose terms hold for them as well."
    )
