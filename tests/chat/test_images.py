"""Every picture becomes upright 8-bit RGB, or one line says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynamic_llava.chat import images
from dynamic_llava.chat.images import open_image, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def missing(folder: Path) -> Path:
    return folder / "missing.png"


def empty(folder: Path) -> Path:
    path = folder / "empty.png"
    path.touch()
    return path


def broken(folder: Path) -> Path:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise_HWC), folder / "broken.png")
    path.write_bytes(path.read_bytes()[:3000])
    return path


def no_picture(folder: Path) -> Path:
    path = folder / "notes.png"
    path.write_text("these are notes, not a picture")
    return path


def huge(folder: Path) -> Path:
    return saved(Image.new("1", (10_000, 10_001)), folder / "huge.png")


def bomb(folder: Path) -> Path:
    return saved(Image.new("1", (20_000, 10_000)), folder / "bomb.png")  # Pillow itself refuses this one


def thin(folder: Path) -> Path:
    return saved(Image.new("RGB", (1001, 10)), folder / "thin.png")


def directory(folder: Path) -> Path:
    return folder


def floating(folder: Path) -> Path:
    return saved(Image.new("F", (8, 8)), folder / "floating.tiff")


def lab(folder: Path) -> Path:
    return saved(Image.new("LAB", (8, 8)), folder / "lab.tiff")


BAD_PICTURES: list[tuple[Callable[[Path], Path], type[Exception], str]] = [
    (missing, FileNotFoundError, "no such picture"),
    (empty, ValueError, "is empty"),
    (broken, ValueError, "is broken"),
    (no_picture, ValueError, "not a picture"),
    (huge, ValueError, "10000 x 10001 pixels: more than 64 megapixels"),
    (bomb, ValueError, "more than 64 megapixels"),
    (thin, ValueError, "thinner than 1:100"),
    (directory, ValueError, "is not a file"),
    (floating, ValueError, "mode F are not supported"),
    (lab, ValueError, "mode LAB are not supported"),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD_PICTURES)
def test_bad_picture(
    make: Callable[[Path], Path], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp", "bmp", "ppm"])
def test_damaged_files_are_read_or_refused(suffix: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    noise_HWC = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise_HWC), tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"damaged.{suffix}"
    refused = 0
    for _ in range(150):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[generator.integers(0, min(len(damaged), 200), 4)] = generator.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes()[: int(generator.integers(1, len(whole) + 1))])
        try:
            assert open_image(path).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017  # either outcome is right
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("RGB", (8, 8), RED), "png", RED),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), "png", RED),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "png", WHITE),
        (Image.new("RGBA", (8, 8), (0, 0, 0, 127)), "png", (128, 128, 128)),
        (Image.new("LA", (8, 8), (0, 0)), "png", WHITE),
        (Image.new("RGB", (8, 8), RED).quantize(4), "png", RED),
        (Image.new("L", (8, 8), 77), "png", (77, 77, 77)),
        (Image.new("1", (8, 8), 1), "png", WHITE),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tiff", RED),
        (Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16)), "png", (77, 77, 77)),
        (Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)), "tiff", WHITE),
        (Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.int32)), "tiff", (77, 77, 77)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_modes(image: Image.Image, suffix: str, expected: tuple[int, int, int], tmp_path: Path) -> None:
    opened = open_image(saved(image, tmp_path / f"picture.{suffix}"))
    assert (opened.mode, opened.size) == ("RGB", (8, 8))
    assert opened.getpixel((3, 3)) == expected


def test_transparent_palette_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    opened = open_image(saved(image, tmp_path / "palette.png", transparency=0))
    assert opened.getpixel((0, 0)) == WHITE


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "print.jpg", quality=100)
    red, green, blue = open_image(path).getpixel((8, 8))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    turned_back = {
        1: (), 2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,), 5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,), 7: (Image.Transpose.TRANSVERSE,), 8: (Image.Transpose.ROTATE_270,),
    }  # fmt: skip
    upright = Image.new("RGB", (12, 8), WHITE)
    upright.putpixel((0, 0), RED)  # one corner marks all eight orientations
    upright.putpixel((1, 0), RED)
    stored = upright
    for step in turned_back[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(stored, tmp_path / "turned.png", exif=exif))
    assert opened.size == (12, 8)
    assert opened.tobytes() == upright.tobytes()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    path = saved(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == RED


def test_file_is_closed(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (8, 8), RED), tmp_path / "picture.png")
    image = open_image(path)
    path.unlink()
    assert image.getpixel((7, 7)) == RED


def test_bytes_are_read_as_their_file_is(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (4, 6), RED), tmp_path / "red.png")
    assert read_image(path.read_bytes(), "picture 1").tobytes() == open_image(path).tobytes()
    for data in (b"", b"<svg/>", path.read_bytes()[:40]):
        with pytest.raises(ValueError, match=r"^picture 1: "):
            read_image(data, "picture 1")


def test_each_bundled_picture_names_its_licence_and_drawn_ones_are_told_from_photographs(
    tmp_path: Path,
) -> None:
    pictures = images.bundled()
    text = (pictures["scene-1"].parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in text for path in pictures.values())
    drawn = {name for name, path in pictures.items() if images.is_drawn(path)}
    assert drawn == {"easy-vqa-1", "easy-vqa-2", "scene-1", "scene-2"}
    assert pictures.keys() - drawn == {"astronaut", "chelsea", "coffee", "rocket"}
    assert all(path.stat().st_size < 30_000 for path in pictures.values())
    assert not images.is_drawn(tmp_path / "scene-1.png")
