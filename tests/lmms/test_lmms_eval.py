"""The model that lmms-eval asks, without its tasks; `.ci/lmms-check` runs this and a whole evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; make lmms-check installs it")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.models.model_utils import gen_metrics

from dynamic_llava.lmms.plugin import DynamicLlava

RED = Image.new("RGB", (96, 96), (255, 0, 0))
BLUE = Image.new("RGB", (50, 90), (0, 0, 255))
DOCUMENTS = [[RED], [], [BLUE, RED], [BLUE]]


def asked(context: str, document: int = 0, **settings: Any) -> Instance:
    arguments = (context, {"max_new_tokens": 12} | settings, lambda images: images, document, "task", "test")
    metadata = {"task": "task", "doc_id": document, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata)


def model(checkpoint: Path, **settings: Any) -> DynamicLlava:
    made = DynamicLlava(str(checkpoint), device="cpu", **settings)
    made.task_dict = {"task": {"test": DOCUMENTS}}
    return made


@pytest.fixture(autouse=True)
def no_metrics() -> Iterator[None]:
    gen_metrics.reset_logged_metrics()
    yield
    gen_metrics.reset_logged_metrics()


def test_lmms_eval_finds_it_by_name() -> None:
    assert get_model("dynamic_llava") is DynamicLlava


def test_a_batch_of_all_kinds_answers_as_each_request_alone(checkpoint: Path) -> None:
    requests = [
        asked("is it red?"),
        asked("is it a long question, longer than the others?", 1),
        asked("first <image> then <image> ?", 2),
        asked("is it blue?", 3, max_new_tokens=5),
        asked("what is it?", 2),
    ]
    alone = [model(checkpoint, batch_size=1).generate_until([request])[0] for request in requests]
    assert model(checkpoint, batch_size=4).generate_until(requests) == alone
    assert len(set(alone)) > 1


def test_results_hold_what_was_kept(checkpoint: Path) -> None:
    model(checkpoint, image_keep_rate=0.5).generate_until([asked("is it red?")])
    summary = gen_metrics.summarize_logged_metrics()
    assert summary["avg_image_tokens_kept"] == 0.5
    assert 0 < summary["avg_output_tokens_kept"] <= 1
    assert summary["total_gen_tokens"] == 12


def test_dense_keeps_all(checkpoint: Path, stock_checkpoint: Path) -> None:
    request = [asked("is it red?")]
    dense = model(checkpoint, dense=True).generate_until(request)
    assert gen_metrics.summarize_logged_metrics()["avg_image_tokens_kept"] == 1
    assert dense == model(stock_checkpoint).generate_until(request)


def test_beams_claim_no_shares(checkpoint: Path) -> None:
    model(checkpoint).generate_until([asked("is it red?", num_beams=2)])
    assert "avg_image_tokens_kept" not in gen_metrics.summarize_logged_metrics()


def test_policies_without_predictor_make_a_baseline_of_a_stock_checkpoint(stock_checkpoint: Path) -> None:
    fastv = model(stock_checkpoint, image_policy="fastv", image_keep_rate=0.25, layer=1)
    fastv.generate_until([asked("is it red?")])
    summary = gen_metrics.summarize_logged_metrics()
    assert (summary["avg_image_tokens_kept"], summary["avg_output_tokens_kept"]) == (0.25, 1)


def test_stops(checkpoint: Path) -> None:
    plain = model(checkpoint)
    (answer,) = plain.generate_until([asked("is it red?")])
    word = answer.split()[3]
    for until in (word, [word], ["", word]):
        assert plain.generate_until([asked("is it red?", until=until)]) == [answer.partition(word)[0].strip()]
    assert plain.generate_until([asked("is it red?", until=None)]) == [answer]


def test_the_default_stop_does_not_end_an_answer_after_a_paragraph(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model(checkpoint)
    monkeypatch.setattr(plain.processor, "batch_decode", lambda tokens, **_: ["one\n\ntwo ASSISTANT: three"])
    assert plain.generate_until([asked("?", until=["\n\n"])]) == ["one\n\ntwo ASSISTANT: three"]
    assert plain.generate_until([asked("?", until=["ASSISTANT:"])]) == ["one\n\ntwo"]


def test_do_sample_false_is_greedy_whatever_the_temperature(checkpoint: Path) -> None:
    plain = model(checkpoint)
    greedy = plain.generate_until([asked("is it red?")])
    for _ in range(3):
        assert plain.generate_until([asked("is it red?", temperature=5.0, do_sample=False)]) == greedy
    assert any(plain.generate_until([asked("is it red?", temperature=5.0)]) != greedy for _ in range(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.2}, "keep_rate: choose from pretrained, .*image_keep_rate"),
        ({"dense": True, "image_keep_rate": 0.2}, "dense=True .* image_keep_rate"),
        ({"image_keep_rate": 1.5}, "image_keep_rate is 1.5"),
        ({"layer": 30}, "layer is 30: the decoder has 3 layers"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
    ],
)
def test_bad_arguments(checkpoint: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(checkpoint, **settings)


@pytest.mark.parametrize("settings", [{"image_keep_rate": 0.2}, {"image_policy": "learned"}])
def test_a_stock_checkpoint_has_no_predictors(stock_checkpoint: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no trained sparsifier"):
        model(stock_checkpoint, **settings)


def test_videos_are_refused(checkpoint: Path) -> None:
    plain = model(checkpoint)
    plain.task_dict = {"task": {"test": [["clip.mp4"]]}}
    with pytest.raises(ValueError, match="reads pictures, not str"):
        plain.generate_until([asked("what happens?")])


@pytest.mark.parametrize(("context", "longest"), [("is it red? " * 1000, 12), ("is it red?", 2048)])
def test_what_the_model_has_no_positions_for_is_refused_by_name(
    checkpoint: Path, context: str, longest: int
) -> None:
    requests = [asked("what?"), asked(context, 3, max_new_tokens=longest)]
    with pytest.raises(ValueError, match=r"^task, document 3: .* too many for the model's 2,048 positions"):
        model(checkpoint, batch_size=2).generate_until(requests)
