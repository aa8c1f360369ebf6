"""The evidence program: its recipes read, its tables say what the rows say."""

from __future__ import annotations

import json
import shutil
from math import inf
from pathlib import Path
from typing import Any

import pytest
from evidence.trainings import cells, methods, tables, training, variants
from evidence.trainings.courses import course
from evidence.trainings.methods import METHODS, Budget
from evidence.trainings.rows import differ, summary
from evidence.trainings.run import merged

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
    assert recipe.run.output == tmp_path / name
    exclude = {"run": {"output"}}
    assert (recipe.model_dump(exclude=exclude) == base.model_dump(exclude=exclude)) == (name == "base")


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
    variants.write_recipe("dial", variants.WORK / "dial")
    training.train(["base", "dial"])
    places, mixed = (str(Path("recipes") / f"nano-{stage}.yaml") for stage in ("places", "mixed"))
    base = str(Path("runs") / "results" / "base.yaml")
    assert commands == [[str(Path("recipes") / "nano-dense.yaml"), "--resume"], [places], [mixed], [base]]
    commands.clear()
    training.train(["dial"])
    assert commands == []
    monkeypatch.setitem(variants.VARIANTS, "dial", variants.DIAL | {"drawn_share": 0.9})
    with pytest.raises(SystemExit, match=r"dial: trained with other settings, those of .*dial.yaml; move"):
        training.train(["dial"])


def test_intervals_are_students() -> None:
    mean, reach = summary([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert reach == pytest.approx(4.303 / 3**0.5)
    assert summary([1.0]) == (1.0, inf)


def test_differences_are_paired_by_seed() -> None:
    scenes = [80.0, 85.0, 90.0]
    assert differ([value + 1 for value in scenes], scenes) is True  # though each interval is wider than 1
    assert differ([81.0, 85.0, 89.0], scenes) is False


def test_a_part_of_the_variants_leaves_the_others_as_they_are() -> None:
    def measured(**values: float) -> dict[str, Any]:
        return {
            "rows": [
                {"method": f"{name}{end}", "value": values[name]}
                for name in values
                for end in ("", ", dense")
            ],
            "variants": {name: {} for name in values},
            "courses": {name: {"steps": value} for name, value in values.items()},
        }

    both = merged(measured(dial=1.0, lora=2.0), measured(lora=3.0, base=4.0))
    assert list(both["variants"]) == ["base", "dial", "lora"]
    assert both["courses"] == {"base": {"steps": 4.0}, "dial": {"steps": 1.0}, "lora": {"steps": 3.0}}
    assert {row["method"]: row["value"] for row in both["rows"]} == {
        "dial": 1.0, "dial, dense": 1.0, "lora": 3.0, "lora, dense": 3.0, "base": 4.0, "base, dense": 4.0,
    }  # fmt: skip


def test_a_cell_belongs_to_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "WORK", tmp_path)
    monkeypatch.setattr(cells.Measuring, "_measure", lambda *_: {"perplexity": next(found)})
    found = iter([1.5, 2.5])
    weights = tmp_path / "base" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    for content, value in ((b"one", 1.5), (b"other", 2.5), (b"one", 1.5)):
        weights.write_bytes(content)
        assert cells.Measuring("base").dense("perplexity", 0) == {"perplexity": value}


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


def test_what_may_be_chance_is_marked() -> None:
    measured = rows(dense=95.0, learned=90.0, random=80.0)
    level = [
        row | {"method": "uniform", "value": row["value"] - (5, 0, 1)[row["seed"]]} for row in rows(x=90.0)
    ]
    header, _, row = tables._accuracies(measured + level)
    found = dict(zip(header, row, strict=True))
    assert found["learned"].startswith("**91.0")
    assert found["uniform"].startswith("≈ 89.0")
    assert found["random"].startswith("81.0")


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
    apart, light, base, dial = (row[1:4] for row in tables._dial(measured, changes)[1:])
    assert light == ["–", "–", "–"]
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
        shares = (
            (1.0, 64 / 144) if method.image == "downsample" else (0.5, 1.0)
        )  # 8 x 8 patches are looked at
        assert (measured["image_tokens_kept"], methods.share_of_picture(processor, adapted)) == shares, name
        assert measured["output_tokens_kept"] == pytest.approx(0.3, abs=0.12), name
        assert model.sparsifier.config.to_dict() == before
