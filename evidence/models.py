"""Write the table of supported models in docs/models.md from the files of ``families/``.

    python -m evidence.models

Each row is what a family's own file says: its first line, and the kinds of pictures it takes. The text around
the table stays.
"""

from __future__ import annotations

import ast
from pathlib import Path

from dynamic_llava import families
from dynamic_llava.families.base import Family
from dynamic_llava.files import replacing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m evidence.models -->", "<!-- end of the table -->"
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


def page(text: str) -> str:
    """Return the page with the table of now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


def main() -> None:
    """Write the page."""
    written = page(PAGE.read_text(encoding="utf-8"))
    with replacing(PAGE) as partial:
        partial.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
