"""Metrics of classifiers, on the answers of a whole evaluation. The home of scikit-learn, scipy."""

import warnings
from typing import Any

import numpy as np

from trainer.tasks.entities import entity_scores, is_tagging

BINS = 15  # of the calibration error
OF_TEXTS = {
    "single_label_classification": (
        "accuracy", "macro_f1", "micro_f1", "mcc", "calibration_error",
    ),
    "multi_label_classification": (
        "accuracy", "exact_match", "macro_f1", "micro_f1", "calibration_error",
    ),
    "regression": ("mean_absolute_error", "root_mean_square_error", "pearson", "spearman"),
}  # fmt: skip
OF_ENTITIES = ("entity_precision", "entity_recall", "entity_f1")
MAX_TABLE = 50  # labels of which a confusion table is written


def single_label(truth: np.ndarray, logits: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Return accuracy, F1, MCC, calibration and confusion of (n,) labels and (n, labels) logits."""
    guess = logits.argmax(-1)
    shifted = logits - logits.max(-1, keepdims=True)
    confidence = 1.0 / np.exp(shifted).sum(-1)  # the probability of the guess
    return of_classes(truth, guess, confidence, names)


def of_classes(
    truth: np.ndarray, guess: np.ndarray, confidence: np.ndarray, names: tuple[str, ...]
) -> dict[str, Any]:
    """Return metrics of (n,) labels, guesses and the probabilities of the guesses."""
    from sklearn import metrics

    counts = metrics.confusion_matrix(truth, guess, labels=range(len(names)))
    found = {
        "accuracy": metrics.accuracy_score(truth, guess),
        "macro_f1": metrics.f1_score(truth, guess, average="macro", zero_division=0.0),
        "micro_f1": metrics.f1_score(truth, guess, average="micro", zero_division=0.0),
        "mcc": _correlation(counts),
        "calibration_error": calibration_error(truth == guess, confidence),
    }
    table: dict[str, Any] = {name: float(value) for name, value in found.items()}
    if len(names) <= MAX_TABLE:
        table["confusion"] = {"labels": list(names), "rows_are_truth": counts.tolist()}
    return table


def _correlation(counts: np.ndarray) -> float:
    """Return Matthews' correlation of a confusion table; 0 where one side has one label only.

    Source: Gorodkin 2004 (several classes). scikit-learn's own warns of such tables.
    """
    total, true, guessed = counts.sum(), counts.sum(1), counts.sum(0)
    spread = float(total**2 - (true**2).sum()) * float(total**2 - (guessed**2).sum())
    return float(counts.trace() * total - true @ guessed) / spread**0.5 if spread else 0.0


def of_words(
    documents: np.ndarray,
    truth: np.ndarray,
    guess: np.ndarray,
    confidence: np.ndarray,
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Return `of_classes` of words, and scores of entities where the labels are B-X, I-X and O."""
    found = of_classes(truth, guess, confidence, names)
    if is_tagging(names):
        found |= entity_scores(documents, truth, guess, names)
    return found


def multi_label(truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Return scores of (n, labels) 0 and 1, and logits; NaN: not known. A label is guessed above
    probability 0.5."""
    from sklearn import metrics

    known, guess = ~np.isnan(truth), logits > 0
    f1 = [
        metrics.f1_score(truth[is_in, k], guess[is_in, k], zero_division=0.0)
        for k, is_in in enumerate(known.T)
        if is_in.any()
    ]
    probability = 1.0 / (1.0 + np.exp(-np.abs(logits[known])))
    is_right = truth[known] == guess[known]
    return {
        "accuracy": float(is_right.mean()),
        "exact_match": float((~known | (truth == guess)).all(-1).mean()),
        "macro_f1": float(np.mean(f1)),
        "micro_f1": float(metrics.f1_score(truth[known], guess[known], zero_division=0.0)),
        "calibration_error": calibration_error(is_right, probability),
    }


def regression(truth: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    """Return errors and correlations of (n, outputs) numbers, the mean over outputs; NaN: none."""
    from scipy import stats

    pearson, spearman = [], []
    for column, own in zip(truth.T, guess.T, strict=True):
        known = ~np.isnan(column)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)  # NaN says so
            if known.sum() > 1:
                pearson.append(stats.pearsonr(column[known], own[known]).statistic)
                spearman.append(stats.spearmanr(column[known], own[known]).statistic)
    error = (guess - truth)[~np.isnan(truth)]
    return {
        "mean_absolute_error": float(np.abs(error).mean()),
        "root_mean_square_error": float(np.sqrt(np.square(error).mean())),
        "pearson": float(np.mean(pearson)) if pearson else float("nan"),
        "spearman": float(np.mean(spearman)) if spearman else float("nan"),
    }


def calibration_error(is_right: np.ndarray, confidence: np.ndarray) -> float:
    """Return the expected calibration error over bins of equal width.

    Source: Guo et al. 2017, "On calibration of modern neural networks".
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = [
        abs(is_right[bins == number].sum() - confidence[bins == number].sum())
        for number in np.unique(bins)
    ]
    return float(sum(gaps) / len(confidence))
