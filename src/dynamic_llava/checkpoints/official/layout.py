"""Names of tensors in the official code, and what they are called here.

On our side names are module paths, such as ``model.language_model.norm.weight`` and
``sparsifier.text_predictor...``.
"""

from __future__ import annotations

TOWER = "model.vision_tower.vision_tower.vision_model."
PREFIXES = {
    "model.image_score_predictor.": "sparsifier.image_predictor.",
    "model.output_text_score_predictor.": "sparsifier.text_predictor.",
    "model.instruct_score_predictor.": "sparsifier.prompt_predictor.",
    TOWER: "model.vision_tower.",
    "model.mm_projector.": "model.multi_modal_projector.",
    "lm_head.": "lm_head.",
    "model.": "model.language_model.",
}
MLP2X = {"0.": "linear_1.", "2.": "linear_2."}
PREDICTORS = tuple(old for old, new in PREFIXES.items() if new.startswith("sparsifier."))
# Without a counterpart here: the newline between the tiles of LLaVA-1.6, and buffers that models compute.
WITHOUT_COUNTERPART = ("model.image_newline", ".rotary_emb.inv_freq", ".position_ids")


def has_counterpart(name: str) -> bool:
    """Tell whether an official tensor means anything here; the others are kept aside for the way back."""
    return not name.endswith(WITHOUT_COUNTERPART)


def to_ours(name: str, projector: str) -> str:
    """Return the module path of an official tensor."""
    prefix = next((old for old in PREFIXES if name.startswith(old)), None)
    if prefix is None:
        return name
    rest = name.removeprefix(prefix)
    if prefix == "model.mm_projector." and projector == "mlp2x_gelu":
        rest = next(
            (new + rest.removeprefix(old) for old, new in MLP2X.items() if rest.startswith(old)), rest
        )
    return PREFIXES[prefix] + rest


def to_official(name: str, projector: str) -> str:
    """Return the official name of a module path: the inverse of :func:`to_ours`."""
    longest = sorted(PREFIXES.items(), key=lambda item: -len(item[1]))
    old, new = next((old, new) for old, new in longest if name.startswith(new))
    rest = name.removeprefix(new)
    if old == "model.mm_projector." and projector == "mlp2x_gelu":
        rest = next(short + rest.removeprefix(long) for short, long in MLP2X.items() if rest.startswith(long))
    return old + rest
