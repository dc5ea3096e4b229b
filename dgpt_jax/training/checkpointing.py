"""Checkpoints of a run: saved by Orbax in the background, retried on failure, restored.

Their format, and reading parameters alone: storage/orbax_checkpoint.py.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.futures import future
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dgpt_jax.distributed import multihost
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics_log
from dgpt_jax.storage import checkpoint_metadata, checksums, orbax_errors
from dgpt_jax.storage.checkpoint_metadata import FORMAT, OLDEST
from dgpt_jax.storage.orbax_checkpoint import directory
from dgpt_jax.training import optimizer
from dgpt_jax.training.train_step import TrainState

MAX_FAILURES = 3  # in a row
# If one item of a save fails, the threads of the other items wait 300 s for it, and Python waits
# for them at exit unless they are daemons. Checkpoints.close waits for a save that can complete.
future._SignalingThread.daemon = True


class Checkpoints:
    """Context manager of a run's checkpoints: saves in the background, waits for them at exit.

    Keeps the newest `keep`, those at multiples of `keep_every` steps (0: none), and the one with
    the best value of the metric `best` ("": none).
    """

    def __init__(
        self, workdir: epath.Path | Path | str, *, keep: int, keep_every: int = 0, best: str = ""
    ):
        policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        if best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: _nan_is_worst(metrics[best], best),
                    reverse=metrics_log.is_loss(best),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
        )
        orbax_errors.hide_repeated_errors()
        self._in_flight, self._failures = False, 0
        self._manager = ocp.CheckpointManager(
            directory(workdir),
            options=options,
            item_names=("params", "opt_state", "metadata"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_):
        # If one of several processes fails, it must exit with its error. The save in flight waits
        # for the other processes, which may wait for this one, so it is abandoned.
        if kind is None or not multihost.is_multiprocess():
            self.close()

    @property
    def directory(self) -> str:
        return str(self._manager.directory)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict | None = None):
        """Starts saving; `metadata` is JSON, `metrics` are the evaluation results of this step.

        Raises what `last_save_failed` raises, UserError if the disk is full or read-only, and
        RuntimeError if Orbax declines twice. `last_save_failed` reports background failures.
        """
        # Until then Orbax lists a failed save as a checkpoint.
        self.last_save_failed(wait=True)
        step = int(state.step)
        arrays = {"params": state.params, "opt_state": state.opt_state}
        metadata = checkpoint_metadata.with_checksums(
            {"format": _format(state), "step": step} | metadata, arrays
        )
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            metadata=ocp.args.JsonSave(metadata),
        )
        with self._translate_disk_errors():
            for _ in range(2):
                self._in_flight = self._manager.save(step, args=items, metrics=metrics)
                if self._in_flight:
                    return
                self._manager.reload()  # its list of steps may differ from the directory
        raise RuntimeError(
            f"the checkpoint of step {step} was not saved: {self.directory} holds "
            f"step {self._manager.latest_step()}"
        )

    def last_save_failed(self, *, wait: bool = False) -> bool:
        """True, once, if the last save failed in the background: the state should be saved again.

        Raises its cause at the third failure in a row, and in multi-process runs, where the save
        may have succeeded on other processes, which would not join a retry. wait: until the save
        has ended; else False while it is in progress.
        """
        if not self._in_flight or (self._manager.is_saving_in_progress() and not wait):
            return False
        self._in_flight = False
        try:
            # Orbax's check_for_errors does not raise: the thread that finishes a save has consumed
            # the error, and only wait_until_finished raises it.
            with self._translate_disk_errors():
                self._manager.wait_until_finished()
        except UserError:
            raise
        except Exception:
            self._failures += 1
            if multihost.is_multiprocess() or self._failures == MAX_FAILURES:
                raise
            return True
        self._failures = 0
        return False

    def metadata(self, step: int) -> dict:
        """The metadata of a step. Raises UserError if damaged or written by later code."""
        items = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        with orbax_errors.translate_damage(self._path(step)):
            metadata = self._manager.restore(step, args=items)["metadata"]
            return checkpoint_metadata.check(metadata, self._path(step))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, with the shapes, dtypes and shardings of `abstract`.

        Raises UserError if the format is too old or the state is damaged.
        """
        metadata = self.metadata(step)
        if (version := metadata["format"]) < OLDEST:
            raise UserError(
                f"{self.directory} has training states of format {version}, this version resumes "
                f"formats {OLDEST} to {FORMAT}: choose another --workdir (the parameters can still "
                f"be loaded)"
            )
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
        )
        with orbax_errors.translate_damage(self._path(step)):
            restored = self._manager.restore(step, args=items)
            arrays = {name: restored[name] for name in ("params", "opt_state")}
        checkpoint_metadata.verify_arrays(checksums.of_tree(arrays), metadata, self._path(step))
        counter = jax.device_put(jnp.asarray(step, jnp.int32), abstract.step.sharding)
        return TrainState(counter, **arrays)

    def _path(self, step: int) -> str:
        return f"{self.directory}/{step}"

    def close(self):
        """Waits for the last save and raises its error."""
        with self._translate_disk_errors():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextlib.contextmanager
    def _translate_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            problem = orbax_errors.disk_problem(e)
            if not problem:
                raise
            newest = self._manager.latest_step() or "none"
            # asyncio would log the error of every array after this one.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise UserError(
                f"{problem} for a checkpoint in {self.directory} (newest complete step: {newest}): "
                f"fix this and run the same command again to resume"
            ) from e


def _nan_is_worst(value: float, metric: str) -> float:
    """The value of a metric, with the worst possible one instead of NaN, which does not sort."""
    if not math.isnan(value):
        return value
    return math.inf if metrics_log.is_loss(metric) else -math.inf


def _format(state: TrainState) -> int:
    return OLDEST if optimizer.eval_params(state) is state.params else FORMAT
