"""What runs beside the loops: the benchmark, the curriculum's prober, hard negatives, checkpoints and preemption, the
record of a run, its page in TensorBoard, its speed, and the embeddings of predict.
"""

from gve.callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoints, newest_checkpoint, require_checkpoint
from gve.callbacks.dashboard import Dashboard
from gve.callbacks.mining import HardNegativeMining
from gve.callbacks.predictions import Predictions
from gve.callbacks.preemption import PREEMPTED, Preempted
from gve.callbacks.probe import CurriculumProbe
from gve.callbacks.run_record import RunRecord
from gve.callbacks.throughput import Throughput
from gve.callbacks.uvrb import EvaluationInputs, UVRBEvaluation

__all__ = [
    "PREEMPTED",
    "AtomicCheckpointIO",
    "CurriculumProbe",
    "Dashboard",
    "EvaluationInputs",
    "HardNegativeMining",
    "Predictions",
    "Preempted",
    "RunCheckpoints",
    "RunRecord",
    "Throughput",
    "UVRBEvaluation",
    "newest_checkpoint",
    "require_checkpoint",
]
