"""Checkpoints of any origin, measured as runs of ours are."""

from benchmark.external.evaluate import Evaluated, evaluate_checkpoint
from benchmark.external.request import Evaluation

__all__ = ["Evaluated", "Evaluation", "evaluate_checkpoint"]
