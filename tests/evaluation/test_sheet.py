"""The contact sheet: pictures drawn by chance, one question of each, what was kept, both answers."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.chat.asking import ask, dense
from dynamic_llava.evaluation import sheet
from dynamic_llava.evaluation.tasks import Question

SIDE = 12  # patches of nano's pictures


def question(number: int, text: str = "What is <this> & that?") -> Question:
    picture = Image.new("RGB", (96, 96), ("red", "green", "blue")[number % 3])
    return Question(lambda: picture, text, "A wall.", "short", name=f"{number}", picture=f"{number}.png")


def test_one_question_of_each_picture_is_drawn_by_chance_and_always_the_same() -> None:
    questions = [question(number, text) for number in range(100) for text in ("first", "second")]
    drawn = sheet.chosen(questions)
    assert len({found.name for found in drawn}) == sheet.PICTURES
    assert {found.text for found in drawn} == {"first"}
    assert [found.name for found in drawn] == [found.name for found in sheet.chosen(questions)]
    assert [int(found.name) for found in drawn] != sorted(int(found.name) for found in drawn)
    assert len(sheet.chosen(questions[:4])) == 2


def test_a_sheet_shows_what_the_model_says_and_keeps(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    asked = [question(number) for number in range(3)]
    sheet.write(tmp_path / "sheet.html", model, processor, asked, 12, "What <it> does")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.html"]
    html = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "What &lt;it&gt; does" in html
    assert html.count("What is &lt;this&gt; &amp; that?") == html.count("<article>") == 3
    first = sheet.chosen(asked)[0]
    with dense(model):
        without = ask(model, processor, first.text, [first.open_image()], 12)
    reply = ask(model, processor, first.text, [first.open_image()], 12)
    article = html[html.index("<article>") : html.index("</article>")]
    dense_answer, sparse_answer = re.findall(r"<dd>(.*?)</dd>", article)
    assert dense_answer == without.text
    assert re.sub("</?s>", "", sparse_answer).strip() == reply.text
    assert ("<s>" in sparse_answer) == (not reply.report.text_kept[0].all())
    kept, tokens = len(reply.report.image_kept[0]), SIDE * SIDE
    assert f"kept {kept} of {tokens} image tokens" in article
    pictures = [
        np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("L"), dtype=float)
        for data in re.findall(r"base64,([^\"]+)", article)
    ]
    lit = pictures[1].reshape(SIDE, 32, SIDE, 32).mean((1, 3)) > 0.6 * pictures[0].mean()
    assert np.flatnonzero(lit).tolist() == reply.report.image_kept[0].tolist()


def test_a_model_that_keeps_all_image_tokens_is_shown_whole(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    model.sparsifier.config.sparsify_image = False
    (entry,) = sheet.entries(model, processor, [question(0)], 4)
    assert len(entry.kept.getcolors()) == 1  # as the picture: nothing is dimmed


def test_a_dense_model_is_refused(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, tmp_path: Path
) -> None:
    model.sparsifier.detach()
    with pytest.raises(ValueError, match="the model answers dense alone"):
        sheet.write(tmp_path / "sheet.html", model, processor, [question(0)], 4, "none")
