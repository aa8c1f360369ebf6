"""Write the table of supported models in docs/models.md, and their list in the README, from ``families/``.

    python -m evidence.models

Each row is what a family's own file says: its first line, and the kinds of pictures it takes. The text around
the table stays.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from dynamic_llava import families
from dynamic_llava.families.base import Family
from dynamic_llava.files import replacing

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- from python -m evidence.models -->", "<!-- end -->"
HEAD = "| `model_type` | family | takes |\n|-|-|-|\n"


def row(model_type: str) -> str:
    """Return the row of one family."""
    folder = Path(families.__file__).parent
    first = ast.get_docstring(ast.parse((folder / f"{model_type}.py").read_text(encoding="utf-8"))) or ""
    family: Family = families.family_of_type(model_type)
    kinds = " and ".join(f"{kind.modality}s" for kind in family.kinds) or "text"
    return f"| `{model_type}` | {first.splitlines()[0].rstrip('.').replace('``', '`')} | {kinds} |\n"


def table() -> str:
    """Return the table of all families."""
    return HEAD + "".join(row(model_type) for model_type in families.known())


def listed() -> str:
    """Return the names of all families, those that take pictures first."""
    kinds = {name: families.family_of_type(name).kinds for name in families.known()}
    parts = {
        "Pictures": [name for name in kinds if kinds[name]],
        "Text": [name for name in kinds if not kinds[name]],
    }
    return (
        "\n".join(f"{part}: {', '.join(f'`{name}`' for name in names)}.  " for part, names in parts.items())
        + "\n"
    )


MAKES: dict[str, Callable[[], str]] = {"docs/models.md": table, "README.md": listed}


def page(name: str) -> str:
    """Return a page as it should be now."""
    before, _, rest = (ROOT / name).read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{MAKES[name]()}{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write both pages."""
    for name in MAKES:
        written = page(name)
        with replacing(ROOT / name) as partial:
            partial.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
