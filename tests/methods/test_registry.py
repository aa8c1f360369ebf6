"""Methods by name: found in their folders, registered by a user, made with settings, saved and loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor

import dynamic_llava
from dynamic_llava import Sparsifier, SparsityConfig, methods
from dynamic_llava.chat import chat_prompt, encode
from dynamic_llava.methods import ImageMethod, OutputMethod, Outputs, Pictures, registry

FOLDER = Path(methods.__file__).parent
WITHOUT = [name for name in methods.names("image") if not methods.find("image", name).needs_predictor]


@dataclass(frozen=True)
class Loudest(ImageMethod):
    """A method of one's own, with a setting."""

    power: float = 2.0

    def score(self, pictures: Pictures) -> Tensor:
        """Rank by the norm."""
        return pictures.hidden_KIC.norm(self.power, dim=-1)


class Even(OutputMethod):
    """One for output tokens."""

    def keep(self, outputs: Outputs) -> Tensor:
        """Keep every other."""
        return outputs.ordinal_BN % 2 == 0


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OWN", {"image": {}, "output": {}})


@pytest.mark.parametrize("kind", ["image", "output"])
def test_a_method_is_a_short_file_named_after_it(kind: str) -> None:
    files = {path.stem: path for path in (FOLDER / kind).glob("[a-z]*.py")}
    assert set(methods.names(kind)) == files.keys()
    for name, path in files.items():
        assert len(path.read_text().splitlines()) <= 60, path
        assert methods.find(kind, name).__module__.endswith(f"{kind}.{name}")


def test_nobody_else_asks_for_the_name_of_a_method() -> None:
    """What is special about one stands in its file."""
    names = {*methods.names("image"), *methods.names("output")}
    for path in FOLDER.parent.rglob("*.py"):
        text = path.read_text()
        found = [name for name in names if f'== "{name}"' in text or f'!= "{name}"' in text]
        assert not found, (path, found)


@pytest.mark.usefixtures("own")
def test_the_page_on_adding_a_method_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(first.splitlines()) <= 16
    names: dict[str, Any] = {"__name__": __name__}
    exec(first + second, names)
    names["model"](**tiny_question(names["processor"]))
    (kept,) = names["model"].sparsifier.report.image_kept
    assert len(kept) == names["config"].image_keep_rate * names["model"].config.image_seq_length // 1


def tiny_question(processor: Any) -> Any:
    return encode(processor, [chat_prompt(processor, "What is this?", 1)], [Image.new("RGB", (64, 64))])


@pytest.mark.usefixtures("own")
def test_a_registered_method_works_like_the_others(tmp_path: Path) -> None:
    dynamic_llava.methods.register("loudest")(Loudest)
    dynamic_llava.methods.register("even")(Even)
    assert "loudest" in methods.names("image")
    assert "even" in methods.names("output")
    made = tiny.sparsifier(image_policy="loudest", text_policy="even", image_options={"power": 1.0})
    model = tiny.model()
    made.attach(model)
    model.generate(**tiny.row(4), max_new_tokens=8, do_sample=False)
    assert made.report.text_kept[0].tolist() == [True, False] * 3 + [True]
    kept = made.report.image_kept
    made.save_pretrained(tmp_path)
    made.detach()
    again = Sparsifier.from_pretrained(tmp_path)
    assert again.config == made.config
    again.attach(model)
    model(**tiny.row(4))
    assert torch.equal(again.report.image_kept[0], kept[0])


@pytest.mark.usefixtures("own")
def test_a_method_object_is_used_and_saved_by_its_name(tmp_path: Path) -> None:
    made = tiny.sparsifier(image_policy=Loudest(3.0), text_policy="uniform")
    model = tiny.model()
    made.attach(model)
    model(**tiny.row(4))
    with pytest.raises(ValueError, match="Loudest that has no name: register"):
        made.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    methods.register("loudest")(Loudest)
    made.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "sparsifier_config.json").read_text())
    assert (values["image_policy"], values["image_options"]) == ("loudest", {"power": 3.0})


@pytest.mark.usefixtures("own")
def test_names_are_taken_once_and_by_methods_only() -> None:
    with pytest.raises(ValueError, match=r"'fastv'.*already"):
        methods.register("fastv")(Loudest)
    methods.register("loudest")(Loudest)
    methods.register("loudest")(Loudest)  # a cell that is run again
    with pytest.raises(ValueError, match="already"):
        methods.register("loudest")(type("Other", (Loudest,), {"__module__": "elsewhere"}))
    with pytest.raises(TypeError, match="ImageMethod or OutputMethod"):
        methods.register("number")(int)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_policy": "magic"}, "image_policy is 'magic': choose one of divprune, fastv"),
        ({"text_policy": "fastv"}, "text_policy is 'fastv': choose one of h2o"),
        (
            {"text_policy": "streaming", "text_options": {"sink": 1}},
            "text_options has sink: the settings of 'streaming' are: sinks",
        ),
        ({"image_options": {"power": 1}}, "image_options has power: the settings of 'learned' are: none"),
        ({"image_policy": Even()}, "image_policy is a Even, which is no method for it"),
        ({"image_options": 3}, "image_options is 3"),
    ],
)
def test_unknown_names_and_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsifier(SparsityConfig(**changes), hidden_size=32)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WITHOUT)
def test_methods_without_a_predictor_neither_make_nor_save_one(name: str, tmp_path: Path) -> None:
    config = SparsityConfig(image_policy=name, text_policy="uniform", image_keep_rate=0.25)
    made = Sparsifier(config, hidden_size=32)
    assert not list(made.parameters())
    made.save_pretrained(tmp_path)
    assert load_file(tmp_path / "sparsifier.safetensors") == {}
    model = tiny.model()
    again = Sparsifier.from_pretrained(tmp_path).attach(model)
    model.generate(**tiny.row(4), max_new_tokens=4, do_sample=False)
    assert again.report is not None
    assert len(again.report.image_kept[0]) == 4


def test_old_files_with_predictors_that_nothing_uses_still_load(tmp_path: Path) -> None:
    made = tiny.sparsifier(text_policy="uniform")
    made.save_pretrained(tmp_path)
    state = load_file(tmp_path / "sparsifier.safetensors")
    unused = tiny.sparsifier().text_predictor.state_dict()
    extra = {f"text_predictor.{name}": tensor for name, tensor in unused.items()}
    save_file(state | extra, tmp_path / "sparsifier.safetensors")
    with pytest.warns(UserWarning, match="text_predictor.*are left out"):
        again = Sparsifier.from_pretrained(tmp_path)
    assert again.state_dict().keys() == state.keys()


def test_a_method_that_lacks_its_predictor_is_refused_by_the_next_call() -> None:
    model, made = tiny.model(), tiny.sparsifier(image_policy="uniform", text_policy="uniform")
    made.attach(model)
    made.config.image_policy = "learned"
    with pytest.raises(
        ValueError, match="image_policy is 'learned', but this sparsifier was made without it"
    ):
        model(**tiny.row(4))
    made.config.image_policy = "random"
    model(**tiny.row(4))
