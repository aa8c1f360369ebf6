"""Conversations as a torch dataset: labels, droppable tokens, batches, and an order by length.

Legend: B rows, N tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import ProcessorMixin

from dynamic_llava.chat.images import open_image
from dynamic_llava.chat.positions import check_positions
from dynamic_llava.data.conversations import BadSample, Conversation, Conversations, OnError
from dynamic_llava.data.labels import Encoded, encode_within, render
from dynamic_llava.files import first_line

IGNORE = -100
FOR_TRAINING = frozenset({"labels", "answer_mask", "weights", "sample"})  # what no model takes
CHARACTERS_PER_TOKEN = 4  # for grouping only
BATCHES_TOGETHER = 50  # whose samples are sorted by length


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations, tokenised as they are asked for.

    Parameters
    ----------
    conversations
        What to read.
    processor
        Supplies tokenizer, chat template and image processor.
    answers
        Whose tokens may be dropped: those of the last answer, as in the paper, or of all.
    max_length
        Longer ones lose their end, and are counted; a picture is kept whole or goes with all behind it.
    positions
        How many the model has, see `positions_of`; what is longer once it is cut counts as broken.
    on_error
        ``"raise"`` stops at a broken entry or picture with its id. ``"skip"`` takes the next good one in its
        place, so that length and order of the data stay, and reports it in the item's ``skipped``.
    limit
        Use only the first entries.
    """

    def __init__(
        self,
        conversations: Conversations,
        processor: ProcessorMixin,
        *,
        answers: Literal["last", "all"] = "last",
        max_length: int = 2048,
        positions: int | None = None,
        on_error: OnError = "raise",
        limit: int | None = None,
    ) -> None:
        self.conversations = conversations
        self.processor = processor
        self.answers = answers
        self.max_length = max_length
        self.positions = positions
        self.on_error = on_error
        self._count = min(len(conversations), limit or len(conversations))

    def __len__(self) -> int:
        """Return the number of entries."""
        return self._count

    @property
    def lengths(self) -> list[int]:
        """About how many tokens each entry has, pictures left out."""
        return [number // CHARACTERS_PER_TOKEN for number in self.conversations.characters[: self._count]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one entry.

        Returns
        -------
        dict
            ``input_ids``, ``labels`` and ``answer_mask`` [N]; ``per_token``, what else the model takes for
            each, by name; ``for_pictures``, the names of what it takes for pictures, and these, such as
            ``pixel_values``; ``sample``, its number; ``skipped``, reasons; ``truncated``, 1 if it was;
            ``cut``, what was cut off of pictures.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        skipped: list[str] = []
        for offset in range(self._count):
            try:
                item = self._item(self.conversations[(index + offset) % self._count])
            except BadSample as error:
                if self.on_error == "raise":
                    raise
                skipped.append(str(error))
            else:
                return {**item, "sample": index, "skipped": skipped}
        raise BadSample(f"{self.conversations.path}: not one good entry; the first: {skipped[0]}")

    def _item(self, conversation: Conversation) -> dict[str, Any]:
        name = conversation.name
        kept, is_longer = self._encoded(conversation)
        try:
            check_positions(self.positions, len(kept.input_ids), name=name)
        except ValueError as error:
            raise BadSample(f"{error}, or let max_length cut it") from error
        ids, answer_of = torch.tensor(kept.input_ids), torch.tensor(kept.answer_of)
        is_answer = answer_of >= 0
        if not is_answer[1:].any():
            raise BadSample(f"{name}: no answer within {self.max_length} tokens")
        last = len(conversation.turns) - 1
        return {
            "input_ids": ids,
            "labels": torch.where(is_answer, ids, IGNORE),
            "answer_mask": is_answer if self.answers == "all" else answer_of == last,
            "per_token": kept.per_token,
            "for_pictures": tuple(kept.for_pictures),
            **kept.for_pictures,
            "truncated": int(is_longer),
            "cut": _lost(conversation, kept),
        }

    def _encoded(self, conversation: Conversation) -> tuple[Encoded, bool]:
        name = conversation.name
        try:
            rendered = render(self.processor, conversation)  # first, for pictures take longer
            images = [open_image(path) for path in conversation.images]
            return encode_within(self.processor, rendered, images, self.max_length)
        except BadSample:
            raise
        except (OSError, ValueError) as error:
            raise BadSample(f"{name}: {error}") from error
        except Exception as error:  # nothing that one entry holds may end a training of days
            raise BadSample(
                f"{name}: cannot be encoded: {type(error).__name__}: {first_line(error)}"
            ) from error


def model_inputs(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a group of rows the model's forward takes."""
    return {name: value for name, value in group.items() if name not in FOR_TRAINING}


def collate(items: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Pad items on the right into one group of rows, beside what was skipped, cut off, and how often."""
    lengths = [len(item["input_ids"]) for item in items]
    length = max(lengths)

    def padded(rows: Sequence[Tensor], fill: int | bool) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=fill) for row in rows])

    def column(name: str, fill: int | bool) -> Tensor:
        return padded([item[name] for item in items], fill)

    group = {
        "input_ids": column("input_ids", pad),
        "labels": column("labels", IGNORE),
        "answer_mask": column("answer_mask", False),
        "attention_mask": padded([torch.ones(number, dtype=torch.long) for number in lengths], 0),
        "sample": torch.tensor([item["sample"] for item in items]),
    }
    for name in _names(items, "per_token"):
        none = [torch.zeros(number, dtype=torch.long) for number in lengths]
        rows = [item["per_token"].get(name, row) for item, row in zip(items, none, strict=True)]
        group[name] = padded(rows, 0)
    for name in _names(items, "for_pictures"):
        group[name] = joined([item[name] for item in items if name in item["for_pictures"]])
    return {
        "groups": [group],
        "skipped": [reason for item in items for reason in item["skipped"]],
        "cut": [reason for item in items for reason in item["cut"]],
        "truncated": sum(item["truncated"] for item in items),
    }


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors one after the other, each grown to the largest by zeros, as processors pad a batch."""
    sizes = torch.tensor([part.shape[1:] for part in parts])
    grown = []
    for part in parts:
        missing = sizes.amax(0) - torch.tensor(part.shape[1:])
        amounts = [amount for number in reversed(missing.tolist()) for amount in (0, int(number))]
        grown.append(torch.nn.functional.pad(part, amounts) if any(amounts) else part)
    return torch.cat(grown)


def _names(items: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Return the names of all that is given to the model with any of the rows."""
    return list(dict.fromkeys(name for item in items for name in item[kind]))


class LengthGrouped(Sampler[int]):
    """A random order in which samples of similar length lie together; a function of seed and epoch alone.

    Parameters
    ----------
    lengths
        Of each sample.
    batch
        Samples of one optimizer step, over all processes.
    seed
        Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield every sample once."""
        draw = random.Random(f"order-{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        together = self.batch * BATCHES_TOGETHER
        batches: list[list[int]] = []
        for start in range(0, len(order), together):
            some = sorted(order[start : start + together], key=lambda i: self.lengths[i], reverse=True)
            batches += [some[i : i + self.batch] for i in range(0, len(some), self.batch)]
        whole = [batch for batch in batches if len(batch) == self.batch]
        draw.shuffle(whole)
        rest = [batch for batch in batches if len(batch) < self.batch]  # at most one, and last
        return (index for batch in whole + rest for index in batch)


def _lost(conversation: Conversation, kept: Encoded) -> list[str]:
    """Say which pictures a cut has taken."""
    before, now = len(conversation.images), len(kept.placeholders)
    if before == now:
        return []
    return [f"{conversation.name}: cut to {len(kept.input_ids)} tokens, before picture {now + 1} of {before}"]
