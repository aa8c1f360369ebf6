"""The sparsifier: two predictors and a config, attached to a stock model and taken off again."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dynamic_llava.adapter import Adapter
from dynamic_llava.config import SparsityConfig
from dynamic_llava.core.attention import interface
from dynamic_llava.core.cache import SparseCache
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.decoder import sparse_forward
from dynamic_llava.core.fit import check_fit, computes_on
from dynamic_llava.core.placeholders import image_positions
from dynamic_llava.core.report import Report
from dynamic_llava.costs.flops import DecoderShape


@dataclass
class _Attachment:
    """What must be undone to give the stock model back."""

    model: PreTrainedModel
    language_model: Any
    shape: DecoderShape
    implementation: str
    entry: str
    own_forward: Any
    layer_configs: list[Any]
    keys_to_ignore_on_save: Any
    handles: list[Any]


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
    report : Report or None
        What the last call kept. Each call, or all calls with one cache, own their report.

    Examples
    --------
    >>> sparsifier = Sparsifier(SparsityConfig(), hidden_size=4096)  # doctest: +SKIP
    >>> with sparsifier(model):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    def __init__(self, config: SparsityConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.base_model = ""
        self._attachment: _Attachment | None = None

    # Attaching

    def attach(self, model: PreTrainedModel) -> Sparsifier:
        """Take over the pass of ``model``'s decoder; the model becomes the owner, as ``model.sparsifier``.

        Parameters
        ----------
        model
            A stock model such as ``LlavaForConditionalGeneration``, with sdpa, eager or flex attention.

        Returns
        -------
        Sparsifier
            Itself, in the model's device, dtype and mode (training or evaluation).

        Raises
        ------
        ValueError
            If it does not fit the model, or if either is attached already.
        """
        if self._attachment is not None or hasattr(model, "sparsifier"):
            raise ValueError("model or sparsifier is attached already: call sparsifier.detach() first")
        check_fit(model, self.config.layer, self.hidden_size, self.base_model)
        language_model: Any = model.model.language_model
        # It decides on what the last dense layer returns, so it lives where that layer computes.
        device = computes_on(language_model.layers[self.config.layer - 1])
        self.to(device=device, dtype=language_model.norm.weight.dtype).train(model.training)
        # accelerate wraps forward where a device_map moves inputs or weights; then take what it wraps.
        entry = "_old_forward" if hasattr(language_model, "_hf_hook") else "forward"
        self._attachment = _Attachment(
            model,
            language_model,
            shape=DecoderShape.from_config(language_model.config),
            implementation=language_model.config._attn_implementation,
            entry=entry,
            own_forward=language_model.__dict__.get(entry),
            layer_configs=[layer.self_attn.config for layer in language_model.layers],
            keys_to_ignore_on_save=model._keys_to_ignore_on_save,
            handles=[
                model.register_forward_pre_hook(self._label_check(model), with_kwargs=True),
                model.model.register_forward_pre_hook(self._image_finder(model.model), with_kwargs=True),
            ],
        )
        model.sparsifier = self
        own_keys = {f"sparsifier.{name}" for name in self.state_dict()}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *own_keys}
        # The layers get a config of their own: the shared one, which users read and set, stays as it is.
        policy_config = copy.copy(language_model.config)
        policy_config._attn_implementation = interface.register(policy_config._attn_implementation)
        for layer in language_model.layers:
            layer.self_attn.config = policy_config
        setattr(language_model, entry, functools.partial(sparse_forward, language_model, sparsifier=self))
        return self

    def detach(self) -> None:
        """Give the stock model back exactly as it was; without effect if not attached."""
        if self._attachment is None:
            return
        attachment, self._attachment = self._attachment, None
        model, language_model = attachment.model, attachment.language_model
        delattr(language_model, attachment.entry)
        if attachment.own_forward is not None:
            setattr(language_model, attachment.entry, attachment.own_forward)
        for layer, config in zip(language_model.layers, attachment.layer_configs, strict=True):
            layer.self_attn.config = config
        for handle in attachment.handles:
            handle.remove()
        model._keys_to_ignore_on_save = attachment.keys_to_ignore_on_save
        del model.sparsifier

    @contextmanager
    def forward(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """``with sparsifier(model):`` attaches for the length of the block."""
        self.attach(model)
        try:
            yield model
        finally:
            self.detach()

    # What a pass asks for

    def check(self) -> None:
        """Raise ``ValueError`` if the config, which may have been edited, does not fit the attached model."""
        self.config.validate()
        layers = self._attached.shape.layers
        if self.config.layer >= layers:
            raise ValueError(
                f"layer is {self.config.layer}: the decoder has {layers} layers, choose 1 to {layers - 1}"
            )
        implementation = self._attached.language_model.config._attn_implementation
        if implementation != self._attached.implementation:
            raise ValueError(
                f"the attention implementation became {implementation!r}: detach, set it, attach again"
            )

    def new_report(self) -> Report:
        """Return an empty report of a call without a cache."""
        return Report(copy.copy(self.config), self._attached.shape, self._attached.model.dtype.itemsize)

    def new_cache(self, capacity: int | None = None, static: bool = False) -> SparseCache:
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
        """
        if capacity is not None and (type(capacity) is not int or capacity < 1):
            raise ValueError(
                f"capacity is {capacity!r}: it must be a whole number >= 1, or None for a growing cache"
            )
        if static and capacity is None:
            raise ValueError("static is True: a static cache also needs its capacity, in tokens a row")
        layers = self._attached.shape.layers
        return SparseCache(layers, self.config.layer, self.new_report(), capacity, static)

    def check_cache(self, cache: SparseCache) -> None:
        """Raise ``ValueError`` if ``cache`` was filled with another layer l or by another decoder."""
        if (len(cache), cache.split) != (self._attached.shape.layers, self.config.layer):
            raise ValueError(
                f"past_key_values was filled with {len(cache)} layers, sparse from {cache.split}; the model "
                f"has {self._attached.shape.layers}, sparse from {self.config.layer}"
            )

    # Hooks on the stock model

    def _label_check(self, model: nn.Module) -> Callable[..., None]:
        place = _names(model).index("labels")

        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            has_labels = (args[place] if len(args) > place else kwargs.get("labels")) is not None
            if not has_labels and not (self.training and torch.is_grad_enabled()):
                return  # first, for every decoded token comes by
            config = self.config
            drops = config.sparsify_image or config.sparsify_text or config.sparsify_prompt
            if drops and kwargs.get("answer_mask") is None:
                raise ValueError(
                    "labels and training need a full-length pass: also pass answer_mask, bool [batch, "
                    "tokens], True at the output tokens that may be dropped (all False where none may)"
                )

        return check

    def _image_finder(self, model: nn.Module) -> Callable[..., Any]:
        names = _names(model)

        def add_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
            found = image_positions(module, given)
            return args, {**kwargs, "image_positions_KI": found, "token_ids_BN": given.get("input_ids")}

        return add_positions

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``sparsifier.safetensors`` and ``sparsifier_config.json`` into ``folder``."""
        self.adapter().save(Path(folder))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload what :meth:`save_pretrained` writes to a hub repository, made if needed; return where."""
        return self.adapter().push(repo_id, private, token)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Sparsifier:
        """Read what :meth:`save_pretrained` or :meth:`push_to_hub` wrote, from a folder or a hub id.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is broken, or a tensor missing, unexpected or misshapen.
        """
        return cls.from_adapter(Adapter.read(source), source)

    @classmethod
    def from_adapter(cls, adapter: Adapter, source: str | Path) -> Sparsifier:
        """Make what ``adapter``'s files hold; ``source`` names them in errors.

        Raises
        ------
        ValueError
            If a tensor is missing, unexpected or misshapen.
        """
        sparsifier = cls(adapter.config, adapter.hidden_size)
        sparsifier.make_prompt_predictor(any(name.startswith("prompt_predictor.") for name in adapter.state))
        adapter.check(sparsifier.state_dict(), source)
        sparsifier.load_state_dict(adapter.state)
        sparsifier.base_model = adapter.base_model
        return sparsifier.to(next(iter(adapter.state.values())).dtype)

    def adapter(self) -> Adapter:
        """Return what its files hold, with the attached model's name where no base model is known."""
        name = self.base_model or (self._attachment.model.name_or_path if self._attachment else "")
        return Adapter(copy.copy(self.config), self.hidden_size, name or "", self.state_dict())

    @property
    def _attached(self) -> _Attachment:
        if self._attachment is None:
            raise ValueError("the sparsifier is not attached: call sparsifier.attach(model) first")
        return self._attachment


def _names(module: nn.Module) -> tuple[str, ...]:
    """Return what the arguments of a module's forward are called, in their order."""
    return tuple(inspect.signature(module.forward).parameters)
