"""SmolVLM: tiles as in Idefics3; each frame of a video is a tile too."""

from dynamic_llava.families.idefics3 import FAMILY

__all__ = ["FAMILY"]
