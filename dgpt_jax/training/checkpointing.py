"""A run's checkpoints: saved by Orbax in the background, made again where that fails, and kept.

What is in them, and how parameters alone are read, is checkpoint.py's.
"""

import contextlib
import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint._src.futures import future
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dgpt_jax import checkpoint, checksums, hosts, optim, run_log
from dgpt_jax.checkpoint import FORMAT, OLDEST, directory
from dgpt_jax.schema import UserError
from dgpt_jax.state import TrainState

TRIES = 3
# Where a part of a save fails, the threads of its other parts wait 300 s for it, and Python would
# wait for them at its end. A save that is to be complete is waited for by Checkpoints.close.
future._SignalingThread.daemon = True


class Checkpoints:
    """The checkpoints of a run, a context: saving goes on in the background, leaving it waits.

    Kept are the newest `keep`, those at multiples of `keep_every` steps (0: none), and the one with
    the best value of the metric `best` ("": none).
    """

    def __init__(self, workdir, *, keep: int, keep_every: int = 0, best: str = ""):
        policies = [preservation_policy.LatestN(keep)]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        if best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda found: _or_worst(found[best], best),
                    reverse=run_log.is_loss(best),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
        )
        self._in_flight, self._failures = False, 0
        self._manager = ocp.CheckpointManager(
            directory(workdir),
            options=options,
            item_names=("params", "opt_state", "metadata"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_):
        # One of several processes that fails must say so and end. The save in flight waits for the
        # others, and they may wait for this one: what is not complete by now is never to be.
        if kind is None or not hosts.together():
            self.close()

    @property
    def directory(self) -> str:
        return str(self._manager.directory)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict | None = None):
        """Starts saving; `metadata` is JSON, `metrics` what was measured at this step.

        If the save before has failed unseen, this one takes its place. Raises what `failed` raises,
        UserError on a full or read-only disk, and RuntimeError where Orbax declines twice; what
        goes wrong in the background, `failed` tells.
        """
        self.failed(wait=True)  # until then Orbax takes the failed one for a checkpoint it has
        step = int(state.step)
        arrays = {"params": state.params, "opt_state": state.opt_state}
        metadata = checkpoint.sealed({"format": _format(state), "step": step} | metadata, arrays)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            metadata=ocp.args.JsonSave(metadata),
        )
        with self._disk_is_the_users():
            for _ in range(2):
                self._in_flight = self._manager.save(step, args=items, metrics=metrics)
                if self._in_flight:
                    return
                self._manager.reload()  # it goes by its list of steps; the directory's is the truth
        raise RuntimeError(
            f"the checkpoint of step {step} was not saved: {self.directory} holds "
            f"step {self._manager.latest_step()}"
        )

    def failed(self, *, wait: bool = False) -> bool:
        """Whether the last save failed in the background, so that the state should be saved again.

        Raises its cause the third time in a row, and where other processes saw it succeed, which
        would not join in. `wait`: until it has ended.
        """
        if not self._in_flight or (self._manager.is_saving_in_progress() and not wait):
            return False
        self._in_flight = False
        try:
            # Orbax's check_for_errors does not tell: the thread that finishes a save takes the
            # error before, and only who waits for that thread is told.
            with self._disk_is_the_users():
                self._manager.wait_until_finished()
        except UserError:
            raise
        except Exception:
            self._failures += 1
            if hosts.together() or self._failures == TRIES:
                raise
            return True
        self._failures = 0
        return False

    def metadata(self, step: int) -> dict:
        """Raises UserError where they are damaged or of later code."""
        asked = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        with checkpoint.damage_is_told(self._item(step)):
            found = self._manager.restore(step, args=asked)["metadata"]
            return checkpoint.checked(found, self._item(step))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, placed as `abstract` (shapes, dtypes, shardings) says.

        Raises UserError for the state of an older format, and for one that is damaged.
        """
        metadata = self.metadata(step)
        if (found := metadata["format"]) < OLDEST:
            raise UserError(
                f"{self.directory} has training states of format {found}, this code continues "
                f"{OLDEST} to {FORMAT}: choose another --workdir (the parameters can be read)"
            )
        asked = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        with checkpoint.damage_is_told(self._item(step)):
            restored = self._manager.restore(step, args=asked)
            arrays = {name: restored[name] for name in ("params", "opt_state")}
        checkpoint.verify(checksums.of_tree(arrays), metadata, self._item(step))
        counter = jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding)
        return TrainState(counter, **arrays)

    def _item(self, step: int) -> str:
        return f"{self.directory}/{step}"

    def close(self):
        """Waits for the last save; raises what went wrong in the background."""
        with self._disk_is_the_users():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextlib.contextmanager
    def _disk_is_the_users(self):
        try:
            yield
        except Exception as e:  # TensorStore raises ValueError, Orbax various, the system OSError
            found = re.search(
                r"(RESOURCE_EXHAUSTED|No space left|quota exceeded)|Read-only|Permission denied",
                str(e),
            )
            if not found:
                raise
            what = "no space left for" if found[1] else "no permission to write"
            newest = self._manager.latest_step() or "none"
            # Else it says so of every array once more, after the line that is to be read.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise UserError(
                f"{what} a checkpoint in {self.directory} (newest complete step: {newest}): mend "
                f"that, then the same command continues"
            ) from e


def _or_worst(value: float, metric: str) -> float:
    """The value of a metric; the worst there is where it is NaN, which has no place in an order."""
    if not math.isnan(value):
        return value
    return math.inf if run_log.is_loss(metric) else -math.inf


def _format(state: TrainState) -> int:
    return OLDEST if optim.measured(state) is state.params else FORMAT
