"""What runs beside training: the benchmark and the record of a run."""

from gve.callbacks.run_record import RunRecord
from gve.callbacks.uvrb import EvaluationInputs, UVRBEvaluation

__all__ = ["EvaluationInputs", "RunRecord", "UVRBEvaluation"]
