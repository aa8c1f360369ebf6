"""Tab completion finds the public names, though most are imported at their first use."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import dynamic_llava

PACKAGES = ["dynamic_llava", "dynamic_llava.chat", "dynamic_llava.methods"]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_listed_and_there(package: str) -> None:
    module = importlib.import_module(package)
    listed = dir(module)
    assert set(module.__all__) <= set(listed)
    assert [name for name in listed if not name.startswith("__")] == sorted(
        name for name in module.__all__ if not name.startswith("__")
    )
    assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_listing_imports_nothing_heavy() -> None:
    code = "import sys, dynamic_llava as d; d.__version__, dir(d); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_version() -> None:
    assert dynamic_llava.__version__ == importlib.metadata.version("dynamic-llava")
