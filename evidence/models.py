"""Write the pages on models from ``families/``: docs/models/, the table in docs/models.md, the README's list.

    python -m evidence.models

Each says what a family's own file says, its first line and the kinds of pictures it takes, and what
``evidence/model_facts.py`` adds. The text around the table stays.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from evidence.model_facts import FACTS, Facts

from dynamic_llava import families
from dynamic_llava.families.base import Family
from dynamic_llava.files import replacing

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- from python -m evidence.models -->", "<!-- end -->"
HEAD = "| `model_type` | family | takes |\n|-|-|-|\n"


def says(model_type: str) -> str:
    """Return the first line of a family's file."""
    path = Path(families.__file__).parent / f"{model_type}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].rstrip(".").replace("``", "`")


def takes(model_type: str) -> str:
    """Return what a family takes."""
    family: Family = families.family_of_type(model_type)
    return " and ".join(f"{kind.modality}s" for kind in family.kinds) or "text"


def row(model_type: str) -> str:
    """Return the row of one family."""
    return f"| [`{model_type}`](models/{model_type}.md) | {says(model_type)} | {takes(model_type)} |\n"


def table() -> str:
    """Return the table of all families."""
    return HEAD + "".join(row(model_type) for model_type in families.known())


def listed() -> str:
    """Return the names of all families, those that take pictures first."""
    kinds = {name: families.family_of_type(name).kinds for name in families.known()}
    parts = {
        "Pictures": [name for name in kinds if kinds[name]],
        "Text": [name for name in kinds if not kinds[name]],
    }
    return (
        "\n".join(f"{part}: {', '.join(f'`{name}`' for name in names)}.  " for part, names in parts.items())
        + "\n"
    )


def model_page(model_type: str) -> str:
    """Return the page of one family."""
    facts = FACTS[model_type]
    is_text = takes(model_type) == "text"
    parts = [MADE, f"# {facts.title}", _intro(model_type), "## Load and attach", _load(facts, is_text)]
    parts += ["## Train predictors", TRAIN_TEXT if is_text else _train(facts)]
    parts += ["## Serve", SERVE_TEXT if is_text else SERVE.format(engine=facts.engine)]
    if facts.limits:
        parts += ["## Known limits", "\n".join(f"- {limit}" for limit in facts.limits)]
    return "\n\n".join(parts) + "\n"


def _intro(model_type: str) -> str:
    facts = FACTS[model_type]
    needs = f" Its processor needs {facts.needs}." if facts.needs else ""
    return (
        f"`model_type: {model_type}`, takes {takes(model_type)}. {says(model_type)}.{needs}\n{facts.tested}"
    )


def _load(facts: Facts, is_text: bool) -> str:
    names, load = ("model", "load_model") if is_text else ("model, processor", "load")
    choice = "text_policy" if is_text else "image_policy"
    return LOAD.format(
        names=names, load=load, hub_id=facts.hub_id, layer=facts.layer, settings=METHODS[choice]
    )


def _train(facts: Facts) -> str:
    if not facts.recipes:
        change = "`stage.init` and `layer`" if facts.layer != 2 else "`stage.init`"
        return COPY.format(change=change)
    first, *others = facts.recipes
    also = "".join(f", `{name}`" for name in others).removeprefix(", ")
    return RECIPE.format(first=first, also=f"Also: {also}. " if others else "")


METHODS = {
    "image_policy": 'image_policy="fastv", image_keep_rate=0.2, sparsify_text=False',
    "text_policy": 'text_policy="h2o", text_keep_rate=0.5, sparsify_image=False',
}
LOAD = """```python
import dynamic_llava
from dynamic_llava import Sparsifier, SparsityConfig

name = "{hub_id}"
{names} = dynamic_llava.{load}(name, dtype="bfloat16", device="cuda")
config = SparsityConfig(layer={layer}, {settings})
Sparsifier(config, hidden_size=model.config.get_text_config().hidden_size).attach(model)
```

This method needs no training; `dynamic-llava methods` lists all. `model.sparsifier.detach()` gives the stock
model back."""
RECIPE = """```console
$ dynamic-llava train {first} --dry-run
$ dynamic-llava train {first}
```

{also}What a recipe needs, and the data: [Training](../training.md)."""
COPY = """No recipe names a checkpoint of it. Copy one of another model and change {change}:

```console
$ dynamic-llava recipes qwen3-vl-8b-predictors --copy recipes
```

The data, and what is trained: [Training](../training.md)."""
TRAIN_TEXT = """Recipes train models that take pictures. In your own code, `model(..., answer_mask=...)` and
`sparsifier.ratio_loss()` train the predictor of output tokens, see [Training](../training.md)."""
SERVE = """```console
$ dynamic-llava serve --model runs/predictors/model {engine}
```

See [Serving](../serving.md)."""
SERVE_TEXT = (
    "`dynamic-llava serve` is for models that take pictures; `generate()` of the attached model answers."
)
MADE = "<!-- written by python -m evidence.models -->"
MAKES: dict[str, Callable[[], str]] = {"docs/models.md": table, "README.md": listed}


def page(name: str) -> str:
    """Return a page as it should be now."""
    if name not in MAKES:
        return model_page(Path(name).stem)
    before, _, rest = (ROOT / name).read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{MAKES[name]()}{END}{rest.partition(END)[2]}"


def names() -> list[str]:
    """Return all pages that this writes."""
    return [*MAKES, *(f"docs/models/{model_type}.md" for model_type in FACTS)]


def main() -> None:
    """Write all pages."""
    (ROOT / "docs" / "models").mkdir(exist_ok=True)
    for name in names():
        written = page(name)
        with replacing(ROOT / name) as partial:
            partial.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
