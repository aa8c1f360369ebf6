"""What the core costs against an earlier commit: the same calls, in two processes that take turns.

A round starts one process with the library of the base commit and one with that of the working tree: same
interpreter, same models, same inputs. For each case they run in turn, A B B A, several times after a warm-up;
the round's result is the median of new time / base time over the pairs. A case's result is the median over
the rounds, with its 95 % bootstrap interval.

Time is CPU time of the process, and torch has one thread: these cases wait for nothing, so that is how long
they take, and what else the machine does is not counted. Turns are a second at most: what disturbs one
process then disturbs the other. ``nano`` has so little to compute that work on the host shows; the random
model is large enough that a decoded token is mostly computing. The learned policy drops output tokens in all
cases. 20 minutes on two cores that do nothing else:

    python -m evidence.overhead --output evidence/results/overhead.json
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evidence.revisions import BASE, ROOT, Side, checked_out, described, serve
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import dynamic_llava
from dynamic_llava import Sparsifier, SparsityConfig
from dynamic_llava.files import write_json

CASES = [
    f"{model}: {case}"
    for model in ("nano", "random")
    for case in ("prefill", "decode, batch 1", "decode, batch 8", "decode, static", "generate")
]
TEXT, NEW = 40, 24  # tokens of a prompt beside its picture, tokens of an answer
RUNS = 6  # of each case and side in a round, the first of them to warm up
TARGET, HOST_TARGET = 1.03, 1.05  # for the upper end of the interval; where only work on the host counts
DRAWS = 10_000  # of the bootstrap


# One side: this process's library


@dataclass(frozen=True)
class Case:
    """What is timed, and of how many steps it consists."""

    work: Callable[[], object]
    steps: int = 1

    def seconds(self) -> float:
        """Run once; return the CPU time of a step."""
        start = time.process_time()
        self.work()
        return (time.process_time() - start) / self.steps


def random_model() -> Any:
    """Return an attached model of 12 layers and 44 million weights; pictures have 576 tokens."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=96,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=3, image_seq_length=576)
    model: Any = LlavaForConditionalGeneration(config).eval()
    # As saved configs name them, which every commit reads.
    predictor = {"d_model": 128, "nhead": 4, "dim_feedforward": 512}
    sparsifier = Sparsifier(SparsityConfig.from_dict(predictor), hidden_size=512).eval()
    for parameter in sparsifier.parameters():
        if parameter.ndim > 1:  # wide, so that decisions are mixed
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    sparsifier.attach(model)
    return model


def inputs(model: Any, rows: int) -> dict[str, Tensor]:
    """Return prompts of one picture each, all of the same length."""
    generator = torch.Generator().manual_seed(rows)
    config = model.config
    text = torch.randint(5, config.text_config.vocab_size, (rows, TEXT), generator=generator)
    picture = torch.full((rows, config.image_seq_length), config.image_token_id)
    ids = torch.cat([text[:, :1], picture, text[:, 1:]], dim=1)
    side = config.vision_config.image_size
    pixels = torch.randn(rows, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def cases(model: Any) -> Iterator[tuple[str, Case]]:
    """Yield what is timed, by name; decoding goes on where its last run ended."""
    one, eight = inputs(model, 1), inputs(model, 8)

    def prefill(given: dict[str, Tensor], cache: Any = None) -> Any:
        return model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def generate(given: dict[str, Tensor]) -> Tensor:
        tokens: Tensor = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        return tokens[:, -NEW:]

    def decode(given: dict[str, Tensor], static: bool = False) -> Case:
        capacity = given["input_ids"].shape[1] + NEW * RUNS
        past = prefill(given, model.sparsifier.new_cache(capacity, static=True) if static else None)
        fed_TB1 = generate(given).T[:, :, None]

        def steps() -> None:
            for token_B1 in fed_TB1:
                model(input_ids=token_B1, past_key_values=past, use_cache=True, logits_to_keep=1)

        return Case(steps, NEW)

    yield "prefill", Case(lambda: prefill(one))
    yield "decode, batch 1", decode(one)
    yield "decode, batch 8", decode(eight)
    yield "decode, static", decode(one, static=True)
    yield "generate", Case(lambda: generate(one))


class Measured:
    """The cases of this process's library, by name; models are made when they are first asked for."""

    def __init__(self) -> None:
        self._cases: dict[str, tuple[Any, Case]] = {}

    @torch.inference_mode()
    def __call__(self, name: str) -> dict[str, Any]:
        """Run a case once; return its seconds, and what it kept in all."""
        if name not in self._cases:
            self._make(name.partition(": ")[0])
        model, case = self._cases[name]
        seconds = case.seconds()
        report = model.sparsifier.report
        kept = [
            [len(image), int(text.sum())]
            for image, text in zip(report.image_kept, report.text_kept, strict=True)
        ]
        return {"seconds": seconds, "kept": kept, "library": dynamic_llava.__file__}

    def _make(self, source: str) -> None:
        model: Any = random_model() if source == "random" else dynamic_llava.load_model(source, torch.float32)
        model.generation_config.suppress_tokens = [model.config.image_token_id]
        self._cases = {f"{source}: {name}": (model, case) for name, case in cases(model)}


# Both sides


def round_(base: Path, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Run one round; return each case's pairs of seconds, and whether both sides kept the same tokens."""
    found: dict[str, dict[str, Any]] = {}
    command = ("evidence.overhead", ["--serve"], 1)
    with Side(base, *command) as old, Side(ROOT, *command) as new:
        for name in CASES:
            pairs, same = [], True
            for number in range(RUNS):
                order = (old, new) if number % 2 else (new, old)
                answers = {side: side.ask(name) for side in order}
                for side, folder in ((old, base), (new, ROOT)):
                    library = answers[side]["library"]
                    assert Path(library).is_relative_to(folder), f"{library} is not the library of {folder}"
                same = same and answers[old]["kept"] == answers[new]["kept"]
                pairs.append((answers[old]["seconds"], answers[new]["seconds"]))
                tick()
            found[name] = {"pairs": pairs[1:], "same": same}  # the first one warms up
    return found


def compare(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratio of one case over all rounds, its interval and the verdict."""
    ratios = [statistics.median(new / old for old, new in one["pairs"]) for one in found]
    low, high = bootstrap(ratios)
    target = HOST_TARGET if name.startswith("nano") else TARGET
    old, new = zip(*(pair for one in found for pair in one["pairs"]), strict=True)
    return {
        "base_seconds": statistics.median(old),
        "new_seconds": statistics.median(new),
        "ratio": statistics.median(ratios),
        "interval_95": [low, high],
        "target": target,
        "reached": high <= target,
        "same_tokens_kept": all(one["same"] for one in found),
        "ratios": ratios,
    }


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the median under resampling."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(DRAWS))
    return medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS) - 1]


def show(compared: dict[str, dict[str, Any]]) -> Table:
    """Return the table of all cases."""
    table = Table("case", "base ms", "new ms", "ratio", "95 %", "at most", "")
    for name, case in compared.items():
        low, high = case["interval_95"]
        base, new = 1000 * case["base_seconds"], 1000 * case["new_seconds"]
        verdict = "reached" if case["reached"] else "MISSED"
        table.add_row(
            name, f"{base:.2f}", f"{new:.2f}", f"{case['ratio']:.3f}", f"{low:.3f}–{high:.3f}",
            f"{case['target']:.2f}", verdict,
        )  # fmt: skip
    return table


def main() -> int:
    """Compare the two and print the table; the exit code is 1 where a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=BASE, help=f"commit to compare with; default {BASE}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    parser.add_argument("--serve", action="store_true", help="be one of the two processes")
    options = parser.parse_args()
    if options.serve:
        serve(Measured())
        return 0
    runs = options.rounds * len(CASES) * RUNS
    console = Console(stderr=True)
    with (
        checked_out(options.base) as base,
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("running", total=runs)
        found = [round_(base, lambda: bar.advance(task)) for _ in range(options.rounds)]
    compared = {name: compare(name, [one[name] for one in found]) for name in CASES}
    head = {
        "command": "python -m evidence.overhead " + shlex.join(sys.argv[1:]),
        "base": options.base,
        "new": described(),
        "rounds": options.rounds,
        "torch_threads": 1,
        "omp_wait_policy": "PASSIVE",
        "pairs": RUNS - 1,
    }
    if options.output:
        from dynamic_llava.environment import environment  # the base commit has none

        write_json(options.output, head | {"cases": compared} | environment(torch.device("cpu")))
    Console(width=100).print(show(compared))
    other = [name for name, case in compared.items() if not case["same_tokens_kept"]]
    for name in other:
        print(f"{name}: the two sides kept other tokens, so they did not do the same work")
    return int(bool(other) or not all(case["reached"] for case in compared.values()))


if __name__ == "__main__":
    sys.exit(main())
