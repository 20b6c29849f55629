"""Multimodal language models of other makers as encoders, by recipes of how each was published.

`recipes` says what each model reads, `prompt` makes token ids of it, `qwen` and `llava` add pictures and positions and
run the model, `lora` merges adapters that are released without their base, `encoder` is the `Encoder` around them.
"""

from gve.encode.mllm.encoder import MLLMEncoder
from gve.encode.mllm.recipes import RECIPES, Recipe, Turn
from gve.encode.mllm.settings import Settings

__all__ = ["RECIPES", "MLLMEncoder", "Recipe", "Settings", "Turn"]
