"""``lmms_eval --model dynamic_llava``: the field's benchmarks on any checkpoint that ``load`` takes.

Found by lmms-eval through the entry point ``lmms_eval.models``; lmms-eval itself is installed by the user.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

import dynamic_llava
from dynamic_llava.chat import PLACEHOLDER, chat_prompt, encode
from dynamic_llava.evaluation.batches import Kept
from dynamic_llava.sparsifier import Sparsifier

MAX_NEW_TOKENS = 1024
MANIFEST = ModelManifest("dynamic_llava", simple_class_path="dynamic_llava.lmms_eval_plugin.DynamicLlava")


class DynamicLlava(lmms):
    """A checkpoint with or without a sparsifier, as lmms-eval asks it.

    Parameters
    ----------
    pretrained
        Folder, hub id, or ``nano``.
    batch_size
        Requests answered at once.
    device, dtype
        Where and in what it computes; by default the accelerator if there is one, and the checkpoint's dtype.
    dense
        Detach the sparsifier: the stock model.
    image_keep_rate, text_keep_rate, image_policy, text_policy
        Settings of the sparsifier to change, see :class:`~dynamic_llava.SparsityConfig`.
    vision_tower
        For checkpoints in LLaVA's own layout.
    """

    def __init__(
        self,
        pretrained: str = "nano",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        dense: bool = False,
        image_keep_rate: float | None = None,
        text_keep_rate: float | None = None,
        image_policy: str | None = None,
        text_policy: str | None = None,
        vision_tower: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"--model_args has {', '.join(sorted(unknown))}: see {type(self).__qualname__}")
        if device is None:
            device = str(torch.accelerator.current_accelerator() or "cpu")
        self.model, processor = dynamic_llava.load(
            pretrained, dtype=dtype, device=device, vision_tower=vision_tower
        )
        if processor is None:
            raise ValueError(f"{pretrained}: no tokenizer or processor; save the model's own beside it")
        self.processor = processor
        self.batch_size = int(batch_size)
        changes = {
            "image_keep_rate": image_keep_rate,
            "text_keep_rate": text_keep_rate,
            "image_policy": image_policy,
            "text_policy": text_policy,
        }
        self._configure({name: value for name, value in changes.items() if value is not None}, dense)

    def _configure(self, changes: dict[str, Any], dense: bool) -> None:
        sparsifier = cast(Sparsifier | None, getattr(self.model, "sparsifier", None))
        if dense and sparsifier is not None:
            sparsifier.detach()
        elif sparsifier is not None:
            sparsifier.config = replace(sparsifier.config, **changes)
        if changes and (dense or sparsifier is None):
            raise ValueError(f"{', '.join(changes)}: the model answers dense; leave them out")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer the requests, those with the same generation settings together."""
        kept = Kept()
        answers: dict[int, str] = {}
        order = sorted(
            range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(requests[i].args[0]))
        )
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="dynamic_llava")
        for numbers in self._batches(requests, order):
            asked = [requests[number] for number in numbers]
            for number, text in zip(numbers, self._answer(asked, kept), strict=True):
                answers[number] = text
                request = requests[number]
                self.cache_hook.add_partial("generate_until", (request.args[0], request.args[1]), text)
            bar.update(len(numbers))
        bar.close()
        shares = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in kept.shares().items())
        logger.info(f"dynamic_llava: {shares}")
        return [answers[number] for number in range(len(requests))]

    def _batches(self, requests: Sequence[Instance], order: Sequence[int]) -> Iterator[list[int]]:
        """Yield numbers of requests with the same settings, a batch at a time."""
        for _, same in itertools.groupby(order, key=lambda number: repr(requests[number].args[1])):
            numbers = list(same)
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def _answer(self, asked: Sequence[Instance], kept: Kept) -> list[str]:
        settings = dict(asked[0].args[1])
        until = settings.pop("until", [])
        pictures = [self._pictures(request) for request in asked]
        prompts = [
            chat_prompt(self.processor, _prompt(request.args[0], len(images)), len(images))
            for request, images in zip(asked, pictures, strict=True)
        ]
        inputs = encode(self.processor, prompts, list(itertools.chain(*pictures))).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            tokens_BN = cast(Any, self.model).generate(**inputs, **_generation(settings))
        answer_BN = tokens_BN[:, inputs["input_ids"].shape[1] :]
        tokenizer = self.processor.tokenizer
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        spoken_B = torch.stack([answer_BN != end for end in ends if end is not None]).all(0).sum(1).tolist()
        if settings.get("num_beams", 1) == 1:
            kept.add(self.model, inputs, [min(count, answer_BN.shape[1] - 1) for count in spoken_B])
        texts = self.processor.batch_decode(answer_BN, skip_special_tokens=True)
        return [_cut(text, [until] if isinstance(until, str) else until).strip() for text in texts]

    def _pictures(self, request: Instance) -> list[Image.Image]:
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        for visual in visuals or []:
            if not isinstance(visual, Image.Image):
                raise ValueError(f"{task}: dynamic_llava reads pictures, not {type(visual).__name__}")
        return [visual.convert("RGB") for visual in visuals or []]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the tasks of the paper generate their answers."""
        raise NotImplementedError(
            "dynamic_llava answers generate_until tasks: choose such a form of the task"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError("dynamic_llava answers single-round tasks")


def _prompt(context: str, pictures: int) -> str:
    """Return a context whose placeholders fit its pictures: others go, and then the pictures come first."""
    return context if context.count(PLACEHOLDER) == pictures else context.replace(PLACEHOLDER, "").strip()


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what ``generate`` takes of a task's settings; greedy unless they ask for a temperature."""
    temperature = settings.get("temperature") or 0
    taken = {"max_new_tokens": settings.get("max_new_tokens", MAX_NEW_TOKENS), "do_sample": temperature > 0}
    if temperature > 0:
        taken |= {"temperature": temperature, "top_p": settings.get("top_p")}
    if settings.get("num_beams", 1) > 1:
        taken["num_beams"] = settings["num_beams"]
    return taken


def _cut(text: str, until: Iterable[str]) -> str:
    """Return the text up to the first of the stop strings."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
