"""Evaluation of label maps: overlap, surface metrics, summaries and paired statistics."""

from umamba.evaluation.summary import DEFAULT_TOLERANCE_MM, evaluate_folder, labels_of_dataset
from umamba.evaluation.tables import read_summary

__all__ = ["DEFAULT_TOLERANCE_MM", "evaluate_folder", "labels_of_dataset", "read_summary"]
