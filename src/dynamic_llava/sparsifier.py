"""The sparsifier: two predictors and a config, attached to a stock model and taken off again."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from dynamic_llava import methods
from dynamic_llava.adapter import Adapter, check_merged
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core import cache as caches
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.fit import check_fit, check_kind, computes_on
from dynamic_llava.core.hooks import Attachment
from dynamic_llava.core.passes.base import PromptState
from dynamic_llava.families import family_of
from dynamic_llava.hub import Access

PREDICTORS = ("image_predictor", "text_predictor", "prompt_predictor")


class _LeftOut(Collection[str]):
    """Keys that a model does not save, a sparsifier's among them: as they are now, for peft renames them."""

    def __init__(self, sparsifier: Decisions, others: Iterable[str]) -> None:
        self._sparsifier, self._others = sparsifier, tuple(others)

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        yield from (f"sparsifier.{name}" for name in self._sparsifier.state_dict())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return any(key == own for own in self)


class Sparsifier(Decisions):
    """Drops image tokens and output tokens from the context of a stock multimodal model (Dynamic-LLaVA).

    Parameters
    ----------
    config
        What to drop, how much, and from which layer on.
    hidden_size
        Width of the decoder that it will be attached to.

    Attributes
    ----------
    config : SparsityConfig
        Read anew at every call.
    tau : float
        Temperature of the Gumbel softmax in training; the trainer lowers it.
    base_model : str
        Name of the model that the predictors were trained for, kept in their files; empty if unknown.
    history : dict
        What they were trained with, kept in their files for the model card; empty if unknown.
    report : Report or None
        What this thread's last call kept. Each call, or all calls with one cache, own their report.

    Examples
    --------
    >>> sparsifier = Sparsifier(SparsityConfig(), hidden_size=4096)  # doctest: +SKIP
    >>> with sparsifier(model):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    def __init__(self, config: SparsityConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.base_model = ""
        self.history: dict[str, Any] = {}
        self._attachment: Attachment | None = None
        self._keys_to_ignore_on_save: Any = None

    # Attaching

    def attach(self, model: PreTrainedModel) -> Sparsifier:
        """Attach to ``model``'s decoder by hooks; the model becomes the owner, as ``model.sparsifier``.

        Parameters
        ----------
        model
            A stock model such as ``LlavaForConditionalGeneration``, with sdpa, eager, flex or flash
            attention.

        Returns
        -------
        Sparsifier
            Itself, in the model's device, dtype and mode (training or evaluation).

        Raises
        ------
        ValueError
            If it does not fit the model, or if either is attached already.
        """
        check_kind(model)
        if self._attachment is not None or hasattr(model, "sparsifier"):
            raise ValueError("model or sparsifier is attached already: call sparsifier.detach() first")
        family = family_of(model)
        decoder: Any = model.base_model.get_submodule(family.decoder)
        check_fit(model, decoder, self.hidden_size, self.base_model)
        family.check_layer(model.config, self.config.layer, decoder.config.num_hidden_layers)
        # It decides on what the last dense layer returns, so it lives where that layer computes.
        last = decoder.layers[self.config.layer - 1]
        dtype = next(weight for weight in last.parameters() if weight.is_floating_point()).dtype
        self.to(device=computes_on(last), dtype=dtype).train(model.training)
        self._keys_to_ignore_on_save = model._keys_to_ignore_on_save
        self._attachment = Attachment(self, model, family)
        model.sparsifier = self
        # transformers declares a set or a list, and only asks for the length and goes through it.
        model._keys_to_ignore_on_save = cast(Any, _LeftOut(self, self._keys_to_ignore_on_save or ()))
        return self

    def detach(self) -> None:
        """Give the stock model back exactly as it was; without effect if not attached."""
        if self._attachment is None:
            return
        attachment, self._attachment = self._attachment, None
        attachment.detach()
        attachment.model._keys_to_ignore_on_save = self._keys_to_ignore_on_save
        del attachment.model.sparsifier

    @contextmanager
    def forward(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """``with sparsifier(model):`` attaches for the length of the block."""
        self.attach(model)
        try:
            yield model
        finally:
            self.detach()

    def new_cache(
        self,
        capacity: int | None = None,
        static: bool = False,
        image_positions: Sequence[Sequence[Tensor]] | None = None,
    ) -> Cache:
        """Return an empty cache for ``past_key_values``; calls without one make it themselves.

        Parameters
        ----------
        capacity
            Tokens a row, prompt with image tokens and output, that it has room for; more are refused. The
            layers < l have that room from the start, the others that of the tokens expected to stay. None
            lets it grow in blocks.
        static
            Never change a shape while decoding, so that the step compiles (``torch.compile(fullgraph=True)``,
            CUDA graphs). The layers >= l then have room for every later token. A token past the end is
            refused by torch's own bounds check, on a GPU by a device-side assertion.
        image_positions
            Of a prompt that comes as ``inputs_embeds`` with the features of its pictures: for each row, of
            each picture the positions of its tokens, int64 ``[I]``.
        """
        if capacity is not None and (type(capacity) is not int or capacity < 1):
            raise ValueError(
                f"capacity is {capacity!r}: it must be a whole number >= 1, or None for a growing cache"
            )
        if static and capacity is None:
            raise ValueError("static is True: a static cache also needs its capacity, in tokens a row")
        attachment = self._attached
        config, layers, record = attachment.decoder.config, attachment.shape.layers, attachment.new_record()
        if static and capacity is not None:
            cache: Cache = StaticCache(config=config, max_cache_len=capacity)
        else:
            cache = caches.growing(config, attachment.shape)
        context = caches.fill(cache, layers, self.config.layer, record, capacity, static)
        context.image_positions = image_positions
        return cache

    def check(self) -> None:
        """Raise ``ValueError`` if the config, which may have been edited, does not fit the attached model."""
        self._attached.check()

    def new_prompt(self, tokens: int) -> PromptState:
        """Return what a run without a cache knows of its prompt of ``tokens``, for ``past_key_values``.

        ``generate(use_cache=False)`` hands it from step to step by itself.
        """
        return PromptState(tokens, self._attached.new_record())

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        """Copy with the model that it is attached to, whose copy the copy then belongs to; never alone."""
        if self._attachment is not None and not memo:  # a memo tells of the whole that it is a part of
            raise ValueError(
                "an attached sparsifier cannot be copied without its model, as peft's modules_to_save would: "
                "name its predictors there (image_predictor, text_predictor), or detach it first"
            )
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``sparsifier.safetensors``, ``sparsifier_config.json`` and, if trained here, a model card."""
        self.adapter().save(Path(folder))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload what :meth:`save_pretrained` writes to a hub repository, made if needed; return where."""
        return self.adapter().push(repo_id, private, token)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Sparsifier:
        """Read what :meth:`save_pretrained` or :meth:`push_to_hub` wrote, from a folder or a hub id.

        Parameters
        ----------
        source
            The folder or the hub id.
        revision, token, cache_dir
            Of the hub: branch, tag or commit; token; where files are fetched to.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is broken, or a tensor missing, unexpected or misshapen.
        """
        return cls.from_adapter(Adapter.read(source, Access(revision, token, cache_dir)), source)

    @classmethod
    def from_adapter(cls, adapter: Adapter, source: str | Path) -> Sparsifier:
        """Make what ``adapter``'s files hold; ``source`` names them in errors.

        Raises
        ------
        ValueError
            If a tensor is missing, unexpected or misshapen.
        """
        with torch.device("meta"):  # until they are compared, sizes that a file claims take no memory
            sparsifier = cls(adapter.config, adapter.hidden_size)
            sparsifier.make_prompt_predictor(
                any(name.startswith("prompt_predictor.") for name in adapter.state)
            )
        adapter = adapter.without(f"{name}." for name in PREDICTORS if getattr(sparsifier, name) is None)
        adapter.check(sparsifier.state_dict(), source)
        sparsifier.to_empty(device="cpu").load_state_dict(adapter.state)
        sparsifier.base_model, sparsifier.history = adapter.base_model, adapter.history
        dtypes = {tensor.dtype for tensor in adapter.state.values()}
        return sparsifier.to(dtypes.pop()) if dtypes else sparsifier

    def adapter(self) -> Adapter:
        """Return what its files hold, with the attached model's name where no base model is known."""
        check_merged(self, "the predictors")
        name = self.base_model or (self._attachment.model.name_or_path if self._attachment else "")
        config = methods.by_name(self.config)
        return Adapter(config, self.hidden_size, name or "", self.state_dict(), self.history)

    @property
    def _attached(self) -> Attachment:
        if self._attachment is None:
            raise ValueError("the sparsifier is not attached: call sparsifier.attach(model) first")
        return self._attachment


def sparsifier_of(model: Any) -> Sparsifier | None:
    """Return the sparsifier that is attached to a model, or None."""
    found: Sparsifier | None = getattr(model, "sparsifier", None)
    return found
