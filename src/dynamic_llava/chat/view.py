"""Shows what a sparse context kept: the overlay of a picture and the output words with dropped K/V."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.text import Text
from torch import Tensor
from transformers import ProcessorMixin

from dynamic_llava.files import replacing

PANEL = 384
MARGIN = 16
CAPTION = 28
DROPPED_BRIGHTNESS = 0.22
# Viridis at equal steps (matplotlib, CC0): readable without colour vision, dark for low scores.
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def overlay(
    picture: Image.Image, seen: Image.Image, kept: Sequence[int], scores: Sequence[float]
) -> Image.Image:
    """Draw three panels: the picture, the kept patches, the scores of all patches.

    Parameters
    ----------
    picture : PIL.Image.Image
        The picture as the user gave it.
    seen : PIL.Image.Image
        The square picture as the vision tower saw it, see `as_seen`.
    kept : sequence of int
        Indices of the kept image tokens, row by row from the top left.
    scores : sequence of float
        One score for each image token; their number must be a square.

    Returns
    -------
    PIL.Image.Image
        RGB, three panels of `PANEL` pixels side by side with captions.

    Raises
    ------
    ValueError
        The number of scores is not a square number, so the tokens form no square grid of patches.
    """
    panels = (
        ("picture", _fit(picture)),
        (f"kept {len(kept)} of {len(scores)} image tokens", kept_panel(seen, kept, len(scores))),
        ("score: low (dark) to high (bright)", _score_panel(seen, scores)),
    )
    sheet = Image.new("RGB", (MARGIN + len(panels) * (PANEL + MARGIN), PANEL + CAPTION + 2 * MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (caption, panel) in enumerate(panels):
        left = MARGIN + number * (PANEL + MARGIN)
        sheet.paste(panel, (left, MARGIN))
        canvas.rectangle((left - 1, MARGIN - 1, left + PANEL, MARGIN + PANEL), outline=(170, 170, 170))
        canvas.text((left, MARGIN + PANEL + 8), caption, fill=(40, 40, 40), font=ImageFont.load_default(17))
    return sheet


def kept_panel(seen: Image.Image, kept: Sequence[int], tokens: int) -> Image.Image:
    """Draw the picture as the tower saw it, `PANEL` pixels a side, with patches that were dropped dimmed.

    Parameters
    ----------
    seen, kept
        As in `overlay`.
    tokens : int
        The picture's image tokens.

    Raises
    ------
    ValueError
        As in `overlay`.
    """
    side = _side(tokens)
    brightness_I = np.full(tokens, DROPPED_BRIGHTNESS)
    brightness_I[list(kept)] = 1.0
    rgb_HWC = np.asarray(_large(seen)) * _grid(brightness_I, side)[..., None]
    return Image.fromarray(rgb_HWC.round().astype(np.uint8))


def save_overlay(sheet: Image.Image, path: Path) -> None:
    """Write an overlay as PNG; a failed write leaves no file behind."""
    with replacing(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)


def as_seen(processor: ProcessorMixin, pixel_values_CHW: Tensor) -> Image.Image:
    """Undo the image processor's normalisation: the picture that the vision tower got, RGB."""
    images = processor.image_processor
    mean, std = np.array(images.image_mean), np.array(images.image_std)
    rgb_HWC = pixel_values_CHW.float().cpu().numpy().transpose(1, 2, 0) * std + mean
    return Image.fromarray((rgb_HWC.clip(0, 1) * 255).round().astype(np.uint8))


def pieces(processor: ProcessorMixin, token_ids: Sequence[int]) -> list[str]:
    """Return the text that each output token adds; special tokens add nothing."""
    ends = [
        len(processor.decode(token_ids[:end], skip_special_tokens=True)) for end in range(len(token_ids) + 1)
    ]
    text = processor.decode(token_ids, skip_special_tokens=True)
    return [text[start:end] for start, end in pairwise(ends)]


def runs(parts: Sequence[str], kept: Sequence[bool]) -> list[tuple[bool, str]]:
    """Join the pieces of an answer into runs: whether their K/V was dropped, and their words.

    ``kept`` may be one shorter than ``parts``: the last output token is never fed back, so nothing decides.
    """
    dropped = [number < len(kept) and not kept[number] for number in range(len(parts))]
    return [
        (is_dropped, "".join(part for _, part in run))
        for is_dropped, run in groupby(zip(dropped, parts, strict=True), key=itemgetter(0))
    ]


def marked(parts: Sequence[str], kept: Sequence[bool], plain: bool = False) -> Text:
    """Join the pieces of an answer, see `runs`; strike those whose K/V was dropped.

    Where the output has no styles, ``plain`` puts dropped words between ``~~`` instead.
    """
    text = Text()
    for is_dropped, words in runs(parts, kept):
        body = words.lstrip(" ")
        text.append(" " * (len(words) - len(body)))
        if is_dropped and plain and body:
            text.append(f"~~{body}~~")
        else:
            text.append(body, style="dim strike" if is_dropped else "")
    text.rstrip()
    return text


def _fit(picture: Image.Image) -> Image.Image:
    scale = PANEL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    panel = Image.new("RGB", (PANEL, PANEL), "white")
    panel.paste(
        picture.resize(size, Image.Resampling.LANCZOS), ((PANEL - size[0]) // 2, (PANEL - size[1]) // 2)
    )
    return panel


def _side(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} image tokens form no square grid; only one square picture can be drawn")
    return side


def _large(seen: Image.Image) -> Image.Image:
    return seen.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def _score_panel(seen: Image.Image, scores: Sequence[float]) -> Image.Image:
    side = _side(len(scores))
    # Ranks, not raw values: a few extreme scores would otherwise flatten the rest of the map.
    rank_I = np.argsort(np.argsort(np.array(scores))) / max(1, len(scores) - 1)
    stops = np.linspace(0, 1, len(VIRIDIS))
    heat_HWC = np.stack(
        [np.interp(_grid(rank_I, side), stops, [stop[channel] for stop in VIRIDIS]) for channel in range(3)],
        axis=-1,
    )
    grey_HW1 = np.asarray(_large(seen).convert("L"))[..., None]
    return Image.fromarray((0.7 * heat_HWC + 0.3 * grey_HW1).round().astype(np.uint8))


def _grid(values_I: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Spread one value per patch over the pixels of a panel."""
    patch_of_pixel = np.arange(PANEL) * side // PANEL
    return values_I.reshape(side, side)[patch_of_pixel[:, None], patch_of_pixel[None, :]]
