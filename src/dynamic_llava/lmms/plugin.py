"""``lmms-eval --model dynamic_llava``: the field's benchmarks on any checkpoint that ``load`` takes.

lmms-eval, which is installed by the user, finds it through :mod:`dynamic_llava.lmms.manifest`.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm

from dynamic_llava.chat.asking import encode
from dynamic_llava.chat.images import as_rgb
from dynamic_llava.chat.positions import check_positions, positions_of
from dynamic_llava.chat.prompt import PLACEHOLDER, chat_prompt, without_placeholders
from dynamic_llava.checkpoints import load_with_processor
from dynamic_llava.config import SparsityConfig
from dynamic_llava.environment import default_device
from dynamic_llava.evaluation.batches import Kept
from dynamic_llava.sparsifier import Sparsifier, sparsifier_of

MAX_NEW_TOKENS = 1024
IDLE = "uniform"  # for tokens that stay: a method without a predictor
DEFAULT_STOP = "\n\n"
"""lmms-eval's few-shot delimiter, the stop string of every task that names none: it would end an answer after
its first paragraph."""


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
    image_keep_rate, text_keep_rate, image_policy, text_policy, sparsify_image, sparsify_text, layer
        Settings of the sparsifier to change, see :class:`~dynamic_llava.SparsityConfig`. On a checkpoint
        without one they make a baseline: the kinds of tokens that get a policy are dropped, the rest stays.
    vision_tower
        For checkpoints in LLaVA's own layout.

    Raises
    ------
    ValueError
        An argument is unknown or out of range, or does not go with the checkpoint or with ``dense``.
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
        sparsify_image: bool | None = None,
        sparsify_text: bool | None = None,
        layer: int | None = None,
        vision_tower: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = inspect.signature(type(self)).parameters
            names = ", ".join(name for name in known if name != "unknown")
            raise ValueError(f"--model_args has {', '.join(sorted(unknown))}: choose from {names}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}: it must be a whole number >= 1")
        # Without an index this is the process's own device: lmms-eval has chosen it before.
        self.device = torch.device(device or default_device())
        self.model, self.processor = load_with_processor(
            pretrained, dtype=dtype, device=self.device, vision_tower=vision_tower
        )
        self.batch_size = int(batch_size)
        changes = {
            "image_keep_rate": image_keep_rate,
            "text_keep_rate": text_keep_rate,
            "image_policy": image_policy,
            "text_policy": text_policy,
            "sparsify_image": sparsify_image,
            "sparsify_text": sparsify_text,
            "layer": layer,
        }
        self._configure({name: value for name, value in changes.items() if value is not None}, dense)

    def _configure(self, changes: dict[str, Any], dense: bool) -> None:
        sparsifier = sparsifier_of(self.model)
        if dense and changes:
            raise ValueError(f"dense=True leaves nothing to drop: leave out {', '.join(changes)}")
        if dense and sparsifier is not None:
            sparsifier.detach()
        elif sparsifier is not None:
            sparsifier.config = replace(sparsifier.config, **changes)
            sparsifier.check()
        elif changes:
            _baseline(changes, self.model.config.text_config.hidden_size).attach(self.model)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer the requests, those with the same generation settings together.

        The shares of tokens kept and the speed go to lmms-eval's log and, under ``throughput``, into its
        results; where several processes share the work, those of the first one's requests.
        """
        kept = Kept()
        start = time.perf_counter()
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
        seconds, spoken = time.perf_counter() - start, kept.output + kept.cut
        log_metrics(seconds, spoken, spoken / seconds, kept.shares() if kept.rows else None)
        return [answers[number] for number in range(len(requests))]

    def _batches(self, requests: Sequence[Instance], order: Sequence[int]) -> Iterator[list[int]]:
        """Yield numbers of requests with the same settings, a batch at a time."""
        for _, same in itertools.groupby(order, key=lambda number: repr(requests[number].args[1])):
            numbers = list(same)
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def _answer(self, asked: Sequence[Instance], kept: Kept) -> list[str]:
        settings = dict(asked[0].args[1])
        until = settings.get("until") or []
        pictures = [self._pictures(request) for request in asked]
        prompts = [
            chat_prompt(self.processor, _prompt(request.args[0], len(images)), len(images))
            for request, images in zip(asked, pictures, strict=True)
        ]
        inputs = encode(self.processor, prompts, list(itertools.chain(*pictures))).to(self.model.device)
        generation = _generation(settings)
        for request, tokens in zip(asked, inputs["attention_mask"].sum(dim=1).tolist(), strict=True):
            longest = positions_of(self.model.config)
            check_positions(longest, tokens, generation["max_new_tokens"], _name(request))
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            tokens_BN = cast(Any, self.model).generate(**inputs, **generation)
        answer_BN = tokens_BN[:, inputs["input_ids"].shape[1] :]
        tokenizer = self.processor.tokenizer
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        spoken_B = torch.stack([answer_BN != end for end in ends if end is not None]).all(0).sum(1).tolist()
        if settings.get("num_beams", 1) == 1:  # the cache has a row a beam, and not of the best one alone
            # Every spoken token is fed back, but for the last of a row that ran into the limit.
            fed = [min(count, answer_BN.shape[1] - 1) for count in spoken_B]
            kept.cut += sum(spoken_B) - sum(fed)
            kept.add(self.model, inputs, fed)
        texts = self.processor.batch_decode(answer_BN, skip_special_tokens=True)
        return [_cut(text, [until] if isinstance(until, str) else until).strip() for text in texts]

    def _pictures(self, request: Instance) -> list[Image.Image]:
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        for visual in visuals or []:
            if not isinstance(visual, Image.Image):
                raise ValueError(f"{task}: dynamic_llava reads pictures, not {type(visual).__name__}")
        return [as_rgb(visual, _name(request)) for visual in visuals or []]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: the tasks of the paper generate their answers."""
        raise NotImplementedError(
            "dynamic_llava answers generate_until tasks: choose such a form of the task"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise NotImplementedError("dynamic_llava answers single-round tasks")


def _baseline(changes: dict[str, Any], hidden_size: int) -> Sparsifier:
    """Return a sparsifier whose policies need no training; tokens without a policy stay."""
    policies = {kind: changes.get(f"{kind}_policy") for kind in ("image", "text")}
    drops = {f"sparsify_{kind}": policy is not None for kind, policy in policies.items()}
    named = {f"{kind}_policy": policy or IDLE for kind, policy in policies.items()}
    sparsifier = Sparsifier(SparsityConfig(**drops | changes | named), hidden_size)
    if not any(policies.values()) or any(True for _ in sparsifier.parameters()):
        raise ValueError(
            f"{', '.join(changes)}: the checkpoint has no trained sparsifier; leave them out, or name "
            "policies that need none, such as image_policy=fastv"
        )
    return sparsifier


def _name(request: Instance) -> str:
    """Return what errors call a request."""
    _, _, _, doc_id, task, _ = request.args
    return f"{task}, document {doc_id}"


def _prompt(context: str, pictures: int) -> str:
    """Return a context whose placeholders fit its pictures: others go, and then the pictures come first."""
    return context if context.count(PLACEHOLDER) == pictures else without_placeholders(context)


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what ``generate`` takes of a task's settings; greedy unless they ask for a temperature.

    ``do_sample: false`` wins over a temperature (MM-Vet has both), as in ``generate`` itself.
    """
    temperature = 0 if settings.get("do_sample") is False else settings.get("temperature") or 0
    taken = {"max_new_tokens": settings.get("max_new_tokens", MAX_NEW_TOKENS), "do_sample": temperature > 0}
    if temperature > 0:
        taken |= {"temperature": temperature, "top_p": settings.get("top_p")}
    if settings.get("num_beams", 1) > 1:
        taken["num_beams"] = settings["num_beams"]
    return taken


def _cut(text: str, until: Iterable[str]) -> str:
    """Return the text up to the first of the stop strings, lmms-eval's own default left out."""
    for stop in until:
        text = text.split(stop)[0] if stop and stop != DEFAULT_STOP else text
    return text
