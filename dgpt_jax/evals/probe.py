"""Linear probe on frozen features: multinomial logistic regression on few or all labels.

Features stay sharded over all devices (feature_bank.FeatureBank). Each device computes loss and
gradient of its own rows chunk by chunk, so that no logits are stored; only the sums of both are
all-reduced. One compiled program fits all folds and regularization strengths.

ImageNet-1K (1,281,167 rows, 1000 classes) of ViT-H (D = 1280, float32) on a v5e-16 or v4-32 needs
per chip, for each kind of features, 0.38 GiB of rows; the compiled fit needs 0.13 GiB more. A host
needs labels and folds. tools/plan.py estimates other sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.evals.feature_bank import FeatureBank, scan_chunks

L2_GRID = tuple(10.0**e for e in range(-5, 3))
L2_WITHOUT_FOLDS = 0.1  # one label per class: no cross-validation
NO_FOLD = -1


@dataclass(frozen=True)
class ProbeResult:
    """correct: test examples classified correctly. l2: the selected strength. weights (D, classes)
    and bias (classes,) apply to features standardized by the training mean and standard deviation.
    """

    correct: int
    l2: float
    weights: np.ndarray
    bias: np.ndarray


def linear_probe(
    train: FeatureBank,
    test: FeatureBank,
    *,
    l2_grid: tuple[float, ...] = L2_GRID,
    iterations: int = 200,
) -> ProbeResult:
    """Minimizes mean cross-entropy + l2/2·‖W‖² (bias not regularized) by L-BFGS.

    l2 is selected by stratified cross-validation on the training labels alone (at most 5 folds, and
    no more than labels of the rarest class); the final fit uses all of them. Raises UserError if
    the fit is not finite.
    """
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    mean, std = train.moments()
    scale = np.float32(mean), np.maximum(np.float32(std), np.float32(1e-6))
    folds = stratified_folds(train.labels)
    problem = _problem(train, folds)
    l2 = _choose(problem, scale, folds.max() + 1, l2_grid, iterations, classes, train.mesh)
    solution = fit(problem, scale, NO_FOLD, l2, iterations, classes=classes, mesh=train.mesh)
    if not all(bool(jnp.isfinite(x).all()) for x in solution):
        raise UserError(f"the linear probe of {len(train)} examples (l2 {l2:g}) has diverged")
    test_problem = _problem(test, np.zeros(len(test), int))
    correct = int(_hits(test_problem, scale, solution, 0, mesh=test.mesh))
    return ProbeResult(correct, l2, *map(np.asarray, solution))


def _problem(bank: FeatureBank, folds: np.ndarray):
    """Rows (steps, B, D), labels and folds (steps, B) of a bank; label -1 beyond its end."""
    labels, folds = bank.labels.astype(np.int32), folds.astype(np.int32)
    return bank.rows, bank.align(labels, -1), bank.align(folds, NO_FOLD)


def _choose(problem, scale, folds: int, grid, iterations: int, classes: int, mesh) -> float:
    """The strength with the best accuracy over the folds; the largest of equals."""
    if len(grid) == 1:
        return grid[0]
    if folds == 1:
        return L2_WITHOUT_FOLDS
    hits = np.zeros(len(grid))
    for fold in range(folds):
        for i, l2 in enumerate(grid):
            solution = fit(problem, scale, fold, l2, iterations, classes=classes, mesh=mesh)
            hits[i] += int(_hits(problem, scale, solution, fold, mesh=mesh))
    return grid[int(np.flatnonzero(hits == hits.max())[-1])]


def stratified_folds(labels: np.ndarray, max_folds: int = 5) -> np.ndarray:
    """Fold number of each example, stratified by class; all 0 if some class has one example."""
    _, classes = _by_class(labels)
    number = min(max_folds, min(map(len, classes)))
    folds = np.zeros(len(labels), int)
    if number < 2:
        return folds
    for members in classes:
        folds[members] = np.arange(len(members)) % number
    return folds


def _by_class(labels: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct labels, ascending, and the indices (ascending) of the examples of each."""
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    return present, np.split(order, starts[1:])


@partial(jax.jit, static_argnames=("classes", "mesh"))
def fit(
    problem: tuple[jax.Array, jax.Array, jax.Array],
    scale: tuple[jax.Array, jax.Array],
    heldout_fold: int,
    l2: float,
    iterations: int,
    *,
    classes: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Weights (D, classes) and bias fitted to all examples outside `heldout_fold`.

    problem: rows (steps, B, D), labels and folds (steps, B) of a bank; label -1 is ignored. scale:
    mean and standard deviation (D,) of the rows. iterations: maximum steps of L-BFGS.
    """
    rows, labels, folds = problem
    labels = jnp.where(folds == heldout_fold, -1, labels)
    count = (labels >= 0).sum()

    def value_and_grad(params):
        value, (weights, bias) = sharding.sum_over_shards(
            _sum_of_losses, mesh, (params, scale), (rows, labels)
        )
        value = value / count + 0.5 * l2 * jnp.square(params[0]).sum()
        return value, (weights / count + l2 * params[0], bias / count)

    objective = _with_gradient(value_and_grad)
    start = (jnp.zeros((rows.shape[-1], classes)), jnp.zeros(classes))
    solution = _minimize(objective, start, iterations)
    return jax.lax.with_sharding_constraint(solution, sharding.replicated(mesh))


def _sum_of_losses(replicated, shard):
    """Sum of the cross-entropy of a device's rows, and its gradient.

    Differentiated chunk by chunk: the gradient of the scan would store all logits.
    """
    params, scale = replicated
    classes = len(params[1])

    def add(total, chunk):
        x, labels = _standardize(chunk, scale)

        def loss(params):
            # The one-hot row of label -1 is 0, and so are its loss and gradient.
            one_hot = jax.nn.one_hot(labels, classes)
            return optax.softmax_cross_entropy(_logits(x, params), one_hot).sum()

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(jnp.add, total, grads), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, values = scan_chunks(add, zeros, shard, classes)
    return values.sum(), grads


@partial(jax.jit, static_argnames="mesh")
def _hits(problem, scale, solution, fold, *, mesh):
    """Number of examples of a fold that are classified correctly."""
    rows, labels, folds = problem

    def count(replicated, shard):
        solution, scale = replicated

        def add(total, chunk):
            x, labels = _standardize(chunk, scale)
            logits = _logits(x, solution)
            hit = (logits.argmax(axis=1) == labels) & jnp.isfinite(logits).all(axis=1)
            return total + hit.sum(), None

        return scan_chunks(add, jnp.int32(0), shard, len(solution[1]))[0]

    labels = jnp.where(folds == fold, labels, -1)
    return sharding.sum_over_shards(count, mesh, (solution, scale), (rows, labels))


def _standardize(chunk, scale):
    """Rows with mean 0 and standard deviation 1, and their labels; rows of label -1 are zeroed."""
    (rows, labels), (mean, std) = chunk, scale
    return jnp.where(labels[:, None] >= 0, (rows - mean) / std, 0), labels


def _logits(x, params):
    weights, bias = params
    return jnp.matmul(x, weights, precision="highest") + bias


def _with_gradient(value_and_grad: Callable) -> Callable:
    """A differentiable function whose value and gradient come from one evaluation."""

    @jax.custom_vjp
    def function(params):
        return value_and_grad(params)[0]

    function.defvjp(
        value_and_grad, lambda grads, scale: (jax.tree.map(lambda x: scale * x, grads),)
    )
    return function


def _minimize(objective: Callable, start, iterations):
    """Parameters after at most `iterations` steps of L-BFGS from `start`."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def improve(carry):
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad)

    def unfinished(carry):
        _, state, norm = carry
        return (optax.tree.get(state, "count") < iterations) & (norm > 1e-5)

    return jax.lax.while_loop(unfinished, improve, (start, solver.init(start), jnp.inf))[0]


def few_labels(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` random examples per class; of all examples for 0 shots.

    Raises UserError if a class has fewer.
    """
    if not shots:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    present, classes = _by_class(labels)
    least = min(map(len, classes))
    if least < shots:
        few = [label for label, members in zip(present, classes) if len(members) < shots]
        raise UserError(
            f"config.shots={shots}: {len(few)} of {len(present)} classes have fewer labeled "
            f"examples, first class {few[0]}: set config.shots to {least} or less, or use more of "
            f"the split (config.train, config.max_examples)"
        )
    chosen = [rng.permutation(members)[:shots] for members in classes]
    return np.sort(np.concatenate(chosen))
