"""``photo``, the small model that sees photographs: its parts, and what training changed in them."""

from dynamic_llava.photo.base import base_folder
from dynamic_llava.photo.trained import is_installed, trained_folder

__all__ = ["base_folder", "is_installed", "trained_folder"]
