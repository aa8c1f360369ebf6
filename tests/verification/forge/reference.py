"""The official computation in plain torch, from its written formulas only: nothing of the library is used.

One row is one full-length pass in which masks hide what was dropped, so that it shares no code path, and no
idea, with a cache that overwrites slots. Weights have the names of the official checkpoints.

Legend: N tokens, I image tokens, C channels, H heads, D head size, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
MARKER = (11889, 29901)
TOWER = "vision_tower.vision_tower.vision_model."


@dataclass
class Row:
    """Everything about one row; the tokens of a call see each other, later calls see only what is kept."""

    embeds_NC: Tensor
    entering_NC: Tensor
    image: range
    question: range
    image_logits_I2: Tensor
    image_kept: list[int]
    question_logits_N2: Tensor
    keep_N: Tensor
    vanished_N: Tensor
    call_N: Tensor
    text_logits_N2: Tensor
    last_hidden_NC: Tensor
    logits_NV: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class Reference:
    """A model: official ``weights`` and the official ``config`` and vision config."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any], vision: dict[str, Any]) -> None:
        self.weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        self.config, self.vision, self.sparse = config, vision, config["sparse_config"]

    # Pieces

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        variance = x.square().mean(-1, keepdim=True)
        return x * (variance + self.config["rms_norm_eps"]).rsqrt() * self.weights[f"{name}.weight"]

    def heads(self, x_NC: Tensor, count: int) -> Tensor:
        return x_NC.view(len(x_NC), count, -1).transpose(0, 1)

    def embed_picture(self, pixels_3SS: Tensor) -> Tensor:
        """Image features ``[I, C]``: the tower's last but one state, without class token, projected."""
        w, vision = self.weights, self.vision
        patches = F.conv2d(
            pixels_3SS[None], w[f"{TOWER}embeddings.patch_embedding.weight"], stride=vision["patch_size"]
        )
        x = torch.cat([w[f"{TOWER}embeddings.class_embedding"][None], patches[0].flatten(1).T])
        x = self.layer_norm(x + w[f"{TOWER}embeddings.position_embedding.weight"], f"{TOWER}pre_layrnorm")
        for i in range(vision["num_hidden_layers"] - 1):
            layer = f"{TOWER}encoder.layers.{i}."
            normed = self.layer_norm(x, f"{layer}layer_norm1")
            q, k, v = (
                self.heads(
                    self.linear(normed, f"{layer}self_attn.{name}_proj"), vision["num_attention_heads"]
                )
                for name in "qkv"
            )
            mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x + self.linear(mixed.transpose(0, 1).flatten(1), f"{layer}self_attn.out_proj")
            wide = self.linear(self.layer_norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1")
            x = x + self.linear(wide * (1.702 * wide).sigmoid(), f"{layer}mlp.fc2")
        return self.linear(F.gelu(self.linear(x[1:], "mm_projector.0")), "mm_projector.2")

    def image_logits(self, x_IC: Tensor) -> Tensor:
        """Keep/drop logits ``[I, 2]`` of the image predictor."""
        name = "image_score_predictor."
        x = F.gelu(self.linear(self.layer_norm(x_IC, f"{name}down_mlp.0"), f"{name}down_mlp.1"))
        for i in range(self.sparse["num_layers"]):
            block = f"{name}transformer.{i}."
            fused = self.linear(self.layer_norm(x, f"{block}norm1"), f"{block}attn.qkv")
            q, k, v = (self.heads(part, self.sparse["nhead"]) for part in fused.chunk(3, dim=-1))
            mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x + self.linear(mixed.transpose(0, 1).flatten(1), f"{block}attn.proj")
            wide = F.gelu(self.linear(self.layer_norm(x, f"{block}norm2"), f"{block}mlp.fc1"))
            x = x + self.linear(wide, f"{block}mlp.fc2")
        half = x.shape[-1] // 2
        x = torch.cat([x[:, :half], x[:, half:].mean(0, keepdim=True).expand(len(x), -1)], dim=-1)
        x = F.gelu(self.linear(x, f"{name}output_mlp.0"))
        return self.linear(F.gelu(self.linear(x, f"{name}output_mlp.2")), f"{name}output_mlp.4")

    def text_logits(self, x_NC: Tensor, name: str) -> Tensor:
        """Keep/drop logits ``[N, 2]`` of a text predictor."""
        x = self.layer_norm(x_NC, f"{name}.output_mlp.0")
        for i in (1, 3, 5):
            x = F.gelu(self.linear(x, f"{name}.output_mlp.{i}"))
        return self.linear(x, f"{name}.output_mlp.7")

    def layer(
        self, x_NC: Tensor, index: int, visible_NN: Tensor, policy_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One decoder layer; also its keys (rotated) and values ``[H, N, D]``."""
        name, config = f"layers.{index}.", self.config
        normed = self.rms_norm(x_NC, f"{name}input_layernorm")
        counts = (config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"])
        q, k, v = (
            self.heads(self.linear(normed, f"{name}self_attn.{part}_proj"), count)
            for part, count in zip("qkv", counts, strict=True)
        )
        q, k = self.rotate(q), self.rotate(k)
        groups = counts[0] // counts[1]
        scores = (q @ k.repeat_interleave(groups, 0).mT) * q.shape[-1] ** -0.5
        weights = masked_softmax(scores.masked_fill(~visible_NN, -torch.inf), policy_N)
        mixed = weights @ v.repeat_interleave(groups, 0)
        x_NC = x_NC + self.linear(mixed.transpose(0, 1).flatten(1), f"{name}self_attn.o_proj")
        normed = self.rms_norm(x_NC, f"{name}post_attention_layernorm")
        gated = F.silu(self.linear(normed, f"{name}mlp.gate_proj")) * self.linear(
            normed, f"{name}mlp.up_proj"
        )
        return x_NC + self.linear(gated, f"{name}mlp.down_proj"), k, v

    def rotate(self, x_HND: Tensor) -> Tensor:
        """Rotary embedding of the positions 0 to N-1."""
        half = x_HND.shape[-1] // 2
        rates = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(x_HND.shape[1])[:, None] * rates
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        return x_HND * cos + torch.cat([-x_HND[..., half:], x_HND[..., :half]], -1) * sin

    # Inference

    def embed(self, ids: list[int], pixels_3SS: Tensor) -> tuple[Tensor, range]:
        """Embeddings with the picture in place of -200, and where it lies."""
        at, features_IC = ids.index(-200), self.embed_picture(pixels_3SS)
        before, after = (self.weights["embed_tokens.weight"][part] for part in (ids[:at], ids[at + 1 :]))
        return torch.cat([before, features_IC, after]), range(at, at + len(features_IC))

    def question(self, ids: list[int], image: range, end: int) -> range:
        """The last question: from the last marker after the picture, or the picture's end, to ``end``."""
        shift = len(image) - 1
        starts = [i + shift for i in range(ids.index(-200) + 1, end - shift - 1)]
        found = [i for i in starts if tuple(ids[i - shift : i - shift + 2]) == MARKER]
        return range(found[-1] if found else image.stop, end)

    def run(self, ids: list[int], pixels_3SS: Tensor, calls: list[list[int]], **off: bool) -> Row:
        """Feed a prompt and then ``calls``; ``image``, ``text`` and ``question`` may be switched off."""
        s, split = self.sparse, self.sparse["sparse_layer"]
        x, image = self.embed(ids, pixels_3SS)
        prompt = len(x)
        fed = [token for call in calls for token in call]
        x = embeds = torch.cat([x, self.weights["embed_tokens.weight"][fed]])
        sizes = [prompt, *map(len, calls)]
        call_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        causal_NN = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        keys, values = [], []
        for i in range(split):
            x, k, v = self.layer(x, i, causal_NN)
            keys, values = [*keys, k], [*values, v]
        entering = x
        keep_N = torch.ones(len(x), dtype=torch.bool)
        image_logits = self.image_logits(x[image.start : image.stop])
        count = int(len(image) * s["vision_keep_rate"]) if off.get("image", True) else len(image)
        ranking = image_logits.log_softmax(-1)[:, 0].argsort(descending=True)
        image_kept = sorted(ranking[:count].tolist())
        keep_N[image.start : image.stop] = False
        keep_N[[image.start + i for i in image_kept]] = True
        question = self.question(ids, image, prompt)
        text_logits = self.text_logits(x, "output_text_score_predictor")
        question_logits = torch.zeros_like(text_logits)
        asks = s["use_instruct_predictor"] and off.get("question", True)
        if asks:
            question_logits = self.text_logits(x, "instruct_score_predictor")
            is_kept_N = question_logits[:, 0] > question_logits[:, 1]
            keep_N[question.start : question.stop - 1] = is_kept_N[question.start : question.stop - 1]
        vanished_N = ~keep_N
        at = prompt
        for call in calls:
            logits = text_logits if len(call) == 1 else question_logits
            decides = off.get("text", True) if len(call) == 1 else asks
            last = at + len(call) - (len(call) > 1)  # the last token of a new turn stays
            if decides:
                keep_N[at:last] = logits[at:last, 0] > logits[at:last, 1]
            at += len(call)
        visible_NN = causal_NN & (keep_N | (call_N == call_N[:, None])) & ~vanished_N
        visible_NN |= torch.eye(len(x), dtype=torch.bool)
        for i in range(split, self.config["num_hidden_layers"]):
            x, k, v = self.layer(x, i, visible_NN)
            keys, values = [*keys, k], [*values, v]
        last_hidden = self.rms_norm(x, "norm")
        return Row(
            embeds, entering, image, question, image_logits, image_kept, question_logits, keep_N, vanished_N,
            call_N, text_logits, last_hidden, self.linear(last_hidden, "lm_head"), keys, values,
        )  # fmt: skip

    # Training

    def train_row(self, x_NC: Tensor, policy: Any) -> tuple[Tensor, Tensor, Tensor]:
        """One row at full length; ``policy(entering)`` weighs keys. Returns entering, last hidden, logits."""
        causal_NN = torch.ones(len(x_NC), len(x_NC), dtype=torch.bool).tril()
        x = x_NC
        for i in range(self.sparse["sparse_layer"]):
            x, _, _ = self.layer(x, i, causal_NN)
        entering, policy_N = x, policy(x)
        for i in range(self.sparse["sparse_layer"], self.config["num_hidden_layers"]):
            x, _, _ = self.layer(x, i, causal_NN, policy_N)
        last_hidden = self.rms_norm(x, "norm")
        return entering, last_hidden, self.linear(last_hidden, "lm_head")


def masked_softmax(scores_HNN: Tensor, policy_N: Tensor | None) -> Tensor:
    """The official weights: ordinary without a policy, with its eps otherwise."""
    if policy_N is None:
        return scores_HNN.softmax(-1)
    count = scores_HNN.shape[-1]
    own_NN = torch.eye(count)
    weighted = (scores_HNN - scores_HNN.amax(-1, keepdim=True)).exp()
    weighted = weighted * (policy_N + (1 - policy_N) * own_NN)
    return (weighted + EPS / count) / (weighted.sum(-1, keepdim=True) + EPS)


def gumbel(logits_N2: Tensor, noise_N2: Tensor, tau: float) -> Tensor:
    """The straight-through mask ``[N]``."""
    y = ((logits_N2.log_softmax(-1) - noise_N2.log()) / tau).softmax(-1)
    hard = F.one_hot(y.argmax(-1), 2)
    return (hard - y.detach() + y)[..., 0]
