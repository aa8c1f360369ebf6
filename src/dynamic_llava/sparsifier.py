"""The sparsifier: two predictors and a config, attached to a stock model and taken off again.

Legend: B batch, K pictures, I image tokens, N tokens, A answer tokens, C channels.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynamic_llava import attention, policies
from dynamic_llava.cache import SparseCache
from dynamic_llava.config import SparsityConfig
from dynamic_llava.decoder import sparse_forward
from dynamic_llava.files import replacing, write_json
from dynamic_llava.flops import DecoderShape
from dynamic_llava.passes import ordinals
from dynamic_llava.predictors import ImagePredictor, TextPredictor
from dynamic_llava.report import Report
from dynamic_llava.selection import gather_tokens, keep_count, right_align, top_k_mask

CONFIG_FILE = "sparsifier_config.json"
WEIGHTS_FILE = "sparsifier.safetensors"


@dataclass
class _Attachment:
    """What must be undone to give the stock model back."""

    model: PreTrainedModel
    language_model: nn.Module
    shape: DecoderShape
    implementation: str
    own_forward: Any
    keys_to_ignore_on_save: Any
    handles: list[Any]


class Sparsifier(nn.Module):
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
    report : Report or None
        What the last call kept. Each call, or all calls with one cache, own their report.

    Examples
    --------
    >>> sparsifier = Sparsifier(SparsityConfig(), hidden_size=4096)  # doctest: +SKIP
    >>> with sparsifier(model):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    def __init__(self, config: SparsityConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.tau = 1.0
        self.report: Report | None = None
        self.image_predictor = ImagePredictor(
            hidden_size, config.d_model, config.nhead, config.dim_feedforward, config.num_layers
        )
        self.text_predictor = TextPredictor(hidden_size, config.d_model)
        self._attachment: _Attachment | None = None

    # Attaching

    def attach(self, model: PreTrainedModel) -> Sparsifier:
        """Take over the pass of ``model``'s decoder; the model itself becomes the owner, as ``model.sparsifier``.

        Parameters
        ----------
        model
            A stock model such as ``LlavaForConditionalGeneration``, with sdpa or eager attention.

        Returns
        -------
        Sparsifier
            Itself, moved to the model's device and dtype.

        Raises
        ------
        ValueError
            If it does not fit the model, or if either is attached already.
        """
        self._check_fit(model)
        language_model = model.model.language_model
        weight = language_model.norm.weight
        self.to(device=weight.device, dtype=weight.dtype).train(model.training)
        self._attachment = _Attachment(
            model,
            language_model,
            shape=DecoderShape.from_config(language_model.config),
            implementation=language_model.config._attn_implementation,
            own_forward=language_model.__dict__.get("forward"),
            keys_to_ignore_on_save=model._keys_to_ignore_on_save,
            handles=[
                model.register_forward_pre_hook(self._check_labels, with_kwargs=True),
                model.model.register_forward_pre_hook(self._find_images, with_kwargs=True),
            ],
        )
        model.sparsifier = self
        own_keys = {f"sparsifier.{name}" for name in self.state_dict()}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *own_keys}
        # The layers get a config of their own: the shared one, which users read and set, stays as it is.
        policy_config = copy.copy(language_model.config)
        policy_config._attn_implementation = attention.register(policy_config._attn_implementation)
        for layer in language_model.layers:
            layer.self_attn.config = policy_config
        language_model.forward = functools.partial(sparse_forward, language_model, sparsifier=self)
        return self

    def detach(self) -> None:
        """Give the stock model back exactly as it was; without effect if not attached."""
        if self._attachment is None:
            return
        attachment, self._attachment = self._attachment, None
        model, language_model = attachment.model, attachment.language_model
        del language_model.forward
        if attachment.own_forward is not None:
            language_model.forward = attachment.own_forward
        for layer in language_model.layers:
            layer.self_attn.config = language_model.config
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

    # Decisions, used by the passes

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
                f"the attention implementation became {implementation!r} after attaching: detach, set it, attach again"
            )

    def keep_image_tokens(self, hidden_KIC: Tensor) -> Tensor:
        """Return the bool decision ``[K, I]`` on the image tokens of each picture."""
        pictures, tokens, _ = hidden_KIC.shape
        if not self.drops_image_tokens(tokens):
            return torch.ones(pictures, tokens, dtype=torch.bool, device=hidden_KIC.device)
        scores_KI = self._policy(self.config.image_policy).score(hidden_KIC)
        return top_k_mask(scores_KI, keep_count(tokens, self.config.image_keep_rate))

    def drops_image_tokens(self, tokens: int) -> bool:
        """Return whether a picture of ``tokens`` image tokens loses any."""
        return self.config.sparsify_image and keep_count(tokens, self.config.image_keep_rate) < tokens

    def keep_text_tokens(self, hidden_BNC: Tensor, ordinal_BN: Tensor) -> Tensor:
        """Return the bool decision ``[B, N]`` on output tokens, given their index within their answer."""
        return self._policy(self.config.text_policy).keep(hidden_BNC, ordinal_BN)

    def training_policy(
        self, hidden_BNC: Tensor, image_positions_KI: Tensor | None, answer_mask_BN: Tensor, report: Report
    ) -> Tensor:
        """Return the weight of each key in a training pass, float32 ``[B, N]``, and record its parts in ``report``.

        Image tokens and the tokens marked by ``answer_mask_BN`` get straight-through masks; answers shorter than
        ``min_answer_length`` and everything else get ones.
        """
        config = self.config
        policy_BN = report.text_mask_BN = self._train_text(hidden_BNC, answer_mask_BN)
        report.answer_mask_BN = answer_mask_BN
        if image_positions_KI is None:
            return policy_BN
        hidden_KIC = hidden_BNC.flatten(0, 1)[image_positions_KI]
        mask_KI = hidden_KIC.new_ones(hidden_KIC.shape[:2], dtype=torch.float32)
        if config.sparsify_image:
            policy = self._policy(config.image_policy)
            mask_KI = policy.train_image_mask(hidden_KIC, config.image_keep_rate, self.tau).float()
        report.image_mask_BI = mask_KI
        flat = policy_BN.flatten().scatter(0, image_positions_KI.flatten(), mask_KI.flatten())
        return flat.view_as(policy_BN)

    def ratio_loss(self) -> tuple[Tensor, Tensor]:
        """Return the image and the text penalty of the last training pass, before ``ratio_weight`` (paper, eq. 10).

        Mean over pictures, and over rows, of the squared difference between the target keep rate and the mean of the
        mask; rows with a short answer count as 0.

        Raises
        ------
        ValueError
            If the last call was no masked pass in training mode.
        """
        report, config = self.report, self.config
        if report is None or report.text_mask_BN is None or report.answer_mask_BN is None:
            raise ValueError(
                "ratio_loss needs a training pass first: model.train(), then model(..., answer_mask=...)"
            )
        image_loss = text_loss = report.text_mask_BN.new_zeros(())
        if config.sparsify_image and report.image_mask_BI is not None:
            image_loss = (config.image_keep_rate - report.image_mask_BI.mean(-1)).square().mean()
        if config.sparsify_text:
            length_B = report.answer_mask_BN.sum(-1)
            kept_B = (report.text_mask_BN * report.answer_mask_BN).sum(-1) / length_B.clamp(min=1)
            penalty_B = (config.text_keep_rate - kept_B).square()
            text_loss = (penalty_B * self._is_long(report.answer_mask_BN)).mean()
        return image_loss, text_loss

    def new_report(self, like: Tensor) -> Report:
        """Return an empty report of a call without a cache."""
        return Report(copy.copy(self.config), self._attached.shape, like.element_size())

    def new_cache(self, like: Tensor) -> SparseCache:
        """Return an empty cache with its report."""
        return SparseCache(self._attached.shape.layers, self.config.layer, self.new_report(like))

    def check_cache(self, cache: SparseCache) -> None:
        """Raise ``ValueError`` if ``cache`` was filled with another layer l or by another decoder."""
        if (len(cache), cache.split) != (self._attached.shape.layers, self.config.layer):
            raise ValueError(
                f"past_key_values was filled with {len(cache)} layers, sparse from {cache.split}; the model has "
                f"{self._attached.shape.layers}, sparse from {self.config.layer}"
            )

    def _train_text(self, hidden_BNC: Tensor, answer_mask_BN: Tensor) -> Tensor:
        policy_BN = torch.ones_like(answer_mask_BN, dtype=torch.float32)
        if not self.config.sparsify_text:
            return policy_BN
        index_BA, valid_BA = right_align(answer_mask_BN)
        policy = self._policy(self.config.text_policy)
        ordinal_BA = ordinals(answer_mask_BN).gather(1, index_BA)
        mask_BA = policy.train_text_mask(gather_tokens(hidden_BNC, index_BA), ordinal_BA, self.tau).float()
        droppable_BA = valid_BA & self._is_long(answer_mask_BN)[:, None]
        return policy_BN.scatter(1, index_BA, torch.where(droppable_BA, mask_BA, 1.0))

    def _is_long(self, answer_mask_BN: Tensor) -> Tensor:
        return answer_mask_BN.sum(-1) >= max(self.config.min_answer_length, 1)

    def _policy(self, name: str) -> policies.Policy:
        return policies.build(name, self.config, self.image_predictor, self.text_predictor)

    # Hooks on the stock model

    def _check_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        drops = self.config.sparsify_image or self.config.sparsify_text
        if drops and kwargs.get("labels") is not None and kwargs.get("answer_mask") is None:
            raise ValueError(
                "labels need a pass at full length: also pass answer_mask, bool [batch, tokens], True at the output "
                "tokens that may be dropped (all False where none may)"
            )

    def _find_images(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tell the decoder where the tokens of each picture lie, for only this level sees ids and pictures."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        pixel_values = given.get("pixel_values")
        if encoded is None and pixel_values is None:
            return args, kwargs
        if given.get("image_sizes") is not None:
            raise ValueError(
                "image_sizes was given: pictures of different numbers of image tokens are not supported"
            )
        pictures = len(pixel_values if encoded is None else encoded.pooler_output)
        mask_BN = self._image_token_mask(module, given)
        total = int(mask_BN.sum())
        if total == 0 or total % pictures:
            raise ValueError(
                f"the prompts hold {total} image tokens for {pictures} pictures: give each picture one image placeholder"
            )
        positions_KI = mask_BN.flatten().nonzero().view(pictures, -1)
        return args, {**kwargs, "image_positions_KI": positions_KI}

    def _image_token_mask(self, module: nn.Module, given: dict[str, Any]) -> Tensor:
        token = module.config.image_token_id
        if given.get("input_ids") is not None:
            return given["input_ids"] == token
        embeds_BNC = given["inputs_embeds"]
        embedding = module.get_input_embeddings()(torch.tensor(token, device=embeds_BNC.device))
        return (embeds_BNC == embedding).all(-1)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``sparsifier.safetensors`` and ``sparsifier_config.json`` into ``folder``."""
        folder = Path(folder)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with replacing(folder / WEIGHTS_FILE) as partial:
            save_file(state, partial, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, {"hidden_size": self.hidden_size, **self.config.to_dict()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Sparsifier:
        """Read what :meth:`save_pretrained` wrote.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If a file is broken, or a tensor missing, unexpected or misshapen.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist: {folder} holds no sparsifier")
        try:
            values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            hidden_size = values.pop("hidden_size")
            sparsifier = cls(SparsityConfig.from_dict(values), hidden_size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG_FILE} is no sparsifier config: {error}") from error
        try:
            state = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} is broken: {error}") from error
        check_tensors(state, sparsifier.state_dict(), folder / WEIGHTS_FILE)
        sparsifier.load_state_dict(state)
        sparsifier.to(next(iter(state.values())).dtype)
        return sparsifier

    @property
    def _attached(self) -> _Attachment:
        if self._attachment is None:
            raise ValueError("the sparsifier is not attached: call sparsifier.attach(model) first")
        return self._attachment

    def _check_fit(self, model: PreTrainedModel) -> None:
        if self._attachment is not None or hasattr(model, "sparsifier"):
            raise ValueError("model or sparsifier is attached already: call sparsifier.detach() first")
        config = model.model.language_model.config
        if config.hidden_size != self.hidden_size:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, the model's decoder has {config.hidden_size}"
            )
        if self.config.layer >= config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise ValueError(
                f"layer is {self.config.layer}: the decoder has {last + 1} layers, choose 1 to {last}"
            )
        if config._attn_implementation not in attention.STOCK_ATTENTION:
            raise ValueError(
                f"attention implementation {config._attn_implementation!r} is not supported: load the model with "
                f"attn_implementation set to {' or '.join(attention.STOCK_ATTENTION)}"
            )
        if getattr(config, "sliding_window", None):
            raise ValueError("the decoder has sliding-window attention, which is not supported")


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], source: Path) -> None:
    """Raise ``ValueError`` naming the first tensor that is missing, unexpected or of another shape."""
    for name in sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"{source}: tensor {name} is {'missing' if name in expected else 'unexpected'}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
            )
