"""Every family in every mode, against a reference: the stock model with dropped columns closed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import reference
from tests.families.models import CASES, HIDDEN, IMAGE, LAYERS, VIDEO, WITH_PICTURES, Case
from torch import Tensor

from dynamic_llava import Sparsifier, SparsityConfig

STEPS, SPLIT, RATE = 8, 2, 0.5
SIZES = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "min_answer_length": 1}
every = pytest.mark.parametrize("name", CASES)
with_pictures = pytest.mark.parametrize("name", WITH_PICTURES)


def sparsifier(**settings: Any) -> Sparsifier:
    """Return one whose decisions on output tokens are mixed."""
    torch.manual_seed(1)
    values = {"layer": SPLIT, "image_keep_rate": RATE, **SIZES} | settings
    made = Sparsifier(SparsityConfig(**values), HIDDEN).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return made


def by_chance(**settings: Any) -> Sparsifier:
    return sparsifier(image_policy="random", text_policy="random", **settings)


def rows_of(case: Case) -> list[dict[str, Tensor]]:
    if case.picture is None:
        return [case.row(3, 0, 0), case.row(9, 0, 1)]
    return [case.row(3, 1, 0), case.row(9, 2, 1), case.row(5, 0, 2)]


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """Return sequences and logits ``[B, T, V]``."""
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def kept(inputs: dict[str, Tensor], report: Any, row: int, length: int) -> Tensor:
    """Return which tokens of a row without padding the sparse layers may see later, bool ``[N]``."""
    ids = inputs["input_ids"][0]
    keep_N = torch.ones(length, dtype=torch.bool)
    places = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
    keep_N[places] = False
    keep_N[places[report.image_kept[row]]] = True
    keep_N[len(ids) :] = report.text_kept[row]
    return keep_N


def worst(case: Case, stock: Any, model: Any, rows: list[dict[str, Tensor]], **settings: Any) -> float:
    """Return how far sparse answers to a batch are from the reference of each row alone."""
    sequences, found = generate(model, case.batch(rows), **settings)
    decoder, furthest = stock.get_submodule(case.decoder), 0.0
    for number, row in enumerate(rows):
        prompt = row["input_ids"].shape[1]
        inputs = case.longer(row, sequences[number : number + 1, -STEPS:-1])
        keep_N = kept(row, model.sparsifier.report, number, inputs["input_ids"].shape[1])
        expected = reference.logits(stock, decoder, SPLIT, inputs, keep_N)
        furthest = max(furthest, (found[number] - expected[prompt - 1 :]).abs().max().item())
    return furthest


def pair(name: str, attention: str = "sdpa") -> tuple[Case, Any, Any]:
    """Return a case, its stock model for the reference, and its model to attach to."""
    case = CASES[name]
    return case, case.model("eager"), case.model(attention)


def skip_unless_stock_can(model: Any, inputs: dict[str, Tensor], **settings: Any) -> None:
    """Skip where this version of transformers fails by itself, or answers otherwise than without settings."""
    try:
        answers = [generate(model, inputs, **more)[0] for more in ({}, settings)]
    except (IndexError, RuntimeError, ValueError) as error:
        pytest.skip(f"stock transformers of this version fails: {error}")
    if not torch.equal(*answers):
        pytest.skip("stock transformers of this version answers otherwise")


@every
def test_detached_is_the_stock_model(name: str) -> None:
    case, _, model = pair(name)
    inputs = case.batch(rows_of(case))
    before, weights = generate(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    made = by_chance().attach(model)
    generate(model, inputs)
    made.detach()
    assert all(torch.equal(a, b) for a, b in zip(before, generate(model, inputs), strict=True))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@every
@pytest.mark.parametrize("use_cache", [True, False])
def test_keep_rate_one_is_the_stock_model(name: str, use_cache: bool) -> None:
    case, _, model = pair(name)
    inputs = case.batch(rows_of(case))
    expected = generate(model, inputs, use_cache=use_cache)
    by_chance(image_keep_rate=1.0, text_keep_rate=1.0).attach(model)
    found = generate(model, inputs, use_cache=use_cache)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=2e-6, rtol=1e-5)


MODES: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@every
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_answers_are_those_of_closed_columns(name: str, mode: dict[str, Any], attention: str) -> None:
    case, stock, model = pair(name, attention)
    if name == "gemma3":
        skip_unless_stock_can(model, case.batch(rows_of(case)), **mode)
    made = by_chance().attach(model)
    if name == "mistral" and mode == MODES["static"]:
        with pytest.raises(ValueError, match=r"new_cache\(capacity, static=True\)"):
            worst(case, stock, model, rows_of(case), **mode)
        mode = {"past_key_values": made.new_cache(40, static=True), "disable_compile": True}
    assert worst(case, stock, model, rows_of(case), **mode) < 2e-5
    decided = torch.cat(made.report.text_kept)
    assert 0 < int(decided.sum()) < len(decided)


@every
def test_learned_decisions_fall_on_what_enters_the_layer(name: str) -> None:
    case, stock, model = pair(name)
    made = sparsifier().attach(model)
    assert worst(case, stock, model, rows_of(case)) < 2e-5
    for number, row in enumerate(rows_of(case)):
        generate(model, row)
        alone = [part[0].clone() for part in (made.report.image_kept, made.report.text_kept)]
        generate(model, case.batch(rows_of(case)))
        assert torch.equal(made.report.image_kept[number], alone[0])
        assert torch.equal(made.report.text_kept[number], alone[1])


@with_pictures
def test_rates_hold_for_each_picture(name: str) -> None:
    case, _, model = pair(name)
    rows = [case.row(3, 4, 1), case.row(6, 1, 2)]
    made = by_chance(image_keep_rate=0.3).attach(model)
    model(**case.batch(rows))
    found = made.report._record.image_flags
    for row, flags in zip(rows, found, strict=True):
        is_image_N = (row["input_ids"][0] == IMAGE) | (row["input_ids"][0] == VIDEO)
        assert sum(len(flag) for flag in flags) == int(is_image_N.sum())
        assert [int(flag.sum()) for flag in flags] == [max(1, int(len(flag) * 0.3)) for flag in flags]
    assert len({len(flag) for flags in found for flag in flags}) > 1 or name in ONE_SIZE


SLIDING = ("gemma3", "gemma3_text", "mistral", "cohere2")
ONE_SIZE = {"llava", "vipllava", "idefics3", "smolvlm", "gemma3"}


@every
def test_sparse_layers_compute_and_hold_the_kept_tokens_alone(name: str) -> None:
    case, _, model = pair(name)
    made = by_chance().attach(model)
    seen: list[list[int]] = [[] for _ in range(LAYERS)]
    for number, layer in enumerate(model.get_submodule(case.decoder).layers):
        layer.mlp.register_forward_hook(
            lambda _, args, __, n=number: seen[n].append(args[0].reshape(-1, HIDDEN).shape[0])
        )
    row = rows_of(case)[-2]
    generate(model, row)
    prompt, dropped = row["input_ids"].shape[1], 0
    if case.picture is not None:
        flags = torch.cat(made.report._record.image_flags[0])
        dropped = int((~flags).sum())
        assert dropped > 0
    for number in range(LAYERS):
        assert seen[number][0] == prompt - (dropped if number >= SPLIT else 0)
        assert seen[number][1:] == [1] * (STEPS - 1)
    held = prompt - dropped + int(made.report.text_kept[0].sum())
    assert made.report.kv_lengths[SPLIT:, 0].tolist() == [held] * (LAYERS - SPLIT)
    fed = prompt + STEPS - 1
    windows = [None] * LAYERS if name not in SLIDING else made.report._record.shape.windows
    dense = [fed if window is None else min(fed, window - 1) for window in windows]
    assert made.report.kv_lengths[:SPLIT, 0].tolist() == dense[:SPLIT]


@every
def test_beams_agree_with_and_without_a_cache(name: str) -> None:
    case, _, model = pair(name)
    by_chance().attach(model)
    # Older versions repeat pictures one by one for beams, which parts those of a row: one tile a row.
    pictures = 1 if case.picture else 0
    inputs = case.batch([case.row(3, pictures, 0), case.row(9, pictures, 6)])
    answers = [
        model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*answers)


@every
def test_a_second_turn_is_that_of_closed_columns(name: str) -> None:
    """The second prompt, text alone, sees what the first left."""
    case, stock, model = pair(name)
    made = by_chance().attach(model)
    row, cache = rows_of(case)[-2], made.new_cache()
    sequence = model.generate(**row, max_new_tokens=STEPS, do_sample=False, past_key_values=cache)
    more = torch.randint(3, 80, (1, 5), generator=torch.Generator().manual_seed(3))
    longer = case.longer(row, torch.cat([sequence[:, row["input_ids"].shape[1] :], more], dim=1))
    asked = {key: longer[key] for key in ("input_ids", "attention_mask")}
    out = model.generate(
        **asked,
        max_new_tokens=STEPS,
        do_sample=False,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    inputs = case.longer(row, out.sequences[:, row["input_ids"].shape[1] : -1])
    keep_N = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    report, start = made.report, longer["input_ids"].shape[1]
    first = kept(row, report, 0, row["input_ids"].shape[1] + len(report.text_kept[0]))
    prompt = row["input_ids"].shape[1]
    keep_N[:prompt] = first[:prompt]
    decided = report.text_kept[0]
    keep_N[prompt : prompt + STEPS - 1] = decided[: STEPS - 1]
    keep_N[start:] = decided[STEPS - 1 :]
    expected = reference.logits(stock, stock.get_submodule(case.decoder), SPLIT, inputs, keep_N)
    found = torch.stack(out.logits, dim=1)[0]
    torch.testing.assert_close(found, expected[start - 1 :], atol=2e-5, rtol=1e-4)


@every
def test_teacher_forcing_sees_what_decoding_saw(name: str) -> None:
    case, stock, model = pair(name)
    made = by_chance().attach(model)
    row = rows_of(case)[0]
    sequences, found = generate(model, row)
    inputs, prompt = case.longer(row, sequences[:, -STEPS:-1]), row["input_ids"].shape[1]
    keep_N = kept(row, made.report, 0, inputs["input_ids"].shape[1])
    answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer[:, prompt:] = True
    with torch.no_grad():
        logits = model(**inputs, answer_mask=answer).logits[0]
    torch.testing.assert_close(logits[prompt - 1 :], found[0], atol=2e-5, rtol=1e-4)
    expected = reference.logits(stock, stock.get_submodule(case.decoder), SPLIT, inputs, keep_N)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_every_predictor_a_gradient(name: str, checkpointing: bool) -> None:
    case, _, model = pair(name)
    made = sparsifier().attach(model)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    inputs = case.batch(rows_of(case)[:2])
    answer = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    answer[:, -3:] = True
    labels = torch.where(answer, inputs["input_ids"], -100)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss = model(**inputs, labels=labels, answer_mask=answer).loss
    (loss + sum(made.ratio_loss())).backward()
    trained = dict(made.named_parameters())
    if case.picture is None:
        trained = {key: value for key, value in trained.items() if not key.startswith("image_")}
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
    assert any(parameter.grad.abs().max() > 0 for parameter in trained.values())
    assert all(p.grad is None for key, p in model.named_parameters() if not key.startswith("sparsifier."))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every
def test_saved_and_loaded_it_answers_the_same(name: str, tmp_path: Path) -> None:
    case, _, model = pair(name)
    made = sparsifier().attach(model)
    inputs = case.batch(rows_of(case))
    expected = generate(model, inputs)
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    again.generation_config = copy.deepcopy(model.generation_config)
    Sparsifier.from_pretrained(tmp_path).attach(again)
    assert all(torch.equal(a, b) for a, b in zip(expected, generate(again, inputs), strict=True))


@with_pictures
def test_embeddings_with_positions_are_dropped_alike(name: str) -> None:
    """What ``input_ids`` tell, ``image_positions`` tell of a prompt that comes as embeddings."""
    case, _, model = pair(name)
    if "rope_parameters" in case.config.get("text_config", {}) and "mrope_section" in str(case.config):
        pytest.skip("its positions come from the ids: embeddings alone are another prompt to the stock model")
    if name == "gemma3":
        pytest.skip("its two-way attention comes with token types, which the stock model wants with ids")
    made = by_chance().attach(model)
    row = case.row(4, 2, 1)
    seen: list[Tensor] = []
    handle = model.get_submodule(case.decoder).register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(**row).logits
    handle.remove()
    flags, ids = made.report._record.image_flags[0], row["input_ids"][0]
    places = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
    positions = [list(places.split([len(flag) for flag in flags]))]
    with torch.no_grad():
        found = model(inputs_embeds=seen[0], image_positions=positions).logits
        cache = made.new_cache(image_positions=positions)
        again = model(inputs_embeds=seen[0], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad(), pytest.warns(UserWarning, match="image_positions"):
        dense = model(inputs_embeds=seen[0]).logits
    assert dense.shape[1] == len(ids)


def test_unknown_models_are_refused_with_a_page_to_read() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=32)
    with pytest.raises(ValueError, match=r"gpt2.*adding-a-model"):
        by_chance().attach(GPT2LMHeadModel(config))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_deepstack_sets_the_lowest_layer(name: str) -> None:
    model = CASES[name].model()
    with pytest.raises(
        ValueError, match=r"layer is 1: this model adds features.*first 2 layers, choose 2 to 3"
    ):
        by_chance(layer=1).attach(model)
    made = by_chance().attach(model)
    made.config.layer = 1
    with pytest.raises(ValueError, match="choose 2 to 3"):
        model(**CASES[name].row(3))


PARTED = {"pixtral", "mistral3"}


@with_pictures
def test_a_prompt_in_parts_that_split_no_picture_is_one_prompt(name: str) -> None:
    case, _, model = pair(name)
    row = case.row(12, 1, 0)
    ids = row["input_ids"][0]
    is_image_N = (ids == IMAGE) | (ids == VIDEO)
    last = int(is_image_N.nonzero().max())
    skip_unless_stock_can(model, row, prefill_chunk_size=last + 3)
    made = by_chance().attach(model)
    if name in PARTED:
        with pytest.raises(ValueError, match="text between the lines or frames"):
            generate(model, row, prefill_chunk_size=last + 3)
        return
    expected, found = generate(model, row), generate(model, row, prefill_chunk_size=last + 3)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=1e-4)
    assert torch.equal(found[0], expected[0])
    generate(model, row)
    flags = made.report._record.image_flags[0]
    generate(model, row, prefill_chunk_size=last + 3)
    assert [flag.tolist() for flag in made.report._record.image_flags[0]] == [flag.tolist() for flag in flags]
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, row, prefill_chunk_size=last)


@pytest.mark.parametrize("name", SLIDING)
def test_no_memory_is_claimed_where_a_window_holds_less(name: str) -> None:
    """Against the storage of the stock cache, and of our own."""
    case, stock, model = pair(name)
    made = by_chance(image_keep_rate=1.0).attach(model)
    row = case.row(20, 1 if case.picture else 0)
    caches = []
    for which in (stock, model):
        with torch.no_grad():
            caches.append(which(**row, use_cache=True).past_key_values)
    held = [layer.keys.shape[2] for layer in caches[0].layers]
    assert made.report.kv_lengths[:SPLIT, 0].tolist() == held[:SPLIT]
    assert made.report.kv_lengths[SPLIT:, 0].tolist() == [row["input_ids"].shape[1]] * (LAYERS - SPLIT)
    summary = made.report.summary()
    one = summary["kv_bytes"] // int(made.report.kv_lengths.sum())
    assert summary["kv_bytes_dense"] == one * sum(held)
    assert summary["kv_bytes"] > summary["kv_bytes_dense"]


def test_experts_count_as_a_token_meets_them() -> None:
    """Against the weights of one layer: two of four experts, and the router."""
    from dynamic_llava.costs.shape import DecoderShape

    decoder = CASES["qwen3_vl_moe"].model().get_submodule("model.language_model")
    layer = decoder.layers[1]
    attention = sum(p.numel() for p in layer.self_attn.parameters() if p.ndim > 1)
    experts = sum(p.numel() for p in layer.mlp.experts.parameters()) // 2
    router = layer.mlp.gate.weight.numel()
    assert DecoderShape.from_config(decoder.config).layer_weights == attention + experts + router
