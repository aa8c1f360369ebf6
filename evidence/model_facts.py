"""What the pages on models say of each family beside what its own file says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a page says of a family.

    Attributes
    ----------
    title
        What people call it.
    hub_id
        A checkpoint of it.
    layer
        A good first sparse layer.
    recipes
        Bundled recipes that train its predictors.
    needs
        Packages that its processor needs beside this one.
    limits
        What does not work, or otherwise than one would think; one sentence each.
    engine
        Option of ``dynamic-llava serve``: the plugin for vLLM takes LLaVA-1.5 alone.
    tested
        On what it was tested.
    """

    title: str
    hub_id: str
    layer: int = 2
    recipes: tuple[str, ...] = ()
    needs: str = ""
    limits: tuple[str, ...] = ()
    engine: str = "--engine transformers"
    tested: str = (
        "Tested on tiny models with random weights, see [Supported models](../models.md); no published\n"
        "checkpoint was run."
    )


CHUNKS = "Under `prefill_chunk_size`, pictures are told apart by the text between them."
LINES = "Text stands between the lines of a picture, so that `prefill_chunk_size` is refused."
WINDOW = (
    "A sparse layer with a sliding window holds all kept tokens, also beyond the window: the report claims "
    "no memory there. Flash attention is refused."
)
STATIC = "Where all layers end at a window, a static cache is `sparsifier.new_cache(capacity, static=True)`."
DEEPSTACK = (
    "Its first layers get features of the vision tower at all image tokens, so that `layer` must be 3 or "
    "more for the published models."
)
STAMPS = "Timestamps stand between the frames of a video, so that `prefill_chunk_size` is refused for videos."
VIDEO = "Recipes train on pictures; videos are dropped from at inference and in training code of your own."
TILE = "A picture is a tile here: the keep rate holds for each tile."
MISSPELT = (
    "The first published chat template of the Mistral variant misspells the mark that ends an answer; "
    "training puts the tokenizer's own there."
)
SPACE = (
    "The chat template writes a space more before an answer that was given than before one that is asked "
    "for; training uses the latter."
)
TORCHVISION = "torchvision"

FACTS: dict[str, Facts] = {
    "llava": Facts(
        "LLaVA-1.5 and Pixtral", "llava-hf/llava-1.5-7b-hf",
        recipes=("llava-1.5-7b-predictors", "llava-1.5-7b-lora", "llava-1.5-7b", "llava-1.5-13b"), engine="",
        tested="Checkpoints in the official format load too, see [Checkpoints](../checkpoints.md).",
        limits=("Pixtral: its processor needs torchvision.", f"Pixtral: {LINES[0].lower()}{LINES[1:]}"),
    ),
    "vipllava": Facts("VipLLaVA", "llava-hf/vip-llava-7b-hf"),
    "llava_next": Facts(
        "LLaVA-NeXT", "llava-hf/llava-v1.6-vicuna-7b-hf", recipes=("llava-next-7b-predictors",),
        limits=(CHUNKS, MISSPELT),
    ),
    "llava_onevision": Facts(
        "LLaVA-OneVision", "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        recipes=("llava-onevision-0.5b-predictors", "llava-onevision-7b-predictors"), needs=TORCHVISION,
        limits=(CHUNKS, VIDEO, SPACE),
    ),
    "qwen2_vl": Facts("Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct", needs=TORCHVISION, limits=(CHUNKS, VIDEO)),
    "qwen2_5_vl": Facts(
        "Qwen2.5-VL", "Qwen/Qwen2.5-VL-7B-Instruct",
        recipes=("qwen2.5-vl-3b-predictors", "qwen2.5-vl-7b-predictors"), needs=TORCHVISION,
        limits=(CHUNKS, VIDEO),
    ),
    "qwen3_vl": Facts(
        "Qwen3-VL", "Qwen/Qwen3-VL-8B-Instruct", layer=3,
        recipes=("qwen3-vl-4b-predictors", "qwen3-vl-8b-predictors"), needs=TORCHVISION,
        limits=(DEEPSTACK, CHUNKS, STAMPS, VIDEO),
    ),
    "qwen3_vl_moe": Facts(
        "Qwen3-VL with experts", "Qwen/Qwen3-VL-30B-A3B-Instruct", layer=3, needs=TORCHVISION,
        limits=(DEEPSTACK, CHUNKS, STAMPS, VIDEO),
    ),
    "internvl": Facts(
        "InternVL", "OpenGVLab/InternVL3-8B-hf",
        recipes=("internvl3-2b-predictors", "internvl3-8b-predictors"), needs=TORCHVISION,
        limits=("A picture is all tiles between its marks; each frame of a video is a picture.", CHUNKS),
    ),
    "smolvlm": Facts(
        "SmolVLM", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", needs="torchvision and num2words", limits=(TILE,)
    ),
    "idefics3": Facts("Idefics3", "HuggingFaceM4/Idefics3-8B-Llama3", limits=(TILE,)),
    "mistral3": Facts(
        "Mistral3", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", needs=TORCHVISION, limits=(LINES,)
    ),
    "gemma3": Facts("Gemma3", "google/gemma-3-4b-it", limits=(WINDOW,)),
    "gemma3_text": Facts("Gemma3 without a tower", "google/gemma-3-1b-it", limits=(WINDOW,)),
    "llama": Facts("Llama", "meta-llama/Llama-3.1-8B-Instruct"),
    "qwen2": Facts("Qwen2", "Qwen/Qwen2.5-7B-Instruct"),
    "qwen3": Facts("Qwen3", "Qwen/Qwen3-8B"),
    "mistral": Facts("Mistral", "mistralai/Mistral-7B-Instruct-v0.3", limits=(WINDOW, STATIC)),
    "phi3": Facts("Phi-3", "microsoft/Phi-3.5-mini-instruct"),
    "granite": Facts("Granite", "ibm-granite/granite-3.3-8b-instruct"),
    "smollm3": Facts("SmolLM3", "HuggingFaceTB/SmolLM3-3B"),
    "cohere2": Facts("Cohere2", "CohereLabs/c4ai-command-r7b-12-2024", limits=(WINDOW,)),
    "glm4": Facts("GLM-4", "zai-org/GLM-4-9B-0414"),
    "olmo2": Facts("OLMo2", "allenai/OLMo-2-1124-7B-Instruct"),
}  # fmt: skip
