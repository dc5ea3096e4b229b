"""Few-shot classification by regularised least squares on frozen features.

The protocol of big_vision (`evaluators/fewshot_lsr.py`). Its solution is computed here in float64;
theirs is in float32.
"""

from collections.abc import Sequence

import numpy as np

L2 = 2.0**10
BIAS = 100.0  # a constant feature, large, so that its weight is hardly regularised
PIECE = 8192  # rows that are classified at a time


def least_squares(x: np.ndarray, labels: np.ndarray, classes: int, l2: float = L2):
    """classify(rows (M, D)) → (M,), by the W that minimises ‖XW - Y‖² + l2 ‖W‖².

    X: the support (N, D), standardised by its mean and standard deviation (+1e-5), and the constant
    BIAS; Y: 1 for the class (labels (N,)) and -1 for all others. Solved by the eigenvectors of the
    smaller one of XᵀX and XXᵀ.
    """
    x = x.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5

    def standardised(rows):
        return np.pad((rows - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)

    x = standardised(x)
    y = 2.0 * np.eye(classes)[labels] - 1.0
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        weights = (vectors / (values + l2)) @ (vectors.T @ (x.T @ y))
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        weights = x.T @ ((vectors / (values + l2)) @ (vectors.T @ y))

    def classify(rows: np.ndarray) -> np.ndarray:
        pieces = (rows[i : i + PIECE] for i in range(0, len(rows), PIECE))
        return np.concatenate([(standardised(piece) @ weights).argmax(axis=1) for piece in pieces])

    return classify


def correct(train: Sequence[np.ndarray], test: Sequence[np.ndarray], *, l2: float = L2) -> int:
    """How many of `test` are classified correctly; both: features (N, D) and labels (N,)."""
    (x, y), (x_test, y_test) = train, test
    classes = int(max(y.max(), y_test.max())) + 1
    return int((least_squares(x, y, classes, l2)(x_test) == y_test).sum())
