"""Hooks that open a pass on a stock model's own loop, select at layer l, and close it after the last layer.

What a call brings travels in the keywords of the stock forwards, from the model down to the layers, where the
hook takes it out: nothing lies on the model between calls, and several threads can use one model.

Legend: B batch, N tokens fed, C channels.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dynamic_llava.core import cache as caches
from dynamic_llava.core import turns
from dynamic_llava.core.attention import interface
from dynamic_llava.core.decisions import Decisions
from dynamic_llava.core.ends import Ends
from dynamic_llava.core.eviction import EvictingPass
from dynamic_llava.core.fit import REPLICA
from dynamic_llava.core.passes import masked
from dynamic_llava.core.passes.base import Given, Pass, PromptState
from dynamic_llava.core.passes.decode import DecodePass
from dynamic_llava.core.passes.prefill import PrefillPass
from dynamic_llava.core.passes.recompute import RecomputePass
from dynamic_llava.core.positions import Embedded
from dynamic_llava.core.record import Record
from dynamic_llava.core.view import MASK
from dynamic_llava.costs.shape import DecoderShape
from dynamic_llava.families import Family

CALL = "sparse_call"  # the keyword that a call travels under
POSITIONS = "image_positions"
CACHE_NAMES = ("past_key_values", "cache")  # until transformers 5.23, and since
_CHANGING = threading.Lock()  # two threads must not both exchange the attention of a model


class Call:
    """One call of an attached model; its pass is chosen at layer 0, where the cache is known."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.now: Pass | None = None


class Attachment:
    """The hooks on a model, and what must be undone to give it back.

    Parameters
    ----------
    decisions
        Makes the decisions.
    model
        The stock model.
    family
        Facts about it.
    """

    def __init__(self, decisions: Decisions, model: PreTrainedModel, family: Family) -> None:
        self.decisions, self.model, self.family = decisions, model, family
        base: Any = model.base_model
        self.decoder: Any = base.get_submodule(family.decoder)
        self.shape = DecoderShape.from_config(self.decoder.config)
        self.implementation: str = self.decoder.config._attn_implementation
        self.is_flash = "flash" in self.implementation
        kind: Any = type(base)
        names = _argument_names(kind)
        self._cache_name = next((name for name in CACHE_NAMES if name in names), "")
        self._checked: dict[str, Any] = {}
        self._embedded = Embedded(decisions, bool(family.kinds))
        self._configs: list[tuple[nn.Module, Any]] = []
        self._handles = [
            model.register_forward_pre_hook(self._check_labels, with_kwargs=True),
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._open, with_kwargs=True),
            self.decoder.register_forward_hook(self._close, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(functools.partial(self._layer, number), with_kwargs=True)
                for number, layer in enumerate(self.decoder.layers)
            ),
        ]

    def detach(self) -> None:
        """Take the hooks off again."""
        interface.give_back(self._configs)
        for handle in self._handles:
            handle.remove()

    def new_record(self) -> Record:
        """Return an empty record of a call without a cache."""
        config, element_size = copy.copy(self.decisions.config), self.model.dtype.itemsize
        return Record(config, self.shape, element_size, Ends.of(self.model))

    # Hooks

    def _check_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "_is_replica" in model.__dict__:
            raise ValueError(REPLICA)
        has_labels = kwargs.get("labels") is not None
        if args and not has_labels:
            has_labels = _by_name(model, args, kwargs).get("labels") is not None
        if not has_labels and not (self.decisions.training and torch.is_grad_enabled()):
            return  # first, for every decoded token comes by
        if kwargs.get("answer_mask") is None:
            masked.refuse_without_mask(self.decisions.config)

    def _enter(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take in what only the multimodal model sees."""
        if args:
            args, kwargs = (), _by_name(base, args, kwargs)
        answer_mask, prompt_mask = kwargs.pop("answer_mask", None), kwargs.pop("prompt_mask", None)
        own = kwargs.pop(POSITIONS, None)
        prompt, cache = None, None
        for name in CACHE_NAMES:
            value = kwargs.get(name)
            if isinstance(value, PromptState):
                prompt, kwargs = value, {**kwargs, name: None}
            elif isinstance(value, Cache):
                cache = value
        if cache is None and prompt is None and answer_mask is None and self._makes_cache(kwargs):
            kwargs[self._cache_name] = caches.growing(self.decoder.config, self.shape)
        if answer_mask is not None:
            kwargs = masked.at_full_length(kwargs, cache, self.implementation, self.model.dtype)
        elif (context := caches.context_of(cache)) is not None and context.lacks_columns(kwargs.get(MASK)):
            kwargs[MASK] = turns.with_all_columns(kwargs, context)
        pictures = self._pictures(base, kwargs, caches.context_of(cache), own)
        given = Given(pictures, kwargs.get("input_ids"), kwargs.get(MASK), answer_mask, prompt_mask, prompt)
        kwargs[CALL] = Call(given)
        return args, kwargs

    def _makes_cache(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call asks for a cache and brings none: ours is there sooner than the stock one."""
        return bool(kwargs.get("use_cache") and self._cache_name)

    def _open(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See to it that a call is there where the decoder is called by itself."""
        self.check()
        if CALL in kwargs:
            return None
        pictures = self._embedded.pictures(_by_name(decoder, args, kwargs), kwargs.pop(POSITIONS, None))
        return args, {**kwargs, CALL: Call(Given(pictures))}

    def _layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Call = kwargs.pop(CALL)
        split = self.decisions.config.layer
        if call.now is None:
            call.now = self._choose(call.given, args[0], kwargs)
        now = call.now
        if number < split:
            if number == split - 1 and now.needs_ranking:
                kwargs["probe"] = now.look(args[0], kwargs.get(MASK))
            return args, kwargs
        if number == split:
            args = (now.select(args[0], kwargs.get(MASK)), *args[1:])
        return now.arguments(args, kwargs)

    def _close(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call: Call = kwargs[CALL]
        if call.now is None:
            return
        state = call.now.close()
        if state is not None:
            # generate() hands it back at the next step; what it is called changed in transformers 5.24.
            output["cache" if hasattr(output, "cache") else "past_key_values"] = state

    # What a call is

    def _pictures(
        self, base: Any, kwargs: Mapping[str, Any], context: caches.Context | None, own: Any
    ) -> list[Tensor]:
        """Return where the tokens of each picture lie, as the ids tell or as the caller says."""
        if own is None and context is not None and not context.slots.used:
            own = context.image_positions
        if own is None and (kwargs.get("input_ids") is not None or self.family.has_pictures(kwargs)):
            return self.family.pictures(base, kwargs)
        return self._embedded.pictures(kwargs, own)

    def check(self) -> None:
        """Raise ``ValueError`` if the config, which may have been edited, does not fit the model."""
        implementation = self.decoder.config._attn_implementation
        if implementation != self.implementation:
            raise ValueError(
                f"the attention implementation became {implementation!r}: detach, set it, attach again"
            )
        config = self.decisions.config
        if self._checked == vars(config):
            return  # before the rest, for every decoded token comes by
        config.validate()
        self.decisions.check_methods()
        self.family.check_layer(self.model.config, config.layer, self.shape.layers)
        self._checked = dict(vars(config))

    def _choose(self, given: Given, hidden_BNC: Tensor, kwargs: Mapping[str, Any]) -> Pass:
        """Return the pass of a call, given the arguments of layer 0."""
        decisions, layers, split = self.decisions, self.shape.layers, self.decisions.config.layer
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        now: Pass
        if given.answer_mask_BN is not None:
            masked.refuse_reentrant(self.decoder.layers[0])
            now = masked.MaskedPass(decisions, self.new_record(), given, self.is_flash)
        elif cache is None:
            state = given.prompt or PromptState(hidden_BNC.shape[1], self.new_record())
            if state.length > hidden_BNC.shape[1]:
                raise ValueError("past_key_values is of another run and use_cache is False: leave it out")
            now = RecomputePass(decisions, state, given, self.is_flash)
        else:
            window = getattr(self.decoder.config, "sliding_window", None)
            context = caches.context_of(cache) or caches.install(
                cache, layers, split, self.new_record(), window
            )
            self._check_cache(cache, context)
            kind: Any = PrefillPass
            if context.slots.used and hidden_BNC.shape[1] == 1:
                kind = EvictingPass if decisions.evicting is not None else DecodePass
            now = kind(decisions, context, given, self.is_flash)
        if now.needs_attention:
            with _CHANGING:
                self._configs = self._configs or interface.use(self.decoder.layers)
        now.begin(*hidden_BNC.shape[:2])
        decisions.remember(now.record)
        return now

    def _check_cache(self, cache: Cache, context: caches.Context) -> None:
        layers, split = len(cache.layers), len(cache.layers) - len(context.layers)
        if (layers, split) != (self.shape.layers, self.decisions.config.layer):
            raise ValueError(
                f"past_key_values was filled with {layers} layers, sparse from {split}; the model has "
                f"{self.shape.layers}, sparse from {self.decisions.config.layer}"
            )
        if self.is_flash and context.slots.is_static:
            raise ValueError(
                f"a static cache does not work with {self.implementation}: leave out "
                "cache_implementation='static', or load the model with attn_implementation='sdpa'"
            )


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a module's forward by name."""
    kind: Any = type(module)
    names = _argument_names(kind)
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _argument_names(kind: Any) -> tuple[str, ...]:
    """Return what the arguments of a class's forward are called, in their order.

    A subclass that hands all of them on, by ``*args``, has those of the class that it stands on.
    """
    forwards = (parent.__dict__["forward"] for parent in kind.__mro__ if "forward" in parent.__dict__)
    for forward in forwards:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            return tuple(parameter.name for parameter in parameters)
    return ()
