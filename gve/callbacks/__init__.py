"""What runs beside the loops: the benchmark, the record of a run, its speed, and the embeddings of predict."""

from gve.callbacks.predictions import Predictions
from gve.callbacks.run_record import RunRecord
from gve.callbacks.throughput import Throughput
from gve.callbacks.uvrb import EvaluationInputs, UVRBEvaluation

__all__ = ["EvaluationInputs", "Predictions", "RunRecord", "Throughput", "UVRBEvaluation"]
