"""The small files of an exported folder: tokenizer, chat template, processors, sentence-transformers, record.

Each program reads its own subset of them; all of them say what `InputPolicy` says, so that the model reads the same
prompt, pixels and pooled token wherever it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gve.inputs import InputPolicy, VisionGeometry
from gve.inputs.patches import PIXEL_MEAN, PIXEL_STD

POOLED = "<|endoftext|>"


def chat_template(policy: InputPolicy) -> str:
    """The policy's prompt as a Jinja template: media in their order, then the texts joined by one space.

    The pooled token is not in it: the tokenizer appends it, also for programs that render without this template.
    """
    system, target = json.dumps(policy.system_prompt), json.dumps(policy.target_text)
    return (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\n{{ " + system + " }}<|im_end|>\n"
        "{% endif %}"
        "<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
        "{% endfor %}"
        "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') "
        "| select | list %}"
        "{{ texts | join(' ') if texts or message['role'] != 'user' else " + target + " }}"
        "{% endif %}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def write_tokenizer(tokenizer: Any, policy: InputPolicy, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template.

    With `append_eos` the tokenizer's post-processor ends every text with `<|endoftext|>`, the pooled token. The config
    is written in the layout of transformers 4, which 5 reads too; 4 refuses the layout of 5.

    Args:
        tokenizer: of the base, a fast one.
        policy: the input policy.
        folder: an existing folder.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # As Qwen's own; it decides offsets only. Built anew: a base may append the token already, or must not.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content |= {"truncation": None, "padding": None, "post_processor": byte_level}
    if policy.append_eos:
        first, second = ({"Sequence": {"id": own, "type_id": 0}} for own in "AB")
        pooled = {"SpecialToken": {"id": POOLED, "type_id": 0}}
        token = {"id": POOLED, "ids": [tokenizer.convert_tokens_to_ids(POOLED)], "tokens": [POOLED]}
        append = {
            "type": "TemplateProcessing",
            "single": [first, pooled],
            "pair": [first, second, pooled],
            "special_tokens": {POOLED: token},
        }
        content["post_processor"] = {"type": "Sequence", "processors": [byte_level, append]}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    added = tokenizer.added_tokens_decoder
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    special = [token.content for token in added.values() if token.special and token.content != POOLED]
    template = chat_template(policy)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": {
                str(number): {flag: getattr(token, flag) for flag in flags} for number, token in sorted(added.items())
            },
            "additional_special_tokens": special,
            "add_prefix_space": False,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": tokenizer.eos_token,
            "errors": "replace",
            "model_max_length": tokenizer.model_max_length,
            "pad_token": POOLED,
            "padding_side": "left",
            "processor_class": "Qwen2_5_VLProcessor",
            "split_special_tokens": False,
            "unk_token": None,
            "chat_template": template,
        },
    )
    (folder / "chat_template.jinja").write_text(template)


def write_processors(policy: InputPolicy, geometry: VisionGeometry, folder: Path) -> None:
    """preprocessor_config.json and video_preprocessor_config.json: the policy's pixels.

    Frames of a clip are chosen by the caller: the processors of transformers take other ones for the same rate.
    """
    shared = {
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": geometry.patch,
        "temporal_patch_size": geometry.temporal_patch,
        "merge_size": geometry.merge,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
    }
    area = geometry.factor**2
    image = (policy.min_image_tokens * area, policy.max_image_tokens * area)
    frame = (policy.min_frame_tokens * area, policy.max_frame_tokens * area)
    kinds: tuple[tuple[str, tuple[int, int], dict[str, object]], ...] = (
        ("preprocessor_config.json", image, {"image_processor_type": "Qwen2VLImageProcessor"}),
        (
            "video_preprocessor_config.json",
            frame,
            {
                "video_processor_type": "Qwen2VLVideoProcessor",
                "do_sample_frames": False,
                "cap_pixels_per_frame": False,  # a limit on each frame alone, as in training
            },
        ),
    )
    for file, (low, high), own in kinds:
        # Both ways to say it: 4.x reads the first, 5.x the second.
        pixels = {"min_pixels": low, "max_pixels": high, "size": {"shortest_edge": low, "longest_edge": high}}
        write_json(folder / file, {**own, **shared, **pixels})


def write_sentence_transformers(policy: InputPolicy, dim: int, folder: Path) -> None:
    """modules.json and the files of its three stock modules; vLLM takes pooling and normalisation from them too.

    The names are those of sentence-transformers before 6, which 6 reads: vLLM knows no others (`get_pooling_config` of
    its transformers_utils/config.py), and takes the first key that is true for the kind of pooling.
    """
    kinds = (("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize"))
    modules = [
        {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for name, path, kind in kinds
    ]
    write_json(folder / "modules.json", modules)
    read = {"method": "forward", "method_output_name": "last_hidden_state"}
    sampling = policy.sampling
    frames = (
        {"num_frames": sampling.num_frames, "fps": None}
        if sampling.kind == "uniform"
        else {"fps": sampling.fps, "min_frames": sampling.min_frames, "max_frames": sampling.num_frames}
    )
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                **dict.fromkeys(("text", "image", "video"), read),
                "message": {**read, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
            "processing_kwargs": {
                "chat_template": {"add_generation_prompt": True},
                "video": {"do_sample_frames": True, **frames},
            },
        },
    )
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    pooling: dict[str, object] = {"word_embedding_dimension": dim}
    pooling |= {f"pooling_mode_{mode}": False for mode in modes} | {"pooling_mode_lasttoken": True}
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    (folder / "2_Normalize").mkdir()
    write_json(folder / "2_Normalize" / "config.json", {})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def write_json(path: Path, value: object) -> None:
    """Writes a value as the hub's files are written."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
