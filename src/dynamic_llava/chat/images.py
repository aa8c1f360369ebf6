"""Opens pictures: every file becomes an upright 8-bit RGB image, or one clear line says why it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dynamic_llava.files import check_input, first_line, one_line

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded; a small compressed file may hold any number of pixels."""

MAX_ASPECT = 100
"""Longest side over shortest side; processors scale the shortest side, so thin strips would grow huge."""

DRAWN, PHOTOGRAPH = ".png", ".jpg"
"""What bundled pictures of either kind end with."""

UNSUPPORTED_MODES = ("F", "LAB")
"""Floating-point pixels have no defined range, and Pillow cannot turn CIELAB into RGB."""


def open_image(path: str | Path) -> Image.Image:
    """Read a picture as a vision tower wants it: upright, 8-bit, RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit greys are scaled to 8 bits, and
    the first frame of an animation is taken.

    Parameters
    ----------
    path : str or Path
        A picture file in any format that Pillow reads.

    Returns
    -------
    PIL.Image.Image
        Mode ``RGB``, fully decoded; the file is closed.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ValueError
        The file is empty, broken, no picture, too large (`MAX_PIXELS`), too thin (`MAX_ASPECT`), or its
        pixels are of no supported kind (`UNSUPPORTED_MODES`).
    """
    path = Path(path)
    _check_file(path)
    return _decoded(path, path)


def read_image(data: bytes, name: str) -> Image.Image:
    """Read what a picture file holds, as `open_image` reads the file; ``name`` is what errors call it.

    Raises
    ------
    ValueError
        As in `open_image`.
    """
    return _decoded(BytesIO(data), name)


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of a picture file in memory; zeros where it is none: `read_image` says why.

    Raises
    ------
    ValueError
        It has so many pixels that Pillow does not even read its header.
    """
    try:
        with Image.open(BytesIO(data)) as header:
            return header.size
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large()) from error
    except Exception:  # a broken file may raise anything
        return 0, 0


def _decoded(source: Path | BytesIO, name: str | Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's limit is higher than ours; damage that matters raises
        with _explained(one_line(str(name))):
            image = Image.open(source)
        with image:
            return as_rgb(image, name)


def bundled() -> dict[str, Path]:
    """Return the files of the pictures that come with this package, by name; see also `is_drawn`."""
    folder = Path(str(files("dynamic_llava") / "assets"))
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (DRAWN, PHOTOGRAPH)}


def is_drawn(path: Path) -> bool:
    """Return whether a picture is a bundled one of drawn shapes."""
    found = bundled().get(path.stem)
    return found is not None and found.suffix == DRAWN and path.resolve() == found.resolve()


def as_rgb(image: Image.Image, name: str | Path | None = None) -> Image.Image:
    """Turn a picture that Pillow holds into what `open_image` makes of its file; twice is as once.

    Parameters
    ----------
    image : PIL.Image.Image
        A picture of any mode, perhaps not read to its end yet.
    name : str or Path, optional
        What errors call it; by default its file, or "the picture" where it has none.

    Raises
    ------
    ValueError
        The picture is broken, too large, too thin, or its pixels are of no supported kind.
    """
    name = one_line(str(name or getattr(image, "filename", "") or "the picture"))
    _check(name, image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _explained(name):
            return _to_rgb(ImageOps.exif_transpose(image))


def _check_file(path: Path) -> None:
    """Judge a file before it is opened."""
    check_input(path, "picture")
    if path.stat().st_size == 0:
        raise ValueError(f"{one_line(str(path))}: the picture file is empty; export or download it again")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what Pillow raises about a picture into one line."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {_too_large()}") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name}: broken picture, or not a picture that can be read; give a PNG, JPEG or WebP file"
        ) from error
    except Exception as error:  # broken data raises anything in Pillow's decoders
        reason = first_line(error)
        raise ValueError(f"{name}: the picture is broken ({reason}); export or download it again") from error


def _check(name: str, image: Image.Image) -> None:
    """Judge a picture by its header."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name}: {width} x {height} pixels: {_too_large()}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{name}: {width} x {height} pixels is thinner than 1:{MAX_ASPECT}; crop it")
    if image.mode in UNSUPPORTED_MODES:
        raise ValueError(f"{name}: pixels of mode {image.mode} are not supported; convert it to 8-bit RGB")


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 10**6} megapixels are refused; scale the picture down"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys, held by Pillow in 16 or 32 bits
        grey_HW = np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8)
        return Image.fromarray(grey_HW).convert("RGB")
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image  # Pillow knows no way on from La
        rgba = straight.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
