"""Count how often vLLM with the plugin answers as ``generate`` does alone, and whether its blocks add up.

Requests to nano with 0 to 3 pictures, long and short, of which some have keep rates of their own and some are
dense, arrive a few before each step; some are aborted. Once in ample memory, once in so little that requests
are preempted, with chunks of 256 tokens; with Model Runner V1 and with V2, whose kernels run in Triton's
interpreter. Greedy, float32.

Ten minutes on two cores, in the environment of make check-vllm, with .ci/vllm in PYTHONPATH:

    python -m evidence.serving_equivalence --output evidence/results/serving-equivalence.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dynamic_llava
from dynamic_llava.checkpoints import Source, resolve
from evidence import serving_cases

MODULE = "serving_equivalence"
AMPLE = {"kv_cache_memory_bytes": 128 << 20}
TIGHT = {"kv_cache_memory_bytes": 12 << 20, "max_model_len": 704, "max_num_batched_tokens": 256}
CASES = {"ample, v1": AMPLE, "tight, v1": TIGHT, "ample, v2": AMPLE, "tight, v2": TIGHT}
FORMULA = ("formula, v1", "formula, v2")
LAYERS, FIRST_SPARSE, GROUP = 8, 2, 2  # of nano; vLLM makes groups of the fewest layers of a kind


def references(folder: Path, count: int) -> list[Any]:
    """Return the lone answers to the requests, computed once for all cases."""
    from evidence import serving_engine

    file = folder / "alone.json"
    if not file.exists():
        model, processor = dynamic_llava.load("nano", dtype=torch.float32)
        found = [serving_engine.alone(model, processor, asked) for asked in requests(count)]
        file.write_text(json.dumps([asdict(answer) for answer in found]))
    return [serving_engine.Alone(**entry) for entry in json.loads(file.read_text())][:count]


def requests(count: int) -> list[Any]:
    """Return the requests: the first ``count`` of always the same ones."""
    from evidence import serving_engine

    return serving_engine.mixed(Source("nano").processor, count)


def compare(case: str, folder: Path, count: int) -> dict[str, Any]:
    """Serve the requests together, and compare each answer with its lone one."""
    from evidence import serving_engine

    alone, asked = references(folder, count), requests(count)
    aborted = [number for number, answer in enumerate(alone) if len(answer.tokens) > 10][2:42:10][:4]
    with serving_engine.engine(resolve("nano"), **CASES[case]) as llm:
        run = serving_engine.serve(llm, asked, each=3, aborted=aborted)
    expected = {number: answer.tokens for number, answer in enumerate(alone) if number not in aborted}
    wrong = [number for number, tokens in expected.items() if run.answers.get(number) != tokens]
    counts = {name: value for name, value in asdict(run).items() if name not in ("answers", "kept")}
    return {
        "equal": len(expected) - len(wrong),
        "of": len(expected),
        "different": wrong,
        "aborted": 4,
    } | counts


def add_up(folder: Path, count: int) -> dict[str, Any]:
    """Serve each request alone, and compare the most blocks that it held with the formula."""
    from evidence import serving_engine

    alone, asked = references(folder, count), requests(count)
    wrong, dense, held = [], 0, 0
    with serving_engine.engine(resolve("nano")) as llm:
        for number, (answer, request) in enumerate(zip(alone, asked, strict=True)):
            run = serving_engine.serve(llm, [request])
            blocks = serving_engine.block_formula(answer, LAYERS, FIRST_SPARSE, GROUP)
            if (run.peak_blocks, run.blocks_left, run.entries_left) != (blocks, 0, 0):
                wrong.append(number)
            held += blocks
            fed = answer.prompt + len(answer.tokens) - 1
            dense += LAYERS // GROUP * -(-fed // serving_engine.BLOCK)
    return {
        "equal": count - len(wrong),
        "of": count,
        "different": wrong,
        "blocks": held,
        "blocks_dense": dense,
    }


def main() -> int:
    """Run all cases; the exit code is 1 if any answer or count differs."""
    parser = serving_cases.parser(__doc__)
    parser.add_argument("--requests", type=int, default=200, help="of each case with Model Runner V1")
    parser.add_argument("--requests-v2", type=int, default=60, help="of each case with Model Runner V2")
    options = parser.parse_args()
    counts = {"requests": options.requests, "requests-v2": options.requests_v2}
    if options.case:
        count = options.requests_v2 if "v2" in options.case else options.requests
        if options.case in FORMULA:
            print(json.dumps(add_up(options.folder, max(1, count // 4))))
        else:
            print(json.dumps(compare(options.case, options.folder, count)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        numbers = {
            case: serving_cases.run_one(MODULE, case, Path(folder), counts) for case in (*CASES, *FORMULA)
        }
    serving_cases.write(MODULE, options.output, numbers)
    return int(any(case["different"] for case in numbers.values()))


if __name__ == "__main__":
    sys.exit(main())
