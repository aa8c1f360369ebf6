"""The pages on models: the table is that of the families, and the example of adding one runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.families.models import CASES

from dynamic_llava import families
from evidence import models as page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", page.MAKES)
def test_the_table_is_that_of_the_families(name: str) -> None:
    assert page.page(name) == (ROOT / name).read_text(encoding="utf-8"), "run python -m evidence.models"


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
