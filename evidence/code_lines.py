"""Count the code lines of the modules that one uniform prefill and one decoded token execute.

An attached tiny model is given a prompt with a picture and then one token, with the uniform policies. A
module counts, with all of its lines, if any of its functions ran meanwhile; so does the file of the model's
family, which may be data alone. Code lines are those with code on them: no docstrings, comments or blanks.

    python -m evidence.code_lines --base 2881a65 --output evidence/results/code-lines.json
"""

from __future__ import annotations

import argparse
import ast
import io
import shlex
import sys
import tokenize
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from evidence.revisions import ROOT, Side, checked_out, described, serve
from rich.console import Console
from rich.table import Table

import dynamic_llava
from dynamic_llava.files import write_json
from evidence import tiny

PACKAGE = Path(dynamic_llava.__file__).parent
TARGET = 300  # lines fewer than in the base
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


# One side: this process's library


@torch.inference_mode()
def executed() -> set[str]:
    """Prefill, decode one token; return the names of the library's modules whose functions ran."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            found.add(frame.f_globals.get("__name__", ""))

    model: Any = tiny.model()
    sparsifier: Any = tiny.sparsifier(image_policy="uniform", text_policy="uniform")
    prompt, token = tiny.row(5), torch.full((1, 1), 5)
    sparsifier.attach(model)
    sys.setprofile(note)
    try:
        cache = model(**prompt, use_cache=True).past_key_values
        model(token, past_key_values=cache, use_cache=True)
    finally:
        sys.setprofile(None)
    assert len(sparsifier.report.text_kept[0]) == 1, "no token was decoded"
    return {name for name in found if name.partition(".")[0] == "dynamic_llava"}


def code_lines(source: str) -> int:
    """Return how many lines of a file have code on them."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring, or one beside an attribute
                lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def count(_: str) -> dict[str, int]:
    """Return the code lines of each module that counts, by its path in the package."""
    family = PACKAGE / "families" / f"{tiny.model().config.model_type}.py"
    paths = {Path(sys.modules[name].__file__ or "") for name in executed()}
    paths |= {family} if family.is_file() else set()
    return {
        path.relative_to(PACKAGE).as_posix(): code_lines(path.read_text(encoding="utf-8"))
        for path in sorted(paths)
    }


# Both sides


def show(sides: dict[str, dict[str, int]]) -> Table:
    """Return the table of modules, a column each side."""
    table = Table("module", *sides)
    for name in sorted(set().union(*sides.values())):
        table.add_row(name, *(str(lines.get(name, "")) for lines in sides.values()))
    table.add_section()
    table.add_row("all", *(str(sum(lines.values())) for lines in sides.values()))
    return table


def main() -> int:
    """Count and print the table; with ``--base`` the exit code is 1 where the target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", metavar="REV", help=f"also count this commit; aims at {TARGET} lines fewer")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--serve", action="store_true", help="be the process of one side")
    options = parser.parse_args()
    if options.serve:
        serve(count)
        return 0
    result: dict[str, Any] = {}
    sides = {"now": counted(ROOT)}
    if options.base:
        with checked_out(options.base) as base:
            sides = {"base": counted(base), **sides}
        fewer = sum(sides["base"].values()) - sum(sides["now"].values())
        result = {"fewer": fewer, "target": TARGET, "reached": fewer >= TARGET}
    if options.output:
        command = "python -m evidence.code_lines " + shlex.join(sys.argv[1:])
        totals = {name: sum(lines.values()) for name, lines in sides.items()}
        commits = {"base": options.base, "now": described()}
        head = {"command": command, "commits": commits, "lines": totals, **result, "modules": sides}
        from dynamic_llava.environment import environment  # the base commit has none

        write_json(options.output, head | environment(torch.device("cpu")))
    Console(width=100).print(show(sides))
    if result:
        print(f"{result['fewer']} lines fewer; the target is {TARGET}")
    return int(not result.get("reached", True))


def counted(folder: Path) -> dict[str, int]:
    """Return what :func:`count` finds on one side."""
    with Side(folder, "evidence.code_lines", ["--serve"]) as side:
        lines: dict[str, int] = side.ask("")
    return lines


if __name__ == "__main__":
    sys.exit(main())
