"""Few-shot classification by regularized least squares on frozen features.

The protocol of big_vision (`evaluators/fewshot_lsr.py`), solved in float64 instead of float32.
Accelerators have no float64: each process sums the products of its devices' rows, and only these
sums, (D, D) and (D, classes), are exchanged.
"""

from collections.abc import Callable

import numpy as np

from dgpt_jax.errors import UserError
from dgpt_jax.evals.feature_bank import FeatureBank, sum_over_processes

L2 = 2.0**10
BIAS = 100.0  # a constant feature, large, so that its weight is hardly regularized


def least_squares(
    support: FeatureBank, classes: int, l2: float = L2
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns classify(rows (M, D)) → (M,), with the W that minimizes ‖XW - Y‖² + l2 ‖W‖².

    X: the support (N, D), standardized by its mean and standard deviation (+1e-5), and the constant
    BIAS; Y: 1 for the class (labels (N,)) and -1 for all others. Centered columns are orthogonal to
    the constant, so the weights of BIAS are solved separately. Raises UserError if W is not finite.
    """
    mean, std = support.moments()
    std += 1e-5

    def products(rows, labels):
        """(D, D + classes): XᵀX of the standardized rows, and their sums by class."""
        x = (rows - mean) / std
        by_class = np.zeros((classes, x.shape[1]))
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        if len(present):
            by_class[present] = np.add.reduceat(x[order], starts)
        return np.concatenate([x.T @ x, by_class.T], axis=1)

    local = sum(products(rows, support.labels[indices]) for rows, indices in support.local())
    gram, by_class = np.split(sum_over_processes(local), [len(mean)], axis=1)
    targets = 2 * by_class - by_class.sum(axis=1, keepdims=True)
    weights = np.linalg.solve(gram + l2 * np.eye(len(gram)), targets)
    if not np.isfinite(weights).all():
        raise UserError(f"least squares of {len(support)} examples (l2 {l2:g}) are not finite")
    counts = np.bincount(support.labels, minlength=classes)
    bias = BIAS**2 * (2 * counts - len(support)) / (BIAS**2 * len(support) + l2)

    def classify(rows: np.ndarray) -> np.ndarray:
        return ((rows - mean) / std @ weights + bias).argmax(axis=1)

    return classify


def correct(train: FeatureBank, test: FeatureBank, *, l2: float = L2) -> int:
    """Number of `test` examples classified correctly."""
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    classify = least_squares(train, classes, l2)
    hits = sum((classify(rows) == test.labels[indices]).sum() for rows, indices in test.local())
    return int(sum_over_processes(np.float64(hits)))
