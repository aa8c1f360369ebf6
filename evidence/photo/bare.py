"""Takes answers one by one out of results before they are committed: beside them stand other people's texts.

    python -m evidence.photo.bare runs/photo/answers evidence/results/photo-flickr8k-dense.json

The results as they were go to the folder, the first argument; numbers, command and machine stay in the files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.evaluation import without_examples
from dynamic_llava.files import read_object, write_json


def bare(folder: Path, files: Sequence[Path]) -> None:
    """Keep each file whole in ``folder``, and leave it without its answers where it is."""
    for path in files:
        whole = read_object(path)
        lean = without_examples(whole)
        if lean != whole:  # a file that is bare already must not take the place of the whole one
            write_json(folder / path.name, whole)
            write_json(path, lean)


if __name__ == "__main__":
    bare(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
