"""Answers chats by plain ``generate``, one at a time, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dynamic_llava.chat.asking import encode, report_of
from dynamic_llava.chat.positions import check_positions, positions_of
from dynamic_llava.chat.prompt import apply_template
from dynamic_llava.chat.view import pieces
from dynamic_llava.page.chat import Chat
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.looking import png
from dynamic_llava.vllm.kept import picture
from dynamic_llava.vllm.rates import changed


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes
    ----------
    is_cut
        Whether it ran into its longest length.
    sparsity
        What was kept and saved, see docs/serving.md; None where the model has no sparsifier.
    """

    text: str
    is_cut: bool
    prompt_tokens: int
    new_tokens: int
    sparsity: dict[str, Any] | None


class Engine:
    """Owns a model.

    Parameters
    ----------
    model, processor
        What :func:`dynamic_llava.load` returns.
    name
        What clients call it.
    waiting
        Most chats that wait for their turn.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, name: str, waiting: int) -> None:
        self._model, self._processor, self.name = model, processor, name
        self._places = threading.BoundedSemaphore(waiting + 1)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="generate")

    def ask(
        self,
        chat: Chat,
        say: Callable[[str], None],
        end: Callable[[Answer | Exception], None],
        is_gone: threading.Event,
    ) -> None:
        """Answer in the engine's thread.

        Parameters
        ----------
        say
            Gets the text as it comes.
        end
            Gets the answer, or what went wrong.
        is_gone
            Set by the caller when nobody listens any more.

        Raises
        ------
        Refused
            Too many wait already.
        """
        if not self._places.acquire(blocking=False):
            raise Refused("the server is busy, try again later", status=503)

        def work() -> None:
            try:
                end(self._answer(chat, say, is_gone))
            except Exception as error:
                end(error)
            finally:
                self._places.release()

        self._pool.submit(work)

    def close(self) -> None:
        """Wait for the answers that are under way."""
        self._pool.shutdown(wait=True)

    def _answer(self, chat: Chat, say: Callable[[str], None], is_gone: threading.Event) -> Answer:
        model: Any = self._model
        with self._rates(chat):
            inputs = self._encode(chat)
            length = inputs["input_ids"].shape[1]
            telling = Telling(self._processor, say)
            sampled = {"temperature": chat.temperature, "top_p": chat.top_p} if chat.temperature else {}
            if chat.temperature and chat.seed is not None:
                torch.manual_seed(chat.seed)
            with torch.inference_mode():
                tokens_BN: Tensor = model.generate(
                    **inputs, max_new_tokens=chat.new_tokens, do_sample=bool(chat.temperature), **sampled,
                    streamer=telling, stopping_criteria=StoppingCriteriaList([Gone(is_gone)]),
                )  # fmt: skip
            tokens = tokens_BN[0, length:].tolist()
            ends = model.generation_config.eos_token_id
            ended = tokens[-1:] and tokens[-1] in (ends if isinstance(ends, list) else [ends])
            return Answer(
                telling.text, not ended, length, len(tokens), self._kept(chat, inputs, tokens, telling)
            )

    @contextmanager
    def _rates(self, chat: Chat) -> Iterator[None]:
        """Give the sparsifier the chat's rates for the length of a block."""
        sparsifier = getattr(self._model, "sparsifier", None)
        if sparsifier is None:
            if chat.sparsity.keys() - {"dense"}:
                raise Refused("the model has no sparsifier, leave sparsity out", "sparsity")
            yield
            return
        config = sparsifier.config
        try:
            sparsifier.config = changed(config, chat.sparsity)
        except ValueError as error:
            raise Refused(str(error), "sparsity") from error
        try:
            yield
        finally:
            sparsifier.config = config

    def _encode(self, chat: Chat) -> Any:
        if any(turn["role"] == "system" for turn in chat.turns) and "system" not in str(
            self._processor.chat_template
        ):
            raise Refused("the model's chat template has no system messages, leave it out", "messages")
        try:
            prompt = apply_template(self._processor, chat.turns, add_generation_prompt=True)
            inputs = encode(self._processor, [prompt], chat.pictures).to(self._model.device)
            check_positions(positions_of(self._model.config), inputs["input_ids"].shape[1], chat.new_tokens)
        except ValueError as error:
            raise Refused(str(error), "messages") from error
        return inputs

    def _kept(self, chat: Chat, inputs: Any, tokens: list[int], telling: Telling) -> dict[str, Any] | None:
        report = report_of(self._model)
        if report is None:
            return None
        numbers: dict[str, Any] = dict(report.summary())
        numbers |= {
            "dense": not (report.config.sparsify_image or report.config.sparsify_text),
            "seconds_to_first_token": telling.first - telling.begun,
            "tokens_per_second": telling.rate,
        }
        if chat.explain:
            flags = report.image_flags[0] if report.image_flags else []
            numbers["pictures"] = [
                {**picture(flags_I.tolist()), "seen": self._seen(inputs, number)}
                for number, flags_I in enumerate(flags)
            ]
            kept = [*report.text_kept[0].tolist(), True]  # the last token is not fed back
            words = pieces(self._processor, tokens)
            numbers["words"] = [
                {"text": word, "kept": stays} for word, stays in zip(words, kept, strict=False) if word
            ]
        return numbers

    def _seen(self, inputs: Any, number: int) -> str | None:
        """Return a picture as the vision tower saw it, as a data address; None where it saw several of it."""
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4:
            return None
        return png(self._processor, pixels[number])


class Telling(BaseStreamer):
    """Says the text of the tokens as they come, and takes the time."""

    def __init__(self, processor: ProcessorMixin, say: Callable[[str], None]) -> None:
        self._processor, self._say = processor, say
        self._tokens: list[int] = []
        self._is_prompt = True
        self.text = ""
        self.begun = self.first = self.last = time.perf_counter()

    @property
    def rate(self) -> float:
        """Tokens a second after the first one; 0 where there is none."""
        seconds = self.last - self.first
        return (len(self._tokens) - 1) / seconds if seconds > 0 else 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.last = time.perf_counter()
        if not self._tokens:
            self.first = self.last
        self._tokens += value.flatten().tolist()
        text = self._processor.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a character
            self._tell(text)

    def end(self) -> None:
        """Say what is left."""
        self._tell(self._processor.decode(self._tokens, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        new, self.text = text[len(self.text) :], text
        if new:
            self._say(new)


class Gone(StoppingCriteria):
    """Stops an answer that nobody waits for."""

    def __init__(self, is_gone: threading.Event) -> None:
        self._is_gone = is_gone

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return whether each row ends."""
        return torch.full((len(input_ids),), self._is_gone.is_set(), device=input_ids.device)
