"""The evidence program: its recipes read, its tables say what the rows say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmarks.evidence import methods, tables, training, variants
from benchmarks.evidence.courses import course
from benchmarks.evidence.methods import METHODS, Budget
from benchmarks.evidence.rows import summary

import dynamic_llava
from dynamic_llava.evaluation import tasks
from dynamic_llava.training.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_changes_a_recipe_that_reads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = Recipe.read(variants.write_recipe(name, tmp_path / name))
    base = Recipe.read(variants.write_recipe("base", tmp_path / "base"))
    assert recipe.output == tmp_path / name
    assert (recipe.model_dump(exclude={"output"}) == base.model_dump(exclude={"output"})) == (name == "base")


def test_training_starts_with_the_dense_model_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []
    monkeypatch.setattr(training.subprocess, "run", lambda command, check: commands.append(command[4:]))
    for done in (
        "runs/nano-vision/model",
        "runs/nano-dense/checkpoint-100/complete",
        "runs/results/dial/model",
    ):
        (tmp_path / done).mkdir(parents=True)
    assert training.train(["base", "dial"]) == ["base", "dial"]
    places, mixed = (str(Path("recipes") / f"nano-{stage}.yaml") for stage in ("places", "mixed"))
    base = str(Path("runs") / "results" / "base.yaml")
    assert commands == [[str(Path("recipes") / "nano-dense.yaml"), "--resume"], [places], [mixed], [base]]
    commands.clear()
    training.train(["dial"])
    assert commands == []


def test_intervals_are_students() -> None:
    mean, reach = summary([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert reach == pytest.approx(4.303 / 3**0.5)


def rows(**values: float) -> list[dict[str, Any]]:
    return [
        {"method": method, "kind": "accuracy", "image_keep_rate": 0.2, "text_keep_rate": 1.0, "seed": seed}
        | {"value": value + seed}
        for method, value in values.items()
        for seed in (0, 1, 2)
    ]


def test_the_best_method_is_bold_and_a_missing_one_a_dash() -> None:
    table = tables._accuracies(rows(dense=95.0, learned=90.0, random=80.0, uniform=85.0))
    header, dense, row = table
    assert dense[1].startswith("96.0 ±")
    assert row[0] == "20%"
    found = dict(zip(header, row, strict=True))
    assert found["learned"].startswith("**91.0 ±")
    assert found["random"].startswith("81.0 ±")
    assert found["fastv + h2o"] == "–"


def test_a_course_is_read_from_the_log(tmp_path: Path) -> None:
    steps = [
        {"step": n, "grad_norm": float(n), "image_kept": n / 200, "text_kept": 0.5} for n in range(1, 101)
    ]
    lines = [*steps, {"step": 100, "eval_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert course(tmp_path / "log.jsonl") == {
        "steps": 100,
        "grad_norm": 50.5,
        "greatest_grad_norm": 100.0,
        "image_kept_early": pytest.approx(40.5 / 200),
        "image_kept": pytest.approx(75.5 / 200),
        "text_kept": 0.5,
    }


def test_the_dial_is_compared_with_the_training_for_each_rate() -> None:
    changes = {"base": {}, "image-10": {"sparsity": {"image_keep_rate": 0.1}}, "dial": variants.DIAL}
    measured = [
        row | {"method": name, "image_keep_rate": rate, "value": value}
        for name, rate, value in (
            ("base", 0.1, 70.0),
            ("base", 0.2, 90.0),
            ("image-10", 0.1, 85.0),
            ("dial", 0.1, 86.0),
        )
        for row in rows(any=0.0)
    ]
    apart, base, dial = (row[1:4] for row in tables._dial(measured, changes)[1:])
    assert apart == ["85.0 ± 0.0", "90.0 ± 0.0", "–"]
    assert base == ["70.0 ± 0.0", "90.0 ± 0.0", "–"]
    assert dial == ["86.0 ± 0.0", "–", "–"]


def test_a_method_keeps_its_budget_and_leaves_the_model_as_it_was() -> None:
    model, processor = dynamic_llava.load("nano")
    before = model.sparsifier.config.to_dict()
    asked = tasks.scene_descriptions(2)
    for name, method in METHODS.items():
        with methods.working(model, processor, method, Budget(0.5, 0.3), seed=0) as adapted:
            measured = methods.perplexity(model, adapted, asked)
        share = 72 / 144 if method.image != "downsample" else 1.0  # of fewer tokens, none is dropped
        assert measured["image_tokens_kept"] == share, name
        assert measured["output_tokens_kept"] == pytest.approx(0.3, abs=0.12), name
        assert model.sparsifier.config.to_dict() == before
