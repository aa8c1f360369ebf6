"""``train: predictors`` leaves an adapter: two small files and a card, which name their model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.training.conftest import WriteRecipe
from transformers import LlavaForConditionalGeneration

import dynamic_llava
from dynamic_llava import checkpoints
from dynamic_llava.training import nano, run
from dynamic_llava.training.recipe import Recipe

FILES = ["README.md", "sparsifier.safetensors", "sparsifier_config.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def recorded(folder: Path) -> str:
    config = json.loads((folder / "sparsifier_config.json").read_text())
    return str(config["base_model_name_or_path"])


@pytest.fixture
def trained(write_recipe: WriteRecipe) -> Path:
    return run.train(write_recipe("run", train="predictors", **{"run.license": "llama2"}))


def test_folder_holds_predictors_alone_and_finds_its_base(trained: Path, small_checkpoint: Path) -> None:
    assert names(trained) == FILES
    assert recorded(trained) == str(small_checkpoint)
    model, processor = dynamic_llava.load(trained)
    assert processor is not None
    assert model.name_or_path == str(small_checkpoint)
    assert len(model.sparsifier.config.text_margins) == 41
    state = load_file(trained / "sparsifier.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.sparsifier.state_dict().items())
    base = dynamic_llava.load_model(small_checkpoint).state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in model.state_dict().items() if name in base)


def test_name_is_kept_through_load_and_save(trained: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    model = dynamic_llava.load_model(trained)
    model.sparsifier.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == FILES
    assert recorded(tmp_path / "again") == str(small_checkpoint)
    assert (tmp_path / "again" / "README.md").read_text() == (trained / "README.md").read_text()


def test_card_tells_base_recipe_data_rates_metrics_and_licence(trained: Path, small_checkpoint: Path) -> None:
    card = (trained / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "llama2"
    assert "base_model" not in yaml.safe_load(front)  # a folder of this machine is none of the hub's
    for part in (str(small_checkpoint), "dynamic_llava.load(", "| image tokens | learned | 0.2 |", "llama2"):
        assert part in text
    assert "4 optimizer steps" in text
    assert "| image_kept | 0." in text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    assert Recipe(**yaml.safe_load(recipe)).method.train == "predictors"  # type: ignore[union-attr]


def test_card_of_conversations_names_the_data(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(4)]))
    nothing_drawn = {"scenes_per_step": None, "easy_vqa_per_step": None}
    recipe = write_recipe("run", train="predictors", data={"path": str(talk)}, **nothing_drawn)
    card = (run.train(recipe) / "README.md").read_text()
    assert "`data.conversations`: talk.json, 4 entries" in card
    assert str(tmp_path) not in card.partition("```yaml")[2]


class Hub:
    """Stands in for the hub: what was uploaded, and a place that ids are fetched from."""

    def __init__(self, places: dict[str, Path]) -> None:
        self.places = places
        self.asked: list[tuple[str, str | None]] = []

    def fetch(self, hub_id: str, **settings: Any) -> str:
        self.asked.append((hub_id, settings["revision"]))
        if hub_id not in self.places:
            raise OSError(f"no repository {hub_id}")
        return str(self.places[hub_id])

    def upload(self, *, repo_id: str, folder_path: str, **_: Any) -> str:
        self.places[repo_id] = Path(shutil.copytree(folder_path, self.places["uploads"] / repo_id))
        return repo_id


@pytest.fixture
def hub(tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub({"someone/base-7b": small_checkpoint, "uploads": tmp_path / "uploads"})
    monkeypatch.setattr("dynamic_llava.hub.snapshot_download", made.fetch)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", made.upload)
    return made


def test_from_a_hub_id_to_the_hub_and_back(write_recipe: WriteRecipe, hub: Hub, tmp_path: Path) -> None:
    folder = run.train(write_recipe("run", train="predictors", init="someone/base-7b"))
    assert recorded(folder) == "someone/base-7b"
    card = (folder / "README.md").read_text()
    assert "base_model: someone/base-7b\n" in card
    dynamic_llava.load_model(folder).sparsifier.push_to_hub("me/predictors")
    assert names(hub.places["me/predictors"]) == FILES
    assert recorded(hub.places["me/predictors"]) == "someone/base-7b"
    assert (hub.places["me/predictors"] / "README.md").read_text() == card
    hub.asked.clear()
    model = dynamic_llava.load_model("me/predictors", revision="v1")
    assert model.name_or_path == "someone/base-7b"
    assert hub.asked == [("me/predictors", "v1"), ("someone/base-7b", None)]


def test_name_outlives_a_copy_of_the_whole_model(write_recipe: WriteRecipe, hub: Hub, tmp_path: Path) -> None:
    model, processor = dynamic_llava.load(
        run.train(write_recipe("run", train="predictors", init="someone/base-7b"))
    )
    checkpoints.save(model, processor, tmp_path / "whole")
    assert "README.md" not in names(tmp_path / "whole")  # the card is that of the predictors alone
    dynamic_llava.load_model(tmp_path / "whole").sparsifier.push_to_hub("me/predictors")
    assert recorded(hub.places["me/predictors"]) == "someone/base-7b"


def test_predictors_of_a_model_that_was_trained_along_name_no_base(
    write_recipe: WriteRecipe, hub: Hub
) -> None:
    for train in ("full", "lora"):
        folder = run.train(write_recipe(train, train=train, init="someone/base-7b"))
        assert recorded(folder) == ""
        dynamic_llava.load_model(folder).sparsifier.push_to_hub(f"me/{train}")
        assert recorded(hub.places[f"me/{train}"]) == ""
        card = (hub.places[f"me/{train}"] / "README.md").read_text()
        assert "someone/base-7b" not in card.partition("## Training")[0]


def test_path_of_a_local_base_does_not_go_to_the_hub(trained: Path, hub: Hub) -> None:
    dynamic_llava.load_model(trained).sparsifier.push_to_hub("me/predictors")
    assert recorded(hub.places["me/predictors"]) == ""
    assert (
        "/"
        not in (hub.places["me/predictors"] / "README.md").read_text().partition("\n# ")[2].partition("\n")[0]
    )


def test_base_of_the_bundled_model_is_called_nano(tmp_path: Path) -> None:
    dynamic_llava.load_model("nano").sparsifier.save_pretrained(tmp_path)
    assert recorded(tmp_path) == "nano"
    assert dynamic_llava.load_model(tmp_path).name_or_path == "nano"


@pytest.mark.parametrize("gone", ["nowhere/at-all", "/nowhere/at/all", "nowhere"])
def test_base_that_is_gone_is_named_in_one_line(trained: Path, hub: Hub, gone: str) -> None:
    path = trained / "sparsifier_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": gone}))
    with pytest.raises(FileNotFoundError, match="as base model, which cannot be found") as caught:
        dynamic_llava.load(trained)
    assert str(path) in str(caught.value)
    assert gone in str(caught.value)
    assert "\n" not in str(caught.value)


def test_predictors_are_no_base_of_predictors(trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    path = other / "sparsifier_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(trained)}))
    with pytest.raises(ValueError, match="holds predictors alone"):
        dynamic_llava.load(other)


def test_training_goes_on_from_predictors_alone(
    write_recipe: WriteRecipe, trained: Path, small_checkpoint: Path
) -> None:
    again = run.train(write_recipe("again", train="predictors", init=str(trained)))
    assert recorded(again) == str(small_checkpoint)


def test_predictors_of_a_7b_are_small(write_recipe: WriteRecipe, hub: Hub, tmp_path: Path) -> None:
    """Of a model as wide as the 7B, otherwise small; in float32, twice what the recipes save."""
    processor = nano.build_processor(scene_count=50)
    config = nano.build_model(processor, seed=0).config
    config.text_config.update(
        {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16}
    )
    torch.manual_seed(0)
    checkpoints.save(LlavaForConditionalGeneration(config), processor, tmp_path / "wide")
    hub.places["someone/wide"] = tmp_path / "wide"
    sizes = {"d_model": 512, "nhead": 8, "dim_feedforward": 2048}
    changes = {"steps": 1, "save_every": 1, "scenes_per_step": 1, "sparsity": sizes}
    folder = run.train(write_recipe("run", train="predictors", init="someone/wide", **changes))
    assert 40e6 < sum(path.stat().st_size for path in folder.iterdir()) < 60e6
    model = dynamic_llava.load_model(folder)
    assert model.name_or_path == model.sparsifier.base_model == "someone/wide"


def test_finished_predictors_are_replaced_and_strangers_are_not(trained: Path, tmp_path: Path) -> None:
    sparsifier = dynamic_llava.load_model(trained).sparsifier
    checkpoints.save_predictors(sparsifier, trained)
    assert names(trained) == FILES
    (trained / "notes").mkdir()
    with pytest.raises(ValueError, match="no part of a checkpoint"):
        checkpoints.save_predictors(sparsifier, trained)


def test_name_of_a_hub_model_outlives_saving_whole(hub: Hub, tmp_path: Path) -> None:
    model, processor = dynamic_llava.load("nano")
    model.name_or_path = "someone/base-7b"  # as after load("someone/base-7b")
    checkpoints.save(model, processor, tmp_path / "whole")
    assert recorded(tmp_path / "whole") == "someone/base-7b"
    dynamic_llava.load_model(tmp_path / "whole").sparsifier.push_to_hub("me/predictors")
    assert recorded(hub.places["me/predictors"]) == "someone/base-7b"
