"""Trains a tiny Qwen2.5-VL and a tiny LLaVA-NeXT from nothing, and their predictors, by recipes.

A test of the recipes, not a product. Both learn from conversations about drawn scenes, in the layout that
users bring, by their own processor and chat template: first the whole model (``dense``), then the image
predictor alone (``dynamic``, ``train: predictors``), in a quarter of an hour each on one core. Then both
answer questions about held-out scenes with all image tokens, and with a fifth of them, chosen by the
predictor, by chance and evenly. Qwen's processor needs torchvision (``make check-tiny-families`` brings it).

    python -m evidence.tiny_families --output evidence/results/tiny-families.json

Stopped, it goes on where it was when it is run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from evidence.tiny_processors import KINDS
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

import dynamic_llava
from dynamic_llava import checkpoints
from dynamic_llava.chat.asking import encode, greedy
from dynamic_llava.chat.prompt import PLACEHOLDER, apply_template, assistant_turn, user_turn
from dynamic_llava.data import Sample, Turn, scenes
from dynamic_llava.environment import environment
from dynamic_llava.evaluation.intervals import accuracy
from dynamic_llava.files import write_json
from dynamic_llava.training import run
from dynamic_llava.training.trainer import last_checkpoint
from evidence import tiny_processors

PICTURES = 6000  # that are trained on
HELD_OUT = 1000  # scenes that are asked about
MOST_THINGS = 3  # in a scene: the fewer, the fewer tokens matter
KEEP_RATE = 0.2
SEED = 0
VOCABULARY = 700
HIDDEN, INNER, LAYERS, LAYER = 96, 256, 4, 1
TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
SIDE, PATCH = 48, 8


@dataclass(frozen=True)
class Family:
    """What a tiny model is made of.

    Attributes
    ----------
    kind
        Its processor, see :data:`~evidence.tiny_processors.KINDS`.
    pictures
        Settings of its image processor.
    config
        Returns its config, given the processor.
    """

    kind: str
    pictures: dict[str, Any]
    config: Callable[[Any], dict[str, Any]]


def qwen_config(processor: Any) -> dict[str, Any]:
    """Return the config of a tiny Qwen2.5-VL."""
    ids = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [4, 4, 4], "rope_theta": 10.0}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "model_type": "qwen2_5_vl_text", **TEXT, **_marks(processor), "rope_parameters": rope,
        },
        "vision_config": {
            "depth": 2, "hidden_size": HIDDEN, "num_heads": 4, "intermediate_size": INNER,
            "out_hidden_size": HIDDEN, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 32, "fullatt_block_indexes": [1],
        },
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }  # fmt: skip


def next_config(processor: Any) -> dict[str, Any]:
    """Return the config of a tiny LLaVA-NeXT with a Llama decoder."""
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    return {
        "model_type": "llava_next",
        "text_config": {"model_type": "llama", **TEXT, **_marks(processor)},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH * 2,
            "projection_dim": HIDDEN, "hidden_act": "gelu",
        },
        "image_token_id": image,
        "image_token_index": image,
        "image_grid_pinpoints": NEXT_PICTURES["image_grid_pinpoints"],
        "image_seq_length": (SIDE // PATCH // 2) ** 2,
        "vision_feature_layer": -1,
    }  # fmt: skip


def _marks(processor: Any) -> dict[str, int]:
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


SQUARE = {"height": SIDE, "width": SIDE}
NEXT_PICTURES = {
    "size": {"shortest_edge": SIDE},
    "crop_size": SQUARE,
    "image_mean": [0.95] * 3,  # of the light background: else it drowns what lies on it
    "image_std": [0.25] * 3,
    "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
}
QWEN_PICTURES = {"patch_size": PATCH, "min_pixels": 96**2, "max_pixels": 96**2}
FAMILIES = {
    "qwen2_5_vl": Family("qwen2_5_vl", QWEN_PICTURES, qwen_config),
    "llava_next": Family("llava_next-vicuna", NEXT_PICTURES, next_config),
}
STEPS = {
    "qwen2_5_vl": {"dense": 500, "dynamic": 120},
    "llava_next": {"dense": 350, "dynamic": 120},  # whose tower knows where a patch is
}
BATCH = 24


def samples(split: scenes.Split, count: int) -> Iterator[Sample]:
    """Yield the first scenes of a split that hold few things, each of a colour of its own."""
    found, number = 0, 0
    while found < count:
        drawn = scenes.scene(number, split)
        colors = {thing.color for thing in drawn.things}
        if len(drawn.things) <= MOST_THINGS and len(colors) == len(drawn.things):
            found += 1
            yield Sample(f"scenes/{split}/{number}", drawn.draw, _asked(drawn, number))
        number += 1


def _asked(drawn: scenes.Scene, number: int) -> tuple[Turn, ...]:
    """Return questions about each thing: where it is says which, and the picture alone what colour it has."""
    turns = [Turn(f"{thing.position}.", thing.color, "color") for thing in drawn.things]
    random.Random(number).shuffle(turns)
    return tuple(turns)


def talk_about(turns: Sequence[Turn]) -> list[str]:
    """Return what is said by turns; the place is named before the picture comes.

    What is asked must not stand behind the picture: the lowest layers, which drop nothing, would look it up.
    """
    first, *others = turns
    said = [f"Look at the {first.question}", "ok", f"{PLACEHOLDER}\nWhat color is it?", first.answer]
    return said + [value for turn in others for value in (f"And the {turn.question}", turn.answer)]


def write_data(folder: Path) -> Path:
    """Write the conversations that are trained on: short questions."""
    path = folder / "talk.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(samples("train", PICTURES)):
        sample.open_image().save(folder / f"{number}.png")
        lines.append(json.dumps(_entry(number, sample.turns)))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _entry(number: int, turns: Sequence[Turn]) -> dict[str, Any]:
    spoken = [
        {"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(talk_about(turns))
    ]
    return {"id": str(number), "image": f"{number}.png", "conversations": spoken}


def build(family: Family, folder: Path) -> Path:
    """Write an untrained model and its processor."""
    if (folder / "config.json").exists():
        return folder
    texts = [f"\n{value} " for sample in samples("train", 500) for value in talk_about(sample.turns)]
    kind = replace(KINDS[family.kind], settings=KINDS[family.kind].settings | _patches(family.kind))
    processor = tiny_processors.build(kind, texts, VOCABULARY, **family.pictures)
    config = family.config(processor)
    torch.manual_seed(SEED)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), dtype=torch.float32
    )
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    checkpoints.save(model, processor, folder)
    return folder


def _patches(kind: str) -> dict[str, Any]:
    return {"patch_size": 2 * PATCH} if "patch_size" in KINDS[kind].settings else {}


def recipes(base: Path, talk: Path, folder: Path, steps: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the recipe of each stage."""
    data = {"conversations": {"path": str(talk), "answers": "all"}, "batch_size": BATCH}
    common = {"seed": SEED, "save_every": 100, "log_every": min(20, *steps.values())}
    sparsity = {
        "layer": LAYER, "image_keep_rate": KEEP_RATE, "sparsify_text": False, "ratio_weight": 20.0,
        "d_model": 64, "nhead": 4, "dim_feedforward": 128, "num_layers": 2,
    }  # fmt: skip
    return {
        "dense": {
            "stage": {"name": "dense", "init": str(base), "train_vision_tower": True},
            "data": data,
            "optimizer": {"name": "muon", "learning_rate": 2e-3, "matrix_learning_rate": 3e-3},
            "run": {
                "output": str(folder / "dense"),
                "steps": steps["dense"],
                "precision": "bfloat16",
                **common,
            },
        },
        "dynamic": {
            "stage": {"name": "dynamic", "init": str(folder / "dense" / run.MODEL)},
            "data": data,
            "optimizer": {"learning_rate": 1e-3, "predictor_learning_rate": 1e-3},
            "method": {"sparsity": sparsity, "train": "predictors"},
            "run": {"output": str(folder / "dynamic"), "steps": steps["dynamic"], **common},
        },
    }


def train(name: str, work: Path) -> dict[str, float]:
    """Run the stages that are not done; return the minutes that each took by the clock, as its log tells."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    talk = write_data(work / "scenes")
    base = build(FAMILIES[name], folder / "base")
    minutes = {}
    for stage, recipe in recipes(base, talk, folder, STEPS[name]).items():
        path, output = folder / f"{stage}.yaml", folder / stage
        if not (output / run.MODEL).exists():
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            run.train(path, resume=last_checkpoint(output) is not None)
        rows = [json.loads(line) for line in (output / run.LOG).read_text(encoding="utf-8").splitlines()]
        minutes[stage] = round(sum(row["seconds"] for row in rows) / 60, 1)
    return minutes


def ask(model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Sample]) -> list[str]:
    """Return the answers to the first question about each scene."""
    prompts = []
    for sample in asked:
        place, ok, question, _ = talk_about(sample.turns[:1])
        turns = [user_turn(place), assistant_turn(ok), user_turn(question)]
        prompts.append(apply_template(processor, turns, add_generation_prompt=True))
    inputs = encode(processor, prompts, [sample.open_image() for sample in asked])
    tokens_BN = greedy(model, inputs, max_new_tokens=3)
    return [text.strip() for text in processor.batch_decode(tokens_BN, skip_special_tokens=True)]


def score(model: PreTrainedModel, processor: ProcessorMixin, count: int) -> dict[str, Any]:
    """Return the accuracy on held-out scenes, with its interval."""
    asked, right = list(samples("heldout", count)), 0
    for start in range(0, count, BATCH):
        some = asked[start : start + BATCH]
        answers = ask(model, processor, some)
        right += sum(said == one.turns[0].answer for said, one in zip(answers, some, strict=True))
    return accuracy(right, count)


def measure(model: PreTrainedModel, processor: ProcessorMixin, count: int) -> dict[str, Any]:
    """Return the accuracy of each way to choose image tokens, all by the same weights."""
    sparsifier: Any = model.sparsifier
    rows = {}
    for policy in ("learned", "random", "uniform"):
        sparsifier.config.image_policy = policy
        torch.manual_seed(SEED)
        rows[policy] = score(model, processor, count)
    sparsifier.detach()
    return {"dense": score(model, processor, count), **rows}


def is_above(rows: dict[str, Any]) -> bool:
    """Return whether the learned choice is above the others by more than the intervals."""
    lowest = rows["learned"]["interval_95"][0]
    return all(lowest > rows[other]["interval_95"][1] for other in ("random", "uniform"))


def main() -> int:
    """Train and measure both; the exit code is 1 if the learned choice is not above the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny-families"), help="folder of the trainings"
    )
    parser.add_argument("--only", choices=FAMILIES, help="train one of them")
    parser.add_argument("--output", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    found: dict[str, dict[str, Any]] = {}
    for name in [options.only] if options.only else FAMILIES:
        minutes = train(name, options.work)
        model, processor = dynamic_llava.load(options.work / name / "dynamic" / run.MODEL)
        assert processor is not None
        rows = measure(model, processor, HELD_OUT)
        found[name] = {
            "steps": STEPS[name],
            "minutes": minutes,
            "parameters": sum(p.numel() for p in model.parameters()),
            "keep_rate": KEEP_RATE,
            "rows": rows,
            "learned_above_others": is_above(rows),
        }
    table = Table("model", "image tokens", "accuracy", "95 % interval")
    for name, one in found.items():
        for row, numbers in one["rows"].items():
            interval = " to ".join(f"{value:.1f}" for value in numbers["interval_95"])
            table.add_row(name, row, f"{numbers['accuracy']:.1f}", interval)
    Console(width=110).print(table)
    if options.output:
        command = shlex.join(["python", "-m", "evidence.tiny_families", *sys.argv[1:]])
        seconds = round(time.monotonic() - start)
        write_json(
            options.output,
            {
                "command": command,
                "families": found,
                "seconds": seconds,
                "seed": SEED,
                **environment(torch.device("cpu")),
            },
        )
    return int(not all(one["learned_above_others"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
