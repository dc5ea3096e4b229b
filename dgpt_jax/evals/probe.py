"""A linear probe on frozen features: multinomial logistic regression on few or all labels.

The features stay split over all devices (features.Bank). Each device goes through its own rows,
chunk by chunk, and computes loss and gradient of a chunk together, so that no logits are stored;
only the sums of both go between devices. One compiled program fits every fold and every strength.

What ImageNet-1K (1,281,167 rows, 1000 classes) of ViT-H (D = 1280, float32) needs on a v5e-16 or a
v4-32: 0.38 GiB of rows a chip for each kind of features, and 0.13 GiB more for the fit, compiled
for it. On a host: labels and folds. tools/plan.py says it of other sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax import sharding
from dgpt_jax.evals import features
from dgpt_jax.schema import UserError

L2_GRID = tuple(10.0**e for e in range(-5, 3))
L2_WITHOUT_FOLDS = 0.1  # with a single label a class there is nothing to choose by
NO_FOLD = -1


@dataclass(frozen=True)
class ProbeResult:
    """How many of the test examples are classified correctly; the strength that was chosen; weights
    (D, classes) and bias, applied to features standardised with the training mean and standard
    deviation."""

    correct: int
    l2: float
    weights: np.ndarray
    bias: np.ndarray


def linear_probe(
    train: features.Bank,
    test: features.Bank,
    *,
    l2_grid: tuple[float, ...] = L2_GRID,
    iterations: int = 200,
) -> ProbeResult:
    """Minimises mean cross-entropy + l2/2·‖W‖² (bias free) by L-BFGS.

    l2 is chosen by stratified cross-validation on the training labels alone (at most 5 folds, at
    most the labels of the rarest class), then all of them are fitted. Raises UserError where the
    fit is not finite.
    """
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    mean, std = train.moments()
    scale = np.float32(mean), np.maximum(np.float32(std), np.float32(1e-6))
    folds = stratified_folds(train.labels)
    problem = _labelled(train, folds)
    l2 = _choose(problem, scale, folds.max() + 1, l2_grid, iterations, classes, train.mesh)
    solution = fit(problem, scale, NO_FOLD, l2, iterations, classes=classes, mesh=train.mesh)
    if not all(bool(jnp.isfinite(x).all()) for x in solution):
        raise UserError(f"the linear probe of {len(train)} examples (l2 {l2:g}) has diverged")
    answers = _labelled(test, np.zeros(len(test), int))
    correct = int(_hits(answers, scale, solution, 0, mesh=test.mesh))
    return ProbeResult(correct, l2, *map(np.asarray, solution))


def _labelled(bank: features.Bank, folds: np.ndarray):
    """(rows (steps, B, D), labels (steps, B), folds (steps, B)); label -1 beyond the bank's end."""
    labels, folds = bank.labels.astype(np.int32), folds.astype(np.int32)
    return bank.rows, bank.like(labels, -1), bank.like(folds, NO_FOLD)


def _choose(problem, scale, folds: int, grid, iterations: int, classes: int, mesh) -> float:
    """The strength with the best accuracy over the folds; of equals the largest."""
    if len(grid) == 1:
        return grid[0]
    if folds == 1:
        return L2_WITHOUT_FOLDS
    hits = np.zeros(len(grid))
    for held in range(folds):
        for i, l2 in enumerate(grid):
            solution = fit(problem, scale, held, l2, iterations, classes=classes, mesh=mesh)
            hits[i] += int(_hits(problem, scale, solution, held, mesh=mesh))
    return grid[int(np.flatnonzero(hits == hits.max())[-1])]


def stratified_folds(labels: np.ndarray, most: int = 5) -> np.ndarray:
    """A fold number for each example, classes spread evenly; all 0 where there can be no two."""
    _, classes = _by_class(labels)
    number = min(most, min(map(len, classes)))
    folds = np.zeros(len(labels), int)
    if number < 2:
        return folds
    for members in classes:
        folds[members] = np.arange(len(members)) % number
    return folds


def _by_class(labels: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The labels there are, ascending, and the indices (ascending) of the examples of each."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    return present, np.split(order, starts[1:])


@partial(jax.jit, static_argnames=("classes", "mesh"))
def fit(problem, scale, held, l2, iterations, *, classes: int, mesh):
    """Weights (D, classes) and bias of the examples that are not of the fold `held`.

    problem: rows (steps, B, D), labels and folds (steps, B) of a bank; an example of label -1 does
    not count. scale: mean and standard deviation (D,) of the rows. At most so many `iterations`.
    """
    rows, labels, folds = problem
    labels = jnp.where(folds == held, -1, labels)
    count = (labels >= 0).sum()

    def value_and_grad(parameters):
        value, (weights, bias) = sharding.sum_over_shards(
            _sum_of_losses, mesh, (parameters, scale), (rows, labels)
        )
        value = value / count + 0.5 * l2 * jnp.square(parameters[0]).sum()
        return value, (weights / count + l2 * parameters[0], bias / count)

    objective = _with_gradient(value_and_grad)
    start = (jnp.zeros((rows.shape[-1], classes)), jnp.zeros(classes))
    solution = _minimise(objective, start, iterations)
    return jax.lax.with_sharding_constraint(solution, sharding.replicated(mesh))


def _sum_of_losses(whole, part):
    """Cross-entropy (sum) of a device's rows and its gradient.

    The gradient is taken chunk by chunk: derived from the scan, it would keep all logits.
    """
    parameters, scale = whole
    classes = len(parameters[1])

    def add(total, chunk):
        x, labels = _standardised(chunk, scale)

        def loss(parameters):
            # The one-hot row of label -1 is 0, and so are its loss and gradient.
            one_hot = jax.nn.one_hot(labels, classes)
            return optax.softmax_cross_entropy(_logits(x, parameters), one_hot).sum()

        value, grads = jax.value_and_grad(loss)(parameters)
        return jax.tree.map(jnp.add, total, grads), value

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    grads, values = features.scan_chunks(add, zeros, part, classes)
    return values.sum(), grads


@partial(jax.jit, static_argnames="mesh")
def _hits(problem, scale, solution, held, *, mesh):
    """How many examples of the fold `held` are classified correctly."""
    rows, labels, folds = problem

    def count(whole, part):
        solution, scale = whole

        def add(total, chunk):
            x, labels = _standardised(chunk, scale)
            logits = _logits(x, solution)
            right = (logits.argmax(axis=1) == labels) & jnp.isfinite(logits).all(axis=1)
            return total + right.sum(), None

        return features.scan_chunks(add, jnp.int32(0), part, len(solution[1]))[0]

    labels = jnp.where(folds == held, labels, -1)
    return sharding.sum_over_shards(count, mesh, (solution, scale), (rows, labels))


def _standardised(chunk, scale):
    """Rows of mean 0 and standard deviation 1, and their labels; 0 for the rows of label -1."""
    (rows, labels), (mean, std) = chunk, scale
    return jnp.where(labels[:, None] >= 0, (rows - mean) / std, 0), labels


def _logits(x, parameters):
    weights, bias = parameters
    return jnp.matmul(x, weights, precision="highest") + bias


def _with_gradient(value_and_grad: Callable) -> Callable:
    """The function whose value and gradient are known together, for jax.grad."""

    @jax.custom_vjp
    def function(parameters):
        return value_and_grad(parameters)[0]

    function.defvjp(
        value_and_grad, lambda grads, scale: (jax.tree.map(lambda x: scale * x, grads),)
    )
    return function


def _minimise(objective: Callable, start, iterations):
    """The parameters after at most so many steps of L-BFGS from `start`."""
    solver = optax.lbfgs()
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
    present, classes = _by_class(labels)
    least = min(map(len, classes))
    if least < shots:
        few = [label for label, members in zip(present, classes) if len(members) < shots]
        raise UserError(
            f"config.shots={shots}: {len(few)} of {len(present)} classes have fewer labelled "
            f"examples, class {few[0]} is the first: set config.shots to {least} or less, or take "
            f"more of the split (config.train, config.most)"
        )
    chosen = [rng.permutation(members)[:shots] for members in classes]
    return np.sort(np.concatenate(chosen))
