"""The pages on models: the table is that of the families, and the example of adding one runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from evidence.model_facts import FACTS
from tests import tiny
from tests.families.models import CASES

import dynamic_llava
from dynamic_llava import families
from dynamic_llava.training import bundled
from dynamic_llava.training.recipe import Recipe
from evidence import models as page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", page.names())
def test_pages_are_those_of_the_families(name: str) -> None:
    assert page.page(name) == (ROOT / name).read_text(encoding="utf-8"), "run python -m evidence.models"


def test_every_family_has_a_page_of_a_screen_and_every_page_a_family() -> None:
    folder = ROOT / "docs" / "models"
    assert {path.stem for path in folder.iterdir()} == set(families.known()) == set(FACTS)
    for path in folder.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path
        assert f"models/{path.name}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in CASES if name != "pixtral"])
def test_what_a_page_does_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model in the place of the published one."""
    text = (ROOT / "docs" / "models" / f"{name}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    case, asked = CASES[name], []

    def load(hub_id: str, **options: Any) -> Any:
        asked.append((hub_id, options))
        return (case.model(), None) if case.picture else case.model()

    monkeypatch.setattr(dynamic_llava, "load" if case.picture else "load_model", load)
    names: dict[str, Any] = {}
    exec(block, names)
    assert asked == [(FACTS[name].hub_id, {"dtype": "bfloat16", "device": "cuda"})]
    model, row = names["model"], case.row(5, 1 if case.picture else 0)
    model.generate(**row, max_new_tokens=3, do_sample=False)
    if case.picture:
        (kept,) = model.sparsifier.report.image_kept
        assert 0 < len(kept) < int((row["input_ids"] >= 90).sum())


def test_recipes_that_pages_name_train_what_they_say() -> None:
    for facts in FACTS.values():
        for name in facts.recipes:
            init = Recipe.read(bundled.bundled(name)).stage.init
            assert init is not None
            assert init.split("/")[0] == facts.hub_id.split("/")[0] or name.startswith("llava-1.5")
    named = {name for facts in FACTS.values() for name in facts.recipes}
    assert {name for name in bundled.names() if name.endswith("-predictors")} <= named


def test_every_family_is_in_the_matrix_and_short() -> None:
    assert {case.config["model_type"] for case in CASES.values()} == set(families.known())
    for model_type in families.known():
        path = Path(families.__file__).parent / f"{model_type}.py"
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path


def test_the_page_on_adding_a_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_OWN", {})
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    model = tiny.model()
    model.config.model_type = "my_model"
    tiny.sparsifier(image_policy="random").attach(model)
    model(**tiny.row(4, 2))
    assert len(model.sparsifier.report.image_kept[0]) == 8
    with pytest.raises(ValueError, match="already"):
        families.register("llava", families.Family())
