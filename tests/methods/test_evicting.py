"""Methods that give up earlier tokens: what is held, and logits as if only that had ever been seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import tiny

from dynamic_llava import Sparsifier, methods
from dynamic_llava.core.cache import context_of
from dynamic_llava.core.report import Report
from dynamic_llava.methods import EvictingMethod, Held

STEPS, LAYER = 14, 2
SINKS = 4
EVICTING = [
    name for name in methods.names("output") if issubclass(methods.find("output", name), EvictingMethod)
]


def attached(policy: str, rate: float = 0.5, **settings: Any) -> tuple[Any, Sparsifier]:
    model = tiny.model(attention="eager")
    sparsifier = tiny.sparsifier(text_policy=policy, text_keep_rate=rate, sparsify_image=False, **settings)
    sparsifier.attach(model)
    return model, sparsifier


def decoded(model: Any, sparsifier: Sparsifier, inputs: Any, tokens: torch.Tensor) -> tuple[Any, list[Any]]:
    """Feed ``tokens`` one by one; return the logits of each step, and which of them are held after it."""
    mask = inputs["attention_mask"]
    out = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True)
    logits, held = [], []
    for step in range(tokens.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
        out = model(
            input_ids=tokens[:, step : step + 1],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
        held.append([row.nonzero().flatten().tolist() for row in sparsifier.report.text_kept])
    return torch.stack(logits, 1), held


class Reference:
    """The stock model over the whole sequence, with eager attention and a mask of our own a layer."""

    def __init__(self, inputs: Any, tokens: torch.Tensor) -> None:
        self.model = tiny.model(attention="eager")
        self.inputs = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
        self.prompt, self.length = inputs["input_ids"].shape[1], self.inputs["input_ids"].shape[1]

    def run(self, seen: list[set[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [T, V] and attention [L, T, N] (mean over heads) of the output tokens.

        ``seen[t]`` has the earlier output tokens that output token t sees in the sparse layers.
        """
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        sparse = causal.clone()
        for query, keys in enumerate(seen):
            hidden = [self.prompt + key for key in range(query) if key not in keys]
            sparse[self.prompt + query, hidden] = False
        handles = [
            layer.register_forward_pre_hook(
                _with_mask(sparse if number >= LAYER else causal), with_kwargs=True
            )
            for number, layer in enumerate(self.model.model.language_model.layers)
        ]
        given = {k: v for k, v in self.inputs.items() if k != "attention_mask"}
        out = self.model(**given, output_attentions=True, use_cache=False)
        for handle in handles:
            handle.remove()
        weights = torch.stack([a[0].mean(0) for a in out.attentions])[:, self.prompt :]
        return out.logits[0, self.prompt :], weights


def _with_mask(mask: torch.Tensor) -> Any:
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    return lambda _, args, kwargs: (args, {**kwargs, "attention_mask": additive})


def simulate_streaming(rate: float) -> list[set[int]]:
    held: set[int] = set()
    seen = []
    for step in range(STEPS):
        seen.append(set(held))
        held.add(step)
        while len(held) > max(1, math.ceil(rate * (step + 1))):
            recent = [token for token in sorted(held) if token >= SINKS]
            held.remove(recent[0] if recent else max(held))
    return [*seen, held]


def simulate_h2o(rate: float, reference: Reference) -> list[set[int]]:
    """One token at a time, from the attention that the reference pays under the decisions so far."""
    held: set[int] = set()
    mass: dict[int, float] = {}
    seen: list[set[int]] = []
    for step in range(STEPS):
        seen.append(set(held))
        _, weights = reference.run([*seen, *[set(range(t)) for t in range(step + 1, STEPS)]])
        held.add(step)
        for token in held:
            paid = weights[LAYER:, step, reference.prompt + token].sum().item()
            mass[token] = mass.get(token, 0.0) + paid
        budget = max(1, math.ceil(rate * (step + 1)))
        if len(held) > budget:
            recent = {t for t in held if t > step - max(1, budget // 2)}
            held.remove(min(held - recent, key=lambda token: mass[token]))
    return [*seen, held]


def simulate_tova(rate: float, reference: Reference) -> list[set[int]]:
    """Of a full cache the token goes to which the newest, among them itself, pays least."""
    held: set[int] = set()
    seen: list[set[int]] = []
    for step in range(STEPS):
        seen.append(set(held))
        _, weights = reference.run([*seen, *[set(range(t)) for t in range(step + 1, STEPS)]])
        held.add(step)
        if len(held) > max(1, math.ceil(rate * (step + 1))):
            paid = {token: weights[LAYER:, step, reference.prompt + token].sum().item() for token in held}
            held.remove(min(held, key=lambda token: paid[token]))
    return [*seen, held]


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("rate", [0.3, 0.6, 1.0])
def test_held_tokens_and_logits_are_those_of_the_definition(policy: str, rate: float) -> None:
    inputs = tiny.row(5)
    tokens = torch.randint(4, tiny.VOCABULARY, (1, STEPS), generator=torch.Generator().manual_seed(7))
    reference = Reference(inputs, tokens)
    seen = {
        "streaming": lambda: simulate_streaming(rate),
        "h2o": lambda: simulate_h2o(rate, reference),
        "tova": lambda: simulate_tova(rate, reference),
    }[policy]()
    logits, held = decoded(*attached(policy, rate), inputs, tokens)
    assert [set(rows[0]) for rows in held] == seen[1:]
    torch.testing.assert_close(logits[0], reference.run(seen[:-1])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", EVICTING)
def test_rows_of_a_batch_decide_alone(policy: str) -> None:
    rows = [tiny.row(9, seed=1), tiny.row(3, seed=2)]
    tokens = torch.randint(4, tiny.VOCABULARY, (2, STEPS), generator=torch.Generator().manual_seed(3))
    logits, held = decoded(*attached(policy), tiny.batch(rows), tokens)
    for number, row in enumerate(rows):
        alone, kept = decoded(*attached(policy), row, tokens[number : number + 1])
        assert [rows[number] for rows in held] == [rows[0] for rows in kept]
        torch.testing.assert_close(logits[number], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", EVICTING)
def test_generation_beams_and_chats_hold_no_more_than_the_budget(policy: str) -> None:
    model, sparsifier = attached(policy, 0.25)
    inputs = tiny.batch([tiny.row(4, seed=1), tiny.row(6, seed=2)])
    for beams in (1, 3):
        model.generate(**inputs, max_new_tokens=21, do_sample=False, num_beams=beams)
        report = sparsifier.report
        assert {int(row.sum()) for row in report.text_kept} == {math.ceil(0.25 * 20)}
        assert report.summary()["decode_flops"] < report.summary()["decode_flops_dense"]
    cache = sparsifier.new_cache()
    first = model.generate(**tiny.row(4), max_new_tokens=13, do_sample=False, past_key_values=cache)
    more = torch.cat([first, torch.randint(4, 60, (1, 5))], dim=1)
    model.generate(input_ids=more, past_key_values=cache, max_new_tokens=9, do_sample=False)
    kept = Report(context_of(cache).record).text_kept[0]
    assert kept[:12].sum() == 3
    assert kept[-8:].sum() == 2


@pytest.mark.parametrize("policy", EVICTING)
def test_other_modes_are_refused(policy: str) -> None:
    model, _ = attached(policy)
    inputs = tiny.row(4)
    with pytest.raises(ValueError, match=rf"(?i){policy}.*K/V cache"):
        model.generate(**inputs, max_new_tokens=4, use_cache=False)
    with pytest.raises(ValueError, match=rf"(?i){policy}.*K/V cache"):
        model(**inputs, answer_mask=torch.ones_like(inputs["input_ids"], dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"{policy}.*static"):
        model.generate(**inputs, max_new_tokens=4, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("policy", EVICTING)
def test_no_eviction_below_the_budget(policy: str) -> None:
    ordinal_BS, attention_BS = torch.tensor([[-5, 0, 1, 3]]), torch.tensor([[9.0, 1.0, 5.0, 0.0]])
    held = Held(ordinal_BS, torch.tensor([[False, True, False, True]]), attention_BS, attention_BS)
    assert methods.output_method(policy, {}).evict(held, 0.5).tolist() == [-1]


def test_settings_of_the_methods_change_what_goes() -> None:
    ordinal_BS, attention_BS = torch.arange(8)[None], torch.tensor([[7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    held = Held(ordinal_BS, torch.ones_like(ordinal_BS, dtype=torch.bool), attention_BS, attention_BS)
    assert methods.output_method("streaming", {"sinks": 2}).evict(held, 0.5).tolist() == [2]
    assert methods.output_method("h2o", {"recent": 1.0}).evict(held, 0.5).tolist() == [3]
    assert methods.output_method("h2o", {}).evict(held, 0.5).tolist() == [5]
