"""What runs beside training: the benchmark, the record of a run and its speed."""

from gve.callbacks.run_record import RunRecord
from gve.callbacks.throughput import Throughput
from gve.callbacks.uvrb import EvaluationInputs, UVRBEvaluation

__all__ = ["EvaluationInputs", "RunRecord", "Throughput", "UVRBEvaluation"]
