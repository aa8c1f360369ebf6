"""Tiny processors of every family that takes pictures.

Each has a small tokenizer with the real special tokens, the public chat template, and small pictures.

The templates are those of the named checkpoints on the hub, shortened to what questions, pictures and answers
take: system turns, tools and checks are left out, and nothing that is written differs.

Some of these processors need torchvision, and say so when they are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

VOCABULARY = 420
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizer, and much the same Llama 3's, parts words."""

TEXT = (
    "what colour is the round shape in the middle? it is a deep red, I think.\n\nand which one is left?",
    "user\nassistant\nUser: Assistant: USER: ASSISTANT: the left one.\n\n\nsystem\nYou are a helpful one.",
)

VICUNA = """{% for message in messages %}{{ message['role'].upper() + ': '}}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}\
{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-vicuna-7b-hf"""

MISTRAL_NEXT = """{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}\
{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + END }}{% endif %}{% endfor %}"""
"""llava-hf/llava-v1.6-mistral-7b-hf; its first version closed answers with a backslash"""

LLAMA_NEXT = """{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n' }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '\n<image>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ '\n' + part['text'] + '<|eot_id|>' }}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
"""llava-hf/llama3-llava-next-8b-hf"""

ONEVISION = """{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}{% else %}{{ '\n' + part['text'] }}\
{% endif %}{% endfor %}{{'<|im_end|>'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""llava-hf/llava-onevision-qwen2-7b-ov-hf"""

QWEN = """{% for message in messages %}{% if loop.first %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct"""

QWEN3 = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}\
{%- for part in message.content %}{%- if part.type == 'image' %}\
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}\
{%- elif 'text' in part %}{{- part.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""Qwen/Qwen3-VL-8B-Instruct"""

INTERNVL = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{'<|im_end|>\n'}}{% endfor %}\
{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"""
"""OpenGVLab/InternVL3-8B-hf"""

IDEFICS3 = """<|begin_of_text|>{% for message in messages %}{{message['role'].capitalize()}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
"""HuggingFaceM4/Idefics3-8B-Llama3"""

SMOLVLM = IDEFICS3.replace("<|begin_of_text|>", "<|im_start|>")
"""HuggingFaceTB/SmolVLM2-2.2B-Instruct"""

PIXTRAL = """{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{- '[INST]' }}\
{%- for chunk in message['content'] %}{%- if chunk['type'] == 'text' %}{{- chunk['text'] }}\
{%- else %}{{- '[IMG]' }}{%- endif %}{%- endfor %}{{- '[/INST]' }}\
{%- else %}{{- message['content'][0]['text'] + eos_token }}{%- endif %}{%- endfor %}"""
"""mistral-community/pixtral-12b"""

MISTRAL3 = PIXTRAL.replace(
    "{%- for message", "{{- '[SYSTEM_PROMPT]You answer.[/SYSTEM_PROMPT]' }}{%- for message", 1
)
"""mistralai/Mistral-Small-3.1-24B-Instruct-2503"""

GEMMA3 = """{{ bos_token }}{%- for message in messages -%}\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\
{{ '<start_of_turn>' + role + '\n' }}\
{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}\
{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}\
{{ '<end_of_turn>\n' }}{%- endfor -%}\
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"""
"""google/gemma-3-4b-it"""


@dataclass(frozen=True)
class Kind:
    """How a processor is put together.

    Attributes
    ----------
    model_type
        Of the models that it is for.
    name, images, videos
        Classes of the processor, and of what it is made of.
    template, end
        The chat template, and the mark that ends an answer.
    special
        Special tokens beside begin, end and padding.
    bos
        The mark that a text begins with, where there is one.
    image_settings, settings, named
        Given to the image processor, to the processor, and tokens that the tokenizer knows by name.
    """

    model_type: str
    name: str
    images: str
    template: str
    end: str
    special: tuple[str, ...]
    bos: str | None = None
    videos: str | None = None
    image_settings: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)


SIDE = {"height": 16, "width": 16}
SQUARE = {"size": SIDE, "crop_size": SIDE, "do_center_crop": False}
PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PIXELS = {
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 2048,
}  # fmt: skip
TILES = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "video_token": "<video>"}
TILE_MARKS = ("<fake_token_around_image>", "<global-img>", "<image>", "<row_1_col_1>", "<row_1_col_2>")
TILE_SIZES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}, "resample": 0}
MISTRAL_MARKS = (
    "[INST]",
    "[/INST]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)


def _next(template: str, end: str, *special: str, bos: str | None = "<s>") -> Kind:
    images = {**SQUARE, **PINPOINTS}
    return Kind(
        "llava_next", "LlavaNextProcessor", "LlavaNextImageProcessor", template, end, ("<image>", *special),
        bos, image_settings=images, settings=LLAVA,
    )  # fmt: skip


def _qwen(model_type: str, name: str, template: str, **sizes: Any) -> Kind:
    return Kind(
        model_type, name, "Qwen2VLImageProcessor", template, "<|im_end|>", ("<|im_start|>", *VISION),
        videos="Qwen3VLVideoProcessor" if "Qwen3" in name else "Qwen2VLVideoProcessor",
        image_settings=PIXELS | sizes,
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "llava": Kind(
        "llava", "LlavaProcessor", "CLIPImageProcessor", VICUNA, "</s>", ("<image>",), "<s>",
        image_settings=SQUARE, settings=LLAVA,
    ),
    "llava_next-vicuna": _next(VICUNA, "</s>"),
    "llava_next-mistral": _next(MISTRAL_NEXT.replace("END", "'</s> '"), "</s>"),
    "llava_next-mistral-first": _next(MISTRAL_NEXT.replace("END", r"'<\\s> '"), "</s>"),
    "llava_next-llama": _next(
        LLAMA_NEXT, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", bos="<|begin_of_text|>"
    ),
    "llava_onevision": Kind(
        "llava_onevision", "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", ONEVISION, "<|im_end|>",
        ("<|im_start|>", "<image>", "<video>"), videos="LlavaOnevisionVideoProcessor",
        image_settings={"size": SIDE, **PINPOINTS},
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "pixtral": Kind(
        "llava", "PixtralProcessor", "PixtralImageProcessor", PIXTRAL, "</s>", MISTRAL_MARKS, "<s>",
        image_settings={"patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 32}},
        settings={"patch_size": 4},
    ),
    "mistral3": Kind(
        "mistral3", "PixtralProcessor", "PixtralImageProcessor", MISTRAL3, "</s>", MISTRAL_MARKS, "<s>",
        image_settings={"patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 32}},
        settings={"patch_size": 4, "spatial_merge_size": 2},
    ),
    "qwen2_vl": _qwen("qwen2_vl", "Qwen2VLProcessor", QWEN),
    "qwen2_5_vl": _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor", QWEN),
    "qwen3_vl": _qwen("qwen3_vl", "Qwen3VLProcessor", QWEN3),
    "internvl": Kind(
        "internvl", "InternVLProcessor", "GotOcr2ImageProcessor", INTERNVL, "<|im_end|>",
        ("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"), videos="InternVLVideoProcessor",
        image_settings={"size": SIDE, "crop_to_patches": True, "min_patches": 1, "max_patches": 3},
        settings={"image_seq_length": 4},
        named={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "idefics3": Kind(
        "idefics3", "Idefics3Processor", "Idefics3ImageProcessor", IDEFICS3, "<end_of_utterance>",
        (*TILE_MARKS, "<end_of_utterance>"), "<|begin_of_text|>", image_settings=TILE_SIZES,
        settings={"image_seq_len": 4},
    ),
    "smolvlm": Kind(
        "smolvlm", "SmolVLMProcessor", "SmolVLMImageProcessor", SMOLVLM, "<end_of_utterance>",
        (*TILE_MARKS, "<end_of_utterance>", "<video>"), "<|im_start|>", videos="SmolVLMVideoProcessor",
        image_settings=TILE_SIZES, settings={"image_seq_len": 4}, named=TILES,
    ),
    "gemma3": Kind(
        "gemma3", "Gemma3Processor", "Gemma3ImageProcessor", GEMMA3, "<end_of_turn>",
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>", image_settings={"size": SIDE}, settings={"image_seq_length": 4},
        named={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
}  # fmt: skip


def tokenizer(
    kind: Kind, texts: Sequence[str] = TEXT, vocabulary: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on a few texts, with the special tokens of a kind."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    marks = dict.fromkeys(mark for mark in ("<pad>", kind.bos, kind.end, *kind.special) if mark)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    # Gemma's tokenizer ends a text otherwise than an answer.
    end = "<eos>" if kind.end == "<end_of_turn>" else kind.end
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=kind.bos, eos_token=end, pad_token="<pad>", padding_side="left",
        extra_special_tokens=kind.named, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build(
    kind: Kind, texts: Sequence[str] = TEXT, vocabulary: int = VOCABULARY, **sizes: Any
) -> ProcessorMixin:
    """Return a processor; ``sizes`` change settings of its image processor."""
    parts: dict[str, Any] = {"image_processor": _class(kind.images)(**kind.image_settings | sizes)}
    if kind.videos:
        parts["video_processor"] = _class(kind.videos)()
    made: ProcessorMixin = _class(kind.name)(
        tokenizer=tokenizer(kind, texts, vocabulary), chat_template=kind.template, **parts, **kind.settings
    )
    return made


@functools.cache
def processor(name: str) -> ProcessorMixin:
    """Return the processor of a kind in :data:`KINDS`, which tests must not change."""
    return build(KINDS[name])


def _class(name: str) -> Callable[..., Any]:
    made: Callable[..., Any] = getattr(transformers, name)
    return made
