"""peft around an attached model: what it trains is what is used, or one line refuses it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

from dynamic_llava import Sparsifier

peft = pytest.importorskip("peft")

ROW = tiny.row(9, 1, 3)
ANSWER = torch.zeros_like(ROW["input_ids"], dtype=torch.bool)
ANSWER[:, -6:] = True
PREDICTORS = ["image_predictor", "text_predictor"]


def pair() -> tuple[Any, Sparsifier]:
    return tiny.model(), tiny.sparsifier(min_answer_length=0)


def lora(**settings: Any) -> Any:
    values = {"r": 4, "init_lora_weights": False, "target_modules": r".*language_model.*(q|v)_proj"}
    return peft.LoraConfig(**values | settings)


def trained(model: Any) -> tuple[set[str], set[str]]:
    """Take one training step; return the names of what may be trained and of what got a gradient."""
    model.train()
    model(**ROW, labels=ROW["input_ids"], answer_mask=ANSWER).loss.backward()
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return wanted, {name for name, weight in model.named_parameters() if weight.grad is not None}


def step(model: Any) -> None:
    """Move everything that got a gradient."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.5 * weight.grad / (weight.grad.norm() + 1e-6)
    model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**ROW, answer_mask=ANSWER).logits


def test_lora_first_then_attached() -> None:
    model, sparsifier = pair()
    wrapped = peft.get_peft_model(model, lora())
    sparsifier.attach(wrapped.get_base_model())
    wanted, got = trained(wrapped)
    assert wanted == got
    assert any("lora_" in name for name in got)
    assert any("text_predictor" in name for name in got)
    step(wrapped)
    expected = logits(wrapped)
    tokens = wrapped.generate(**ROW, max_new_tokens=8, do_sample=False)
    merged = wrapped.merge_and_unload()
    assert merged.sparsifier is sparsifier
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**ROW, max_new_tokens=8, do_sample=False), tokens)


def test_attached_first_then_lora() -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    wrapped = peft.get_peft_model(model, lora())
    wanted, got = trained(wrapped)
    assert wanted == got
    assert all("lora_" in name for name in got)  # peft freezes everything else, the predictors too
    step(wrapped)
    expected = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


def test_predictors_as_modules_to_save_train_what_is_used(tmp_path: Path) -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    wrapped = peft.get_peft_model(model, lora(modules_to_save=PREDICTORS))
    wanted, got = trained(wrapped)
    assert wanted == got
    assert any("modules_to_save" in name and "text_predictor" in name for name in got)
    assert any("modules_to_save" in name and "image_predictor" in name for name in got)
    step(wrapped)
    expected = logits(wrapped)
    with pytest.raises(ValueError, match="peft holds weights of the predictors"):
        sparsifier.save_pretrained(tmp_path / "sparsifier")
    assert not (tmp_path / "sparsifier").exists()
    wrapped.save_pretrained(tmp_path / "lora")
    fresh, other = pair()
    other.attach(fresh)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(again), expected)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.sparsifier.save_pretrained(tmp_path / "sparsifier")
    assert set(Sparsifier.from_pretrained(tmp_path / "sparsifier").state_dict()) == set(
        tiny.sparsifier().state_dict()
    )


def test_lora_inside_the_predictors_is_used() -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    wrapped = peft.get_peft_model(
        model, lora(target_modules=r".*(language_model.*q_proj|text_predictor.output_mlp.(1|3|5|7))")
    )
    wanted, got = trained(wrapped)
    assert wanted == got
    assert any("text_predictor" in name and "lora_" in name for name in got)


def test_the_sparsifier_itself_is_no_module_to_save() -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    with pytest.raises(ValueError, match="image_predictor, text_predictor"):
        peft.get_peft_model(model, lora(modules_to_save=["sparsifier"]))


def test_saving_lora_leaves_the_sparsifier_out(tmp_path: Path) -> None:
    model, sparsifier = pair()
    wrapped = peft.get_peft_model(model, lora())
    sparsifier.attach(wrapped.get_base_model())
    wrapped.save_pretrained(tmp_path)
    saved = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert saved
    assert not [name for name in saved if "sparsifier" in name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: peft.get_peft_model(model, lora()), r"attach to model\.get_base_model\(\)"),
        (lambda model: model.model, "attach to the whole one"),
        (lambda model: nn.DataParallel(model), r"attach to model\.module"),
        (lambda model: nn.Linear(2, 2), "no model of transformers"),
        (lambda model: "llava-hf/llava-1.5-7b-hf", "load the model first"),
    ],
    ids=["peft", "base", "parallel", "module", "name"],
)
def test_what_cannot_be_attached_to_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny.sparsifier().attach(make(tiny.model()))
    assert "\n" not in str(caught.value)
