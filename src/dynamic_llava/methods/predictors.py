"""The two small networks that decide what stays (paper, section 3.2).

Module names follow the official checkpoints (``down_mlp``, ``transformer``, ``output_mlp``), so that their
weights fit. Both return two logits a token; channel 0 means keep.

Legend: B batch, K pictures, N tokens, I image tokens, C channels, D predictor width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynamic_llava.config import SparsityConfig


class Attention(nn.Module):
    """Bidirectional self-attention with a fused qkv projection without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_KID: Tensor) -> Tensor:
        """Mix the tokens of each picture."""
        pictures, tokens, width = x_KID.shape
        qkv = (
            self.qkv(x_KID).view(pictures, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        out_KHIE = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(out_KHIE.transpose(1, 2).reshape(pictures, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token alone."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x_KID: Tensor) -> Tensor:
        """Apply attention and MLP, each with its residual."""
        x_KID = x_KID + self.attn(self.norm1(x_KID))
        return x_KID + self.mlp(self.norm2(x_KID))


def _head(width: int) -> list[nn.Module]:
    """Width to two logits, halving twice."""
    return [
        nn.Linear(width, width // 2),
        nn.GELU(),
        nn.Linear(width // 2, width // 4),
        nn.GELU(),
        nn.Linear(width // 4, 2),
    ]


class ImagePredictor(nn.Module):
    """Score the image tokens of a picture by their hidden states entering layer l.

    Parameters
    ----------
    hidden_size
        Width C of the decoder.
    width, heads, hidden, layers
        Width, attention heads, feed-forward width and number of the transformer blocks.
    """

    def __init__(self, hidden_size: int, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.down_mlp = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU())
        self.transformer = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.output_mlp = nn.Sequential(*_head(width))

    def forward(self, hidden_KIC: Tensor) -> Tensor:
        """Return keep/drop logits ``[K, I, 2]`` of ``hidden_KIC``; pictures do not see each other."""
        x_KID = self.down_mlp(hidden_KIC)
        for block in self.transformer:
            x_KID = block(x_KID)
        local, shared = x_KID.chunk(2, dim=-1)
        pooled = shared.mean(dim=1, keepdim=True).expand_as(shared)
        return self.output_mlp(torch.cat([local, pooled], dim=-1))


class TextPredictor(nn.Module):
    """Decide on one output token by its own hidden state entering layer l.

    Parameters
    ----------
    hidden_size
        Width C of the decoder.
    width
        Width of the first layer of the MLP.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU(), *_head(width)
        )

    def forward(self, hidden_BNC: Tensor) -> Tensor:
        """Return keep/drop logits ``[B, N, 2]`` of ``hidden_BNC``, each token alone."""
        return self.output_mlp(hidden_BNC)


def image_predictor_flops(config: SparsityConfig, hidden_size: int, tokens: float) -> float:
    """Return the FLOPs of scoring the ``tokens`` image tokens of one picture."""
    width = config.d_model
    block = 2 * tokens * (4 * width**2 + 2 * width * config.dim_feedforward) + 4 * tokens**2 * width
    return 2 * tokens * (hidden_size * width + _head_products(width)) + config.num_layers * block


def text_predictor_flops(config: SparsityConfig, hidden_size: int) -> float:
    """Return the FLOPs of the decision on one output token."""
    return 2 * (hidden_size * config.d_model + _head_products(config.d_model))


def _head_products(width: int) -> float:
    """Multiplications of the MLP that ends in two logits."""
    return width * width / 2 + width * width / 8 + width / 2
