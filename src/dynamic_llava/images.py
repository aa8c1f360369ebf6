"""Opens pictures: every file becomes an upright 8-bit RGB image, or one clear line says why it cannot."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded; a small compressed file may hold any number of pixels."""

MAX_ASPECT = 100
"""Longest side over shortest side; processors scale the shortest side, so thin strips would grow huge."""


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
        The file is empty, broken, no picture, too large (`MAX_PIXELS`), too thin (`MAX_ASPECT`), or holds
        floating-point pixels, whose range is not defined.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such picture; check the path")
    if not path.is_file():
        raise ValueError(f"{path}: is not a file; give the path of one picture")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the picture file is empty; export or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged by our own, lower limit
            with Image.open(path) as image:
                _check_size(path, image.width, image.height)
                image.load()
                return _to_rgb(path, ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {_too_large()}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture that can be read; give a PNG, JPEG or WebP file") from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow reports broken data as any of these
        raise ValueError(f"{path}: the picture is broken ({error}); export or download it again") from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path}: {width} x {height} pixels: {_too_large()}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{path}: {width} x {height} pixels is thinner than 1:{MAX_ASPECT}; crop it")


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 10**6} megapixels are refused; scale the picture down"


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"{path}: floating-point pixels have no defined range; convert it to 8-bit RGB")
    if image.mode.startswith("I"):  # 16-bit greys, held by Pillow in 16 or 32 bits
        grey_HW = np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8)
        return Image.fromarray(grey_HW).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
