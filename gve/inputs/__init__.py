"""Items -> what the model reads: prompt, token ids, patches, grids, M-RoPE positions.

The only place that knows templates, pixels and the pooled token. Training, evaluation, search and export all build
their inputs here, from one `InputPolicy` that is stored with every checkpoint.
"""

from gve.inputs.builder import InputBuilder, Prepared, collate
from gve.inputs.patches import VisionInput, cut, normalised, patchify, smart_size
from gve.inputs.policy import InputPolicy, VisionGeometry
from gve.inputs.positions import VisionSpan, grid_times, mrope_positions

__all__ = [
    "InputBuilder",
    "InputPolicy",
    "Prepared",
    "VisionGeometry",
    "VisionInput",
    "VisionSpan",
    "collate",
    "cut",
    "grid_times",
    "mrope_positions",
    "normalised",
    "patchify",
    "smart_size",
]
