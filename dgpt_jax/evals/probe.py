"""A linear probe on frozen features: multinomial logistic regression on few or all labels."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax.schema import UserError

L2_GRID = tuple(10.0**e for e in range(-5, 3))
L2_WITHOUT_FOLDS = 0.1  # with a single label a class there is nothing to choose by


@dataclass(frozen=True)
class ProbeResult:
    """accuracy in [0, 1]; the strength that was chosen; weights (D, classes) and bias, applied to
    features standardised with the training mean and standard deviation."""

    accuracy: float
    l2: float
    weights: np.ndarray
    bias: np.ndarray


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    l2_grid: tuple[float, ...] = L2_GRID,
    iterations: int = 200,
) -> ProbeResult:
    """Minimises mean cross-entropy + l2/2·‖W‖² (bias free) by L-BFGS.

    l2 is chosen by stratified cross-validation on the training labels alone (at most 5 folds, at
    most the labels of the rarest class), then all of them are fitted.
    """
    mean, std = train_features.mean(axis=0), train_features.std(axis=0)
    x = (train_features - mean) / np.maximum(std, 1e-6)
    x_test = (test_features - mean) / np.maximum(std, 1e-6)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    one_hot = np.eye(classes, dtype=np.float32)[train_labels]
    fit = partial(_fit, x.astype(np.float32), one_hot, iterations=iterations)
    l2 = _choose(fit, x, train_labels, l2_grid)
    weights, bias = fit(np.ones(len(x), np.float32), l2)
    predicted = (x_test @ np.asarray(weights) + np.asarray(bias)).argmax(axis=1)
    accuracy = float((predicted == test_labels).mean())
    return ProbeResult(accuracy, l2, np.asarray(weights), np.asarray(bias))


def _choose(fit, x, labels, grid) -> float:
    """The strength with the best accuracy over the folds; of equals the largest."""
    folds = stratified_folds(labels)
    if folds.max() == 0 or len(grid) == 1:
        return grid[0] if len(grid) == 1 else L2_WITHOUT_FOLDS
    hits = np.zeros(len(grid))
    for fold in range(folds.max() + 1):
        held = folds == fold
        for i, l2 in enumerate(grid):
            weights, bias = fit((~held).astype(np.float32), l2)
            predicted = (x[held] @ np.asarray(weights) + np.asarray(bias)).argmax(axis=1)
            hits[i] += (predicted == labels[held]).sum()
    return grid[int(np.flatnonzero(hits == hits.max())[-1])]


def stratified_folds(labels: np.ndarray, most: int = 5) -> np.ndarray:
    """A fold number for each example, classes spread evenly; all 0 where there can be no two."""
    present, counts = np.unique(labels, return_counts=True)
    number = min(most, int(counts.min()))
    folds = np.zeros(len(labels), int)
    if number < 2:
        return folds
    for label in present:
        members = np.flatnonzero(labels == label)
        folds[members] = np.arange(len(members)) % number
    return folds


@partial(jax.jit, static_argnames="iterations")
def _fit(x, one_hot, sample_weight, l2, *, iterations: int):
    """Weights (D, classes) and bias of the examples with weight 1."""

    def objective(parameters):
        weights, bias = parameters
        losses = optax.softmax_cross_entropy(x @ weights + bias, one_hot)
        mean = (losses * sample_weight).sum() / sample_weight.sum()
        return mean + 0.5 * l2 * jnp.square(weights).sum()

    solver = optax.lbfgs()
    start = (jnp.zeros((x.shape[1], one_hot.shape[1])), jnp.zeros(one_hot.shape[1]))
    value_and_grad = optax.value_and_grad_from_state(objective)

    def improve(carry):
        parameters, state, _ = carry
        value, grad = value_and_grad(parameters, state=state)
        updates, state = solver.update(
            grad, state, parameters, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(parameters, updates), state, optax.tree.norm(grad)

    def unfinished(carry):
        _, state, norm = carry
        return (optax.tree.get(state, "count") < iterations) & (norm > 1e-5)

    return jax.lax.while_loop(unfinished, improve, (start, solver.init(start), jnp.inf))[0]


def few_labels(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` examples a class, drawn by seed; all examples for 0 shots.

    Raises UserError where a class has fewer.
    """
    if not shots:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < shots:
            raise UserError(f"class {label} has {len(members)} examples, {shots} shots were asked")
        chosen.append(members[:shots])
    return np.sort(np.concatenate(chosen))
