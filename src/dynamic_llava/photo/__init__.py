"""``photo``, the small model that sees photographs: its parts, from installed packages."""

from dynamic_llava.photo.base import base_folder

__all__ = ["base_folder"]
