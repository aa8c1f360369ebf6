"""Ways to run an attached model that users combine it with: each gives the answer of the plain way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from torch import Tensor

STEPS = 24


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return tiny.batch([tiny.row(3, 1, 0), tiny.row(12, 2, 1), tiny.row(7, 0, 2)])


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=STEPS, **{"do_sample": False} | options)[:, -STEPS:]


def attached(attention: str = "sdpa", **settings: Any) -> Any:
    model = tiny.model(attention)
    tiny.sparsifier(**settings).attach(model)
    return model


def test_flex_attention_equals_sdpa(inputs: dict[str, Tensor]) -> None:
    expected = generate(attached(), inputs)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(generate(attached("flex_attention"), inputs), expected)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_equals_plain(inputs: dict[str, Tensor]) -> None:
    """Graphs are captured as for any backend; what they are lowered to is torch's matter."""
    model = attached()
    logits = []
    for run in (model, torch.compile(model, backend="eager")):
        out = run(**inputs)
        steps = [out.logits]
        for token in (5, 9):
            ids = torch.full((3, 1), token)
            out = run(input_ids=ids, past_key_values=out.past_key_values)
            steps.append(out.logits)
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "device_map",
    [
        {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        | {"model.language_model.embed_tokens": "cpu", "model.language_model.norm": "cpu"}
        | {"model.language_model.rotary_emb": "cpu"}
        | {f"model.language_model.layers.{i}": "cpu" if i < 1 else "disk" for i in range(4)},
        {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        | {"model.language_model": "disk"},
    ],
    ids=["layers", "decoder"],
)
def test_device_map_with_offloaded_weights(
    device_map: dict[str, str], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = generate(attached(), inputs)
    model = accelerate.dispatch_model(
        tiny.model(), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    sparsifier = tiny.sparsifier().attach(model)
    assert torch.equal(generate(model, inputs), expected)
    sparsifier.detach()
    assert torch.equal(generate(model, inputs), generate(tiny.model(), inputs))


def test_sampling_depends_on_the_seed_alone(inputs: dict[str, Tensor]) -> None:
    model = attached()
    runs = []
    for use_cache in (True, False, True):
        torch.manual_seed(7)
        runs.append(generate(model, inputs, do_sample=True, use_cache=use_cache))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], generate(model, inputs))


def test_several_return_sequences_are_rows_like_any_other() -> None:
    model = attached()
    row = tiny.row(9, 1, 3)
    torch.manual_seed(0)
    sampled = generate(model, row, do_sample=True, num_return_sequences=3)
    kept = model.sparsifier.report.text_kept
    assert len(kept) == len(sampled) == 3
    for answer, decisions in zip(sampled, kept, strict=True):
        ids = torch.cat([row["input_ids"][0], answer[:-1]])[None]
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, row["input_ids"].shape[1] :] = True
        with torch.no_grad():
            model(input_ids=ids, pixel_values=row["pixel_values"], answer_mask=mask)
        assert torch.equal(model.sparsifier.report.text_kept[0], decisions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_every_mode(dtype: torch.dtype, inputs: dict[str, Tensor]) -> None:
    """Same decisions forced by a fixed policy; then only rounding may differ."""
    model = attached(image_policy="uniform", text_policy="uniform")
    with torch.no_grad():
        expected = model(**inputs).logits
        half = model.to(dtype)(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}).logits
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, atol=0.15, rtol=0.1)


def test_assisted_generation_is_refused(inputs: dict[str, Tensor]) -> None:
    row = tiny.row(9, 1, 3)
    with pytest.raises(ValueError, match=r"assisted|cropped"):
        generate(attached(), row, assistant_model=tiny.model())
    with pytest.raises(ValueError, match=r"assisted|cropped"):
        generate(attached(), row, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(
            "offloaded",
            marks=pytest.mark.skipif(
                torch.version.cuda is not None and not torch.cuda.is_available(),
                reason="transformers itself asks a torch with CUDA for a stream, and there is no GPU",
            ),
        ),
        "quantized",
    ],
)
def test_other_caches_are_refused_at_the_start(implementation: str) -> None:
    with pytest.raises((ValueError, ImportError)):
        generate(attached(), tiny.row(9, 1, 3), cache_implementation=implementation)


def test_padding_fed_after_an_early_end_is_masked_in_the_next_turn() -> None:
    """``generate`` feeds padding to rows that have ended; the mask of a new turn takes it back."""
    model = attached(image_keep_rate=0.5)
    rows = [tiny.row(9, 1, 0), tiny.row(14, 2, 1)]
    turn = torch.tensor([[11, 12, 13]])
    ends_after = 2
    answers = torch.randint(10, 40, (2, 8), generator=torch.Generator().manual_seed(3))

    def chat(inputs: dict[str, Tensor], answers: Tensor, seen: Tensor) -> Tensor:
        with torch.no_grad():
            mask = inputs["attention_mask"]
            out = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            for column in range(answers.shape[1]):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                out = model(
                    input_ids=answers[:, column : column + 1],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1)[:, -1:],
                    past_key_values=out.past_key_values,
                )
            new = turn.expand(len(answers), -1)
            mask = torch.cat([inputs["attention_mask"], seen, torch.ones_like(new)], dim=1)
            return model(
                input_ids=new,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -3:],
                past_key_values=out.past_key_values,
            ).logits

    seen = torch.ones_like(answers)
    seen[0, ends_after:] = 0
    together = chat(tiny.batch(rows), answers.masked_fill(seen == 0, tiny.PAD), seen)
    first = chat(rows[0], answers[:1, :ends_after], seen[:1, :ends_after])
    second = chat(rows[1], answers[1:], seen[1:])
    torch.testing.assert_close(together, torch.cat([first, second]), atol=1e-5, rtol=1e-4)
    assert model.sparsifier.report.kv_lengths.shape == (4, 1)


def test_mask_of_a_new_turn_must_fit_the_cache() -> None:
    model = attached()
    with torch.no_grad():
        out = model(**tiny.row(9, 1, 0))
        with pytest.raises(ValueError, match="attention_mask has 9 columns"):
            model(
                input_ids=torch.tensor([[5, 6, 7]]),
                attention_mask=torch.ones(1, 9, dtype=torch.long),
                past_key_values=out.past_key_values,
            )
