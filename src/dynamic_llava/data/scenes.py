"""Scenes drawn by this project: two to six objects on a 3 x 3 layout, with questions and a long description.

A scene is a pure function of (index, split). Held-out scenes use other seeds *and* other layouts: every
occupancy pattern of the nine cells belongs to exactly one split, so no held-out layout is ever trained on.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

from PIL import Image, ImageColor, ImageDraw

from dynamic_llava.data.samples import Sample, Turn

Split = Literal["train", "heldout"]
Point = tuple[float, float]

SIDE = 96
CELL = SIDE // 3
SUPERSAMPLING = 3
SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
RADII = {"small": (5.0, 6.5), "large": (10.0, 12.0)}
POSITIONS = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
DESCRIBE = "Describe the picture in detail."
RELATIONS = ("to the left of", "to the right of", "above", "below")


@dataclass(frozen=True)
class Thing:
    """One drawn object: what it is, its cell (0 to 8, row by row), centre and radius in pixels."""

    shape: str
    color: str
    size: str
    cell: int
    center: Point
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape: unique within a scene."""
        return f"{self.color} {self.shape}"

    @property
    def position(self) -> str:
        """The cell in words."""
        return POSITIONS[self.cell]

    def outline(self, scale: float) -> list[Point]:
        """Corners of the polygon that is drawn, in pixels times ``scale``."""
        x, y, r = (value * scale for value in (*self.center, self.radius))
        angles, reach = _CORNERS[self.shape]
        return [
            (x + r * f * math.cos(math.radians(a)), y + r * f * math.sin(math.radians(a)))
            for a, f in zip(angles, reach, strict=True)
        ]


_CORNERS: dict[str, tuple[list[float], list[float]]] = {
    "circle": ([i * 10.0 for i in range(36)], [1.0] * 36),
    "square": ([45.0, 135.0, 225.0, 315.0], [1.2] * 4),
    "triangle": ([-90.0, 30.0, 150.0], [1.15] * 3),
    "star": ([-90.0 + 36.0 * i for i in range(10)], [1.2, 0.5] * 5),
}


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a plain light background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    def draw(self) -> Image.Image:
        """Render the picture: RGB, 96 x 96 pixels."""
        size = SIDE * SUPERSAMPLING
        image = Image.new("RGB", (size, size), self.background)
        canvas = ImageDraw.Draw(image)
        for thing in self.things:
            canvas.polygon(thing.outline(SUPERSAMPLING), fill=ImageColor.getrgb(thing.color))
        return image.resize((SIDE, SIDE), Image.Resampling.BOX)

    @cached_property
    def description(self) -> str:
        """The one right description: every object in reading order, each compared with the one before."""
        sentences = [f"The picture shows {NUMBERS[len(self.things)]} objects on a light background."]
        for previous, thing in zip((None, *self.things), self.things, strict=False):
            sentence = f"In the {thing.position} there is a {thing.size} {thing.color} {thing.shape}"
            if previous is not None:
                sentence += f", which is {_compare(thing, previous)} the {previous.name}"
                sentence += f" and {_place(thing, previous)} it"
            sentences.append(sentence + ".")
        shapes = Counter(thing.shape for thing in self.things)
        large = sum(thing.size == "large" for thing in self.things)
        listed = _join([f"{NUMBERS[shapes[s]]} {_plural(s, shapes[s])}" for s in SHAPES if shapes[s]])
        sizes = f"{NUMBERS[large]} large and {NUMBERS[len(self.things) - large]} small"
        sentences.append(f"In total that is {listed}: {sizes}.")
        return " ".join(sentences)


def layouts(split: Split) -> list[tuple[int, ...]]:
    """Return the occupancy patterns of a split: a fifth of all patterns, evenly spaced, is held out."""
    patterns = [cells for n in range(2, 7) for cells in combinations(range(9), n)]
    return [cells for i, cells in enumerate(patterns) if (i % 5 == 2) == (split == "heldout")]


_LAYOUTS: dict[Split, dict[int, list[tuple[int, ...]]]] = {
    split: {n: [cells for cells in layouts(split) if len(cells) == n] for n in range(2, 7)}
    for split in ("train", "heldout")
}


def scene(index: int, split: Split) -> Scene:
    """Draw up scene number ``index`` of a split; the same arguments always give the same scene."""
    rng = random.Random(f"scene-{split}-{index}")
    cells = rng.choice(_LAYOUTS[split][rng.randint(2, 6)])
    pairs = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], len(cells))
    things = tuple(_thing(rng, shape, color, cell) for (shape, color), cell in zip(pairs, cells, strict=True))
    red, green, blue = (rng.randint(230, 255) for _ in range(3))
    return Scene(things, (red, green, blue))


def make(index: int, split: Split, rounds: int = 1, place_rounds: int = 0) -> Sample:
    """Return scene number ``index`` with ``rounds`` questions of each kind and the request to describe it.

    ``place_rounds`` adds as many questions of each kind that asks for a place: position and relation.
    """
    drawn = scene(index, split)
    rng = random.Random(f"questions-{split}-{index}")
    asked = [ask(rng, drawn.things) for ask in _QUESTIONS * rounds + _PLACE_QUESTIONS * place_rounds]
    turns = (*asked, Turn(DESCRIBE, drawn.description, "description"))
    return Sample(f"scenes/{split}/{index}", drawn.draw, turns)


def _thing(rng: random.Random, shape: str, color: str, cell: int) -> Thing:
    size = rng.choice(("small", "large"))
    radius = rng.uniform(*RADII[size])
    slack = CELL / 2 - radius * 1.2
    row, column = divmod(cell, 3)
    center = (
        (column + 0.5) * CELL + rng.uniform(-slack, slack) * 0.8,
        (row + 0.5) * CELL + rng.uniform(-slack, slack) * 0.8,
    )
    return Thing(shape, color, size, cell, center, radius)


def _compare(thing: Thing, other: Thing) -> str:
    if thing.size == other.size:
        return "as large as"
    return "larger than" if thing.size == "large" else "smaller than"


def _place(thing: Thing, other: Thing) -> str:
    (row, column), (other_row, other_column) = divmod(thing.cell, 3), divmod(other.cell, 3)
    vertical = ["above"] * (row < other_row) + ["below"] * (row > other_row)
    horizontal = ["to the left of"] * (column < other_column) + ["to the right of"] * (column > other_column)
    return " and ".join(vertical + horizontal)


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def _ask_count(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    asked = rng.choice(("objects", "color", "shape", "size"))
    if asked == "objects":
        return Turn("How many objects are there?", NUMBERS[len(things)], "count")
    if asked == "color":
        color = _present_or_any(rng, [thing.color for thing in things], COLORS)
        count = sum(thing.color == color for thing in things)
        return Turn(f"How many {color} objects are there?", NUMBERS[count], "count")
    if asked == "size":
        size = rng.choice(("large", "small"))
        count = sum(thing.size == size for thing in things)
        return Turn(f"How many {size} objects are there?", NUMBERS[count], "count")
    shape = _present_or_any(rng, [thing.shape for thing in things], SHAPES)
    count = sum(thing.shape == shape for thing in things)
    return Turn(f"How many {shape}s are there?", NUMBERS[count], "count")


def _ask_color(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    thing = rng.choice(things)
    alone = sum(other.shape == thing.shape for other in things) == 1
    where = thing.shape if alone and rng.random() < 0.5 else f"object in the {thing.position}"
    return Turn(f"What color is the {where}?", thing.color, "color")


def _ask_shape(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    thing = rng.choice(things)
    alone = sum(other.color == thing.color for other in things) == 1
    where = f"{thing.color} object" if alone and rng.random() < 0.5 else f"object in the {thing.position}"
    return Turn(f"What shape is the {where}?", thing.shape, "shape")


def _ask_size(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    thing = rng.choice(things)
    return Turn(f"Is the {thing.name} large or small?", thing.size, "size")


def _ask_position(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    thing = rng.choice(things)
    return Turn(f"Where is the {thing.name}?", thing.position, "position")


def _ask_relation(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    thing, other = rng.sample(things, 2)
    held = _place(thing, other).split(" and ")
    # Only directions in which the two differ are asked for, so that the answer never hangs on a few pixels.
    horizontal = any(relation in held for relation in RELATIONS[:2])
    vertical = any(relation in held for relation in RELATIONS[2:])
    relation = rng.choice(RELATIONS[:2] * horizontal + RELATIONS[2:] * vertical)
    answer = "yes" if relation in held else "no"
    return Turn(f"Is the {thing.name} {relation} the {other.name}?", answer, "relation")


def _ask_exists(rng: random.Random, things: tuple[Thing, ...]) -> Turn:
    names = [thing.name for thing in things]
    if rng.random() < 0.5:
        return Turn(f"Is there a {rng.choice(names)}?", "yes", "exists")
    # A colour and a shape that are both there, but not together, where the scene allows it.
    crossed = [f"{a.color} {b.shape}" for a in things for b in things]
    absent = [name for name in crossed if name not in names]
    anything = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    absent = absent or [name for name in anything if name not in names]
    return Turn(f"Is there a {rng.choice(absent)}?", "no", "exists")


def _present_or_any(rng: random.Random, present: list[str], names: tuple[str, ...]) -> str:
    return rng.choice(present) if rng.random() < 0.75 else rng.choice(names)


_QUESTIONS: tuple[Callable[[random.Random, tuple[Thing, ...]], Turn], ...] = (
    _ask_count, _ask_color, _ask_shape, _ask_size, _ask_position, _ask_relation, _ask_exists,
)  # fmt: skip
_PLACE_QUESTIONS = (_ask_position, _ask_relation)
