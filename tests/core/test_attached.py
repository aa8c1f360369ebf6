"""What people do with an attached model besides calling it: copy, pickle, subclass, replicate, share."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from tests import tiny
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dynamic_llava.core import fit

STEPS = 12


def attached(**settings: Any) -> Any:
    model = tiny.model()
    tiny.sparsifier(**settings).attach(model)
    return model


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options)[:, -STEPS:]


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("text_policy", ["learned", "h2o"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_attached_model_is_attached_to_its_own_copy(make: Any, text_policy: str) -> None:
    model, row = attached(text_policy=text_policy), tiny.row(9, 1, 3)
    made = make(
        model
    )  # before the first call, which puts hooks of transformers' own there that do not pickle
    assert made.sparsifier is not model.sparsifier
    expected = generate(model, row)
    assert made.sparsifier.report is None
    assert torch.equal(generate(made, row), expected)
    with torch.no_grad():  # arguments by position
        logits = [run(row["input_ids"], row["pixel_values"]).logits for run in (made, model)]
    assert torch.equal(*logits)
    generate(made, row)
    kept = made.sparsifier.report.text_kept[0]
    made.sparsifier.config.text_policy = "uniform"
    made.sparsifier.config.image_keep_rate = 1.0
    generate(made, row)
    assert torch.equal(generate(model, row), expected)
    assert torch.equal(model.sparsifier.report.text_kept[0], kept)
    made.sparsifier.detach()
    assert torch.equal(generate(made, row), generate(tiny.model(), row))
    assert torch.equal(generate(model, row), expected)


def test_a_detached_model_pickles_as_a_stock_one() -> None:
    model = attached(text_policy="h2o")
    model.sparsifier.detach()
    assert len(pickle.dumps(model)) == len(pickle.dumps(tiny.model()))


class Logging(LlavaForConditionalGeneration):
    """Hands everything on, as people do to look at calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_a_subclass_that_hands_its_arguments_on() -> None:
    model, row = attached(), tiny.row(9, 1, 3)
    mine = Logging(model.config).eval()
    mine.load_state_dict(tiny.model().state_dict())
    mine.generation_config = model.generation_config
    tiny.sparsifier().attach(mine)
    with torch.no_grad():
        expected = model(**row).logits
        assert torch.equal(mine(**row).logits, expected)
        assert torch.equal(mine(row["input_ids"], row["pixel_values"]).logits, expected)
    with pytest.raises(ValueError, match="answer_mask"):
        mine(**row, labels=row["input_ids"])
    with pytest.raises(ValueError, match="answer_mask"):
        mine(row["input_ids"], row["pixel_values"], None, None, None, None, None, None, row["input_ids"])


def test_a_model_that_was_called_can_be_copied() -> None:
    model, row = attached(), tiny.row(9, 1, 3)
    expected = generate(model, row)
    made = copy.deepcopy(model)
    assert made.sparsifier.report is None
    assert torch.equal(generate(made, row), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_outputs_as_tuples(use_cache: bool) -> None:
    model, row = attached(), tiny.row(9, 1, 3)
    with torch.no_grad():
        expected = model(**row, use_cache=use_cache).logits
        assert torch.equal(model(**row, use_cache=use_cache, return_dict=False)[0], expected)


def test_steps_without_a_cache_know_the_prompt_where_gradients_are_on() -> None:
    model, row = attached(), tiny.row(9, 1, 3)
    first = model(**row, use_cache=False)
    longer = {**row, "input_ids": torch.cat([row["input_ids"], torch.full((1, 3), 7)], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    model(**longer, use_cache=False, past_key_values=first.past_key_values)
    assert len(model.sparsifier.report.text_kept[0]) == 3


def test_a_data_parallel_replica_is_refused() -> None:
    replica = attached()._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        replica(**tiny.row(4))


def test_threads_share_one_model() -> None:
    model = attached()
    rows = [tiny.row(3 + 5 * number, number % 3, number) for number in range(8)]

    def answer(number: int) -> tuple[Tensor, Any]:
        tokens = generate(model, rows[number % 8], use_cache=number % 4 != 3)
        report = model.sparsifier.report
        return tokens, (report.text_kept, report.image_kept, report.kv_lengths)

    alone = [answer(number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(32)))
    for number, (tokens, kept) in enumerate(together):
        expected, expected_kept = alone[number % 8]
        assert torch.equal(tokens, expected)
        for part, expected_part in zip(kept[:2], expected_kept[:2], strict=True):
            assert all(map(torch.equal, part, expected_part))
        assert torch.equal(kept[2], expected_kept[2])


def test_a_thread_has_a_report_of_its_own() -> None:
    model = attached()
    generate(model, tiny.row(4))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: model.sparsifier.report).result() is None
        pool.submit(generate, model, tiny.row(9, 2)).result()
        assert len(pool.submit(lambda: model.sparsifier.report.image_kept[0]).result()) == 8
    assert len(model.sparsifier.report.image_kept[0]) == 4


def test_inference_changes_nothing_but_hooks() -> None:
    model = tiny.model()
    generate(model, tiny.row(4))  # transformers puts hooks of its own there
    before = [dict(vars(module)) for module in model.modules()]
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    hooks += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    own = {"_modules", "_keys_to_ignore_on_save", *hooks}
    tiny.sparsifier().attach(model)
    generate(model, tiny.row(9, 1, 3))
    modules = [module for module in model.modules() if not module.__module__.startswith("dynamic_llava")]
    predictors = set(model.sparsifier.modules())
    modules = [module for module in modules if module not in predictors]
    for module, state in zip(modules, before, strict=True):
        changed = {name for name, value in vars(module).items() if value is not state.get(name)}
        assert changed <= own, (type(module).__name__, changed)


@pytest.mark.parametrize("version", ["5.16.0", "5.99.0"])
def test_a_version_that_was_not_tested_gives_one_warning(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    model = tiny.model()
    with pytest.warns(UserWarning, match=f"transformers {version} was not tested") as caught:
        tiny.sparsifier().attach(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_tested_version_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", str(fit.TESTED[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached()


def test_reentrant_checkpointing_is_refused_at_once() -> None:
    model, row = attached(), tiny.row(9, 1, 3)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**row, answer_mask=torch.zeros_like(row["input_ids"], dtype=torch.bool))
    model.eval()
    generate(model, row)


@pytest.mark.parametrize("chunk", [17, 20, 24])
def test_chunked_prefill_that_parts_no_picture(chunk: int) -> None:
    if not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"):
        pytest.skip("this version of transformers drops pictures under prefill_chunk_size")
    model, inputs = attached(), tiny.batch([tiny.row(9, 1, 3), tiny.row(9, 1, 4)])
    expected = generate(model, inputs)
    lengths = model.sparsifier.report.kv_lengths
    assert torch.equal(generate(model, inputs, prefill_chunk_size=chunk), expected)
    assert torch.equal(model.sparsifier.report.kv_lengths, lengths)
    with pytest.raises(ValueError, match="prefill_chunk_size parts a picture"):
        generate(model, inputs, prefill_chunk_size=9)
