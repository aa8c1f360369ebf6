"""Files ``g_*``: pictures before the vision tower, padded to a square or cropped to one.

Legend: S picture size.
"""

from __future__ import annotations

from PIL import Image

from dynamic_llava.checkpoints import Source
from dynamic_llava.checkpoints.official.processor import build_image_processor
from dynamic_llava.verification.comparison import Comparison
from dynamic_llava.verification.files import GoldenFile
from dynamic_llava.verification.subject import Subject

PIXEL_TOLERANCE = 1e-5


def check_pictures(subject: Subject, file: GoldenFile, comparison: Comparison) -> None:
    """Compare the pixel values ``[1, 3, S, S]`` of each raw picture."""
    source = Source(file.checkpoint)
    folder = source.tower.folder if source.tower else source.folder
    for way in ("pad", "square"):
        processor = build_image_processor(
            source.raw | {"image_aspect_ratio": way}, subject.model.config.vision_config, folder
        )
        for number in (key.removeprefix("raw") for key in file.starting("raw")):
            picture = Image.fromarray(file[f"raw{number}"].numpy())
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            comparison.close(f"{way}{number}", pixels, PIXEL_TOLERANCE)
