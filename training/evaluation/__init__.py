"""Evaluation of frozen features: nearest neighbours, linear probes, FLOPs, masks."""

from gatedkernels.training.evaluation.accuracy import MEASURES, augmented_linear_accuracy, evaluate
from gatedkernels.training.evaluation.features import Features, extract, pixel_features
from gatedkernels.training.evaluation.knn import knn1_accuracy, knn1_folds_accuracy
from gatedkernels.training.evaluation.linear import few_label_accuracy, linear_accuracy
from gatedkernels.training.evaluation.mask_statistics import collect_masks, mask_report, stored_masks
from gatedkernels.training.evaluation.slimmable import evaluate_widths

__all__ = [
    "MEASURES",
    "Features",
    "augmented_linear_accuracy",
    "collect_masks",
    "evaluate",
    "evaluate_widths",
    "extract",
    "few_label_accuracy",
    "knn1_accuracy",
    "knn1_folds_accuracy",
    "linear_accuracy",
    "mask_report",
    "pixel_features",
    "stored_masks",
]
