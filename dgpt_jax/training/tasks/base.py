"""Interface between a task and the train loop."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import optax

from dgpt_jax.config import TrainConfig
from dgpt_jax.data.dataset import ExampleDataset
from dgpt_jax.training.initial_weights import InitialWeights

Batch = dict[str, Any]  # name to array (B, …)


class Task(Protocol):
    """Data, model, loss and optimizer of a run."""

    config: TrainConfig
    """The config of the run."""

    examples: ExampleDataset
    """Training examples; None in a task without data, used in planning and replay."""

    frozen: dict[str, Any]
    """Nested arrays that the loss reads and that are not trained."""

    notes: tuple[str, ...]
    """Lines to log before training."""

    metric_names: tuple[str, ...]
    """Metrics of a train step, averaged over a log interval."""

    independent: bool
    """True if the loss of an example does not depend on others of its micro-batch."""

    next_command: str
    """Command to run after training, with a field {workdir}."""

    frozen_identity: Mapping[str, str] | None
    """InitialWeights.identity of weights in `frozen`, which a resumed run must read again."""

    @property
    def prepare(self) -> Callable[[jax.Array, Batch], Batch] | None:
        """(key, batch of the full batch size) → input of `loss`; None: the batch itself."""

    def abstract_example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        ...

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Initial parameters, a nested dict."""
        ...

    def initial_weights(self) -> InitialWeights:
        """Reads config.init.weights; called when a run starts, not when it resumes. Raises
        UserError."""
        ...

    def optimizer(
        self, rate: optax.Schedule, freeze_steps: int = 0
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the config with a learning-rate schedule, scalar or (heads,).

        freeze_steps: config.init.freeze_steps in steps.
        """
        ...

    def loss(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Batch]:
        """(scalar, {metric: (B,) values per example})."""
        ...

    def model_flops(self) -> float:
        """FLOPs per image of a train step, by flops.FORMULA."""
        ...

    def replay_metadata(self) -> dict[str, Any]:
        """Returns the JSON that `tasks.task_from_dump` needs beside the config."""
        ...
