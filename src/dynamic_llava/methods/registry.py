"""Methods by name: ``image/NAME.py`` and ``output/NAME.py``, and those that a user registers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dynamic_llava.config import SparsityConfig
    from dynamic_llava.methods.base import ImageMethod, Method, OutputMethod

M = TypeVar("M", bound="type[Method]")
KINDS = {"image": "image_policy", "output": "text_policy"}  # a folder, and the setting that names its files

_OWN: dict[str, dict[str, type[Method]]] = {kind: {} for kind in KINDS}


def names(kind: str) -> tuple[str, ...]:
    """Return the names of all methods for ``"image"`` or ``"output"`` tokens; imports none of them."""
    return (*_files(kind), *_OWN[kind])


def register(name: str) -> Callable[[M], M]:
    """Give a method of one's own a name, under which configs, files and commands know it.

    Parameters
    ----------
    name
        A name that no method has yet.

    Returns
    -------
    Callable
        A decorator for a subclass of ``ImageMethod`` or ``OutputMethod``.

    Raises
    ------
    ValueError
        If another method has the name.
    TypeError
        If it is no such class.

    Examples
    --------
    >>> @register("loudest")  # doctest: +SKIP
    ... class Loudest(ImageMethod):
    ...     def score(self, pictures):
    ...         return pictures.hidden_KIC.norm(dim=-1)
    """

    def add(method: M) -> M:
        kind = _kind(method)
        if name in _files(kind) or _OWN[kind].get(name, method) is not method:
            raise ValueError(f"there is a method {name!r} for {kind} tokens already: choose another name")
        _OWN[kind][name] = method
        return method

    return add


def find(kind: str, name: str) -> type[Method]:
    """Return the class of the method called ``name``.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name in _OWN[kind]:
        return _OWN[kind][name]
    if name not in _files(kind):
        raise ValueError(f"{KINDS[kind]} is {name!r}: choose one of {', '.join(names(kind))}")
    return _in_file(kind, name)


def settings_of(method: type[Method]) -> dict[str, Any]:
    """Return the names of a method's settings and their defaults."""
    return {setting.name: setting.default for setting in dataclasses.fields(method)}


def summary_of(method: type[Method]) -> str:
    """Return the first line of the file that a method stands in, or of its class where it has no file."""
    module = inspect.getmodule(method)
    text = (
        module.__doc__ if method.__module__.startswith(__package__ or "") and module else None
    ) or method.__doc__
    return (text or method.__name__).strip().splitlines()[0]


def image_method(policy: str | ImageMethod, options: Mapping[str, Any]) -> ImageMethod:
    """Return the method for image tokens that ``image_policy`` and ``image_options`` ask for."""
    return _made("image", policy, options)


def output_method(policy: str | OutputMethod, options: Mapping[str, Any]) -> OutputMethod:
    """Return the method for output tokens that ``text_policy`` and ``text_options`` ask for."""
    return _made("output", policy, options)


def _name_of(kind: str, policy: str | Method) -> str:
    """Return the name of a method that is given by name or as an object.

    Raises
    ------
    ValueError
        If it is an object of a class that nobody registered.
    """
    if isinstance(policy, str):
        return policy
    for name in names(kind):
        if find(kind, name) is type(policy):
            return name
    raise ValueError(
        f"{KINDS[kind]} is a {type(policy).__name__} that has no name: register its class by "
        "dynamic_llava.methods.register(name) before it is saved"
    )


def by_name(config: SparsityConfig) -> SparsityConfig:
    """Return a copy of a config in which methods that are given as objects are names and options.

    Raises
    ------
    ValueError
        If the class of one has no name.
    """
    changes: dict[str, Any] = {}
    for kind, setting in KINDS.items():
        policy = getattr(config, setting)
        changes[setting] = _name_of(kind, policy)
        if not isinstance(policy, str):
            changes[setting.replace("policy", "options")] = dataclasses.asdict(policy)
    return dataclasses.replace(config, **changes)


def _made(kind: str, policy: Any, options: Mapping[str, Any]) -> Any:
    if not isinstance(policy, str):
        if _kind(type(policy)) != kind:
            raise ValueError(f"{KINDS[kind]} is a {type(policy).__name__}, which is no method for it")
        return policy
    method: Any = find(kind, policy)
    try:
        return method(**options)
    except TypeError:
        known = settings_of(method)
        if not (unknown := sorted(set(options) - set(known))):
            raise
        setting, all_known = KINDS[kind].replace("policy", "options"), ", ".join(known) or "none"
        raise ValueError(f"{setting} has {unknown[0]}: the settings of {policy!r} are: {all_known}") from None


def _kind(method: Any) -> str:
    from dynamic_llava.methods import base

    for kind, parent in (("image", base.ImageMethod), ("output", base.OutputMethod)):
        if inspect.isclass(method) and issubclass(method, parent):
            return kind
    raise TypeError(f"{method!r} is no class of methods: derive it from ImageMethod or OutputMethod")


@functools.cache
def _files(kind: str) -> tuple[str, ...]:
    return tuple(sorted(found.name for found in pkgutil.iter_modules([str(Path(__file__).parent / kind)])))


@functools.cache
def _in_file(kind: str, name: str) -> type[Method]:
    module = importlib.import_module(f"dynamic_llava.methods.{kind}.{name}")
    parts: Iterable[Any] = vars(module).values()
    return next(
        part for part in parts if hasattr(part, "needs_predictor") and part.__module__ == module.__name__
    )
