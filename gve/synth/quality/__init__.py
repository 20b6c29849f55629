"""Stage 1 of the synthesis: what is wrong with a weak pair. `scan` measures each one, `select` compares and decides.

Every reject has the stage "quality", a code of `REASONS`, a score and a detail.
"""

from gve.synth.quality.footage import Cutting
from gve.synth.quality.hashes import ClipHash, bits, colour_distance, near_pairs, text_key
from gve.synth.quality.reasons import REASONS, RULES, STAGE, Reason
from gve.synth.quality.scan import Scan, ScanOptions
from gve.synth.quality.selection import Select, SelectOptions, judge
from gve.synth.quality.texts import TextMeasures, measure_text

__all__ = [
    "REASONS",
    "RULES",
    "STAGE",
    "ClipHash",
    "Cutting",
    "Reason",
    "Scan",
    "ScanOptions",
    "Select",
    "SelectOptions",
    "TextMeasures",
    "bits",
    "colour_distance",
    "judge",
    "measure_text",
    "near_pairs",
    "text_key",
]
