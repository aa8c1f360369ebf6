"""Pictures with questions and answers: the easy-VQA set and scenes drawn by this project."""

from dynamic_llava.data.samples import Sample, Turn

__all__ = ["Sample", "Turn"]
