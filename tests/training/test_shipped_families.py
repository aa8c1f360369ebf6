"""The shipped recipes for the predictors of other families do what their comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from evidence.tiny_processors import KINDS
from tests.families import trained
from tests.families.models import CASES
from tests.training import published
from tests.training.published import PUBLISHED
from tests.training.test_shipped import LETTERS, write

import dynamic_llava
from dynamic_llava import families
from dynamic_llava.files import first_line
from dynamic_llava.training import bundled, run
from dynamic_llava.training.recipe import Recipe

ANSWER = ("the teal star is in the middle right of the picture " * 40)[:LETTERS]
SAME = ("data", "optimizer", "method")  # as in the recipe for LLaVA-1.5-7B, but for what is named below


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_those_of_llava(name: str) -> None:
    recipe, base = (
        Recipe.read(bundled.bundled(f"{model}-predictors")).model_dump() for model in (name, "llava-1.5-7b")
    )
    assert recipe["stage"] == base["stage"] | {"init": PUBLISHED[name].hub_id}
    sparsity = recipe["method"]["sparsity"]
    assert sparsity | {"layer": 2} == base["method"]["sparsity"]
    kind = KINDS[PUBLISHED[name].kind]
    tower = PUBLISHED[name].config["vision_config"]
    deepstack = len(tower.get("deepstack_visual_indexes", ()))
    assert sparsity["layer"] == max(2, deepstack)
    assert kind.model_type in families.known()
    assert kind.model_type in CASES
    recipe["method"]["sparsity"] = base["method"]["sparsity"]
    recipe["data"]["conversations"]["max_length"] = base["data"]["conversations"]["max_length"]
    assert all(recipe[section] == base[section] for section in SAME)
    names = {"output": Path(f"runs/{name}-predictors"), "license": recipe["run"]["license"]}
    assert recipe["run"] == base["run"] | names


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_the_comment(name: str, tmp_path: Path) -> None:
    text = bundled.bundled(f"{name}-predictors").read_text()
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    gpu, tokens, memory, hours, checkpoints, folder = (
        float(re.search(pattern, comment)[1])  # type: ignore[index]
        for pattern in (
            r"one GPU of (\d+) GB",
            r"conversations of (\d+) tokens",
            r"(\d+) GB of GPU memory",
            r"(\d+) hours",
            r"([\d.]+) GB for checkpoints",
            r"a folder of (\d+) MB",
        )
    )
    try:
        init = published.write(name, tmp_path / "base")
    except ImportError as error:
        pytest.skip(first_line(str(error).strip()))
    plan = run.dry_run(write(tmp_path / "run", f"{name}-predictors", init, ANSWER))
    assert plan.tokens_per_sample == tokens
    total = plan.memory_bytes["total"]
    assert round(total / 1e9) == memory
    assert total < 0.75 * gpu * 1e9  # the rest is for what no formula counts
    assert round(plan.decoder_flops / 100e12 / 3600) == hours
    assert plan.disk_bytes["checkpoints"] / 1e9 == pytest.approx(checkpoints, rel=0.25)
    assert round(plan.disk_bytes["model"] / 1e6) == folder
    assert list(plan.parameters) == ["predictors"]


@pytest.mark.parametrize("name", {one.kind: name for name, one in PUBLISHED.items()}.values())
def test_it_runs_on_a_small_model(name: str, tmp_path: Path) -> None:
    init = trained.checkpoint(PUBLISHED[name].kind, tmp_path / "base")
    path = write(
        tmp_path / "run", f"{name}-predictors", init, "red " * 60, steps=2, log_every=1, save_every=1
    )
    folder = run.train(path)
    model, processor = dynamic_llava.load(folder)
    assert processor is not None
    config = model.sparsifier.config
    assert (config.image_keep_rate, config.text_keep_rate) == (0.2, 0.5)
    assert len(config.text_margins) == 41  # rates are settings
    assert model.sparsifier.history["license"] == Recipe.read(path).run.license
