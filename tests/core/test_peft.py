"""peft around an attached model: what it trains is what is used, or one line refuses it at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from torch import nn

from dynamic_llava import Sparsifier, checkpoints

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


def saved_names(model: Any, folder: Path) -> set[str]:
    model.save_pretrained(folder)
    return set(load_file(folder / "model.safetensors"))


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


@pytest.mark.parametrize(
    "part",
    [
        lambda model: model.model,
        lambda model: model.model.language_model.layers[1],
        lambda model: {"sparsifier": model.sparsifier, "model": model},
    ],
    ids=["base", "layer", "both"],
)
def test_a_part_of_an_attached_model_can_be_copied(part: Any) -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    copy.deepcopy(part(model))


@pytest.mark.parametrize("add", ["get_peft_model", "add_adapter"])
def test_a_checkpoint_with_adapters_in_it_is_refused(add: str, tmp_path: Path) -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    checkpoints.save(model, None, tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    peft.get_peft_model(model, lora()) if add == "get_peft_model" else model.add_adapter(lora())
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)") as caught:
        checkpoints.save(model, None, tmp_path / "model")
    assert "\n" not in str(caught.value)
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_attaching_and_detaching_around_peft_leaves_the_stock_file_alone(tmp_path: Path) -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    wrapped = peft.get_peft_model(model, lora(modules_to_save=PREDICTORS))
    trained(wrapped)
    step(wrapped)
    expected = logits(wrapped)
    sparsifier.detach()
    sparsifier.attach(wrapped.get_base_model())
    assert torch.equal(logits(wrapped), expected)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert saved_names(merged, tmp_path / "model") == saved_names(tiny.model(), tmp_path / "stock")
    sparsifier.detach()
    assert set(merged.state_dict()) == set(tiny.model().state_dict())


def test_a_predictor_made_later_stays_out_of_the_stock_file(tmp_path: Path) -> None:
    model, sparsifier = pair()
    sparsifier.attach(model)
    sparsifier.make_prompt_predictor(True)
    assert saved_names(model, tmp_path / "model") == saved_names(tiny.model(), tmp_path / "stock")


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_on_every_linear_layer_merges_and_loads(use_dora: bool, tmp_path: Path) -> None:
    """Those of the predictors are linear layers too."""
    model, sparsifier = pair()
    sparsifier.attach(model)
    wrapped = peft.get_peft_model(model, lora(target_modules="all-linear", use_dora=use_dora))
    wanted, got = trained(wrapped)
    assert all("vision_tower" in name for name in wanted - got)  # LLaVA leaves out the tower's last layer
    for predictor in PREDICTORS:
        assert any(predictor in name and "lora_B" in name for name in got)
    step(wrapped)
    expected = logits(wrapped)
    tokens = wrapped.generate(**ROW, max_new_tokens=8, do_sample=False)
    wrapped.save_pretrained(tmp_path)
    fresh, other = pair()
    other.attach(fresh)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path).eval()), expected)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**ROW, max_new_tokens=8, do_sample=False), tokens)
    assert set(sparsifier.state_dict()) == set(tiny.sparsifier().state_dict())


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
        (lambda model: model._replicate_for_data_parallel(), "DistributedDataParallel"),
        (lambda model: nn.Linear(2, 2), "no model of transformers"),
        (lambda model: "llava-hf/llava-1.5-7b-hf", "load the model first"),
    ],
    ids=["peft", "base", "parallel", "replica", "module", "name"],
)
def test_what_cannot_be_attached_to_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny.sparsifier().attach(make(tiny.model()))
    assert "\n" not in str(caught.value)
