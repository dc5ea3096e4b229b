"""CLU metrics on devices; a writer for JSONL, TensorBoard and W&B; profiler traces."""

import contextlib
import json
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import metrics as clu_metrics
from clu import parameter_overview, profiler
from etils import epath

from dgpt_jax.distributed import sharding
from dgpt_jax.errors import UserError
from dgpt_jax.monitoring import metrics_log, time_use, trackers
from dgpt_jax.storage import remote_sync

Metrics = clu_metrics.Collection
PARAMETERS_FILE = "parameters.txt"
MAX_PENDING = 4  # steps whose images are not drawn yet; each holds arrays on a device


def averages(names: Iterable[str]) -> type[Metrics]:
    """Returns a CLU collection that averages each of the named outputs of a step."""
    return Metrics.create(**{n: clu_metrics.Average.from_output(n) for n in names})


class MetricAccumulator:
    """Averages of the steps since the last log line, accumulated on the devices in `running`.

    The values of an interval are fetched when the next one ends, so the host waits for no step.
    """

    def __init__(self, names: Iterable[str], mesh: jax.sharding.Mesh):
        self._empty = jax.device_get(averages(names).empty())
        self._sharding = sharding.replicated(mesh)
        self._closed: tuple[int, dict, dict] | None = None
        self._reset()

    def _reset(self):  # from host arrays, without waiting for a step; sharded like its results
        self.running = jax.tree.map(
            lambda x: sharding.make_global_array(x, self._sharding), self._empty
        )

    def close(self, step: int, values: dict[str, float], counts: dict[str, jax.Array]):
        """Ends the interval after `step` and starts the next one.

        values, counts: more values to log, from host and device. The previous interval must have
        been fetched.
        """
        self._closed = step, values, self.running.compute() | counts
        self._reset()

    def fetch(self) -> tuple[int, dict[str, float]] | None:
        """Returns (step, values) of the last closed interval, once; waits for its last step."""
        closed, self._closed = self._closed, None
        if closed is None:
            return None
        step, values, computed = closed
        return step, values | {name: float(v) for name, v in jax.device_get(computed).items()}


class Writer:
    """Writes `metrics.jsonl`, TensorBoard files and, if `project` is set, W&B, in process 0 only.
    Images are drawn in a thread."""

    def __init__(self, workdir: epath.Path | Path | str, project: str = ""):
        self._active = jax.process_index() == 0
        self._trackers: list[trackers.Tracker] = []
        if self._active:
            self._sync = remote_sync.RemoteSync(workdir, (metrics_log.FILE, trackers.WANDB_ID))
            local = self._sync.local
            # Unbuffered, so that closing does not write, and fail again, on a full disk.
            self._file = (local / metrics_log.FILE).open("ab", buffering=0)
            self._trackers.append(trackers.TensorBoard(local / "tensorboard"))
            if project:
                name = epath.Path(workdir).name
                self._trackers.append(trackers.Wandb(project, name, local))
            self._image_executor = ThreadPoolExecutor(1)
            self._pending = threading.BoundedSemaphore(MAX_PENDING)

    def scalars(self, step: int, values: dict[str, float]):
        """Writes scalars. Raises UserError if the log cannot be written (a full disk)."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN or infinities: they are strings, which any parser reads.
        encoded = {n: v if math.isfinite(v) else str(v) for n, v in values.items()}
        try:
            self._file.write(f"{json.dumps({'step': step} | encoded)}\n".encode())
        except OSError as e:
            raise UserError(
                f"{self._file.name} cannot be written: {e.strerror}: fix that and run the same "
                f"command again to resume"
            ) from e
        shown = {name: value for name, value in values.items() if name not in time_use.KEYS}
        for tracker in self._trackers:
            tracker.scalars(step, shown)
        self._sync.sync_if_due()

    def images(self, step: int, draw: Callable[[], dict[str, np.ndarray]]):
        """Writes the images of `draw`, {name: uint8 (height, width, 3)}.

        `draw` is called in a thread, for which nothing waits. Its errors are only printed. If
        MAX_PENDING steps are pending, this one is skipped, with a line.
        """
        if not self._active:
            return
        if self._pending.acquire(blocking=False):
            self._image_executor.submit(self._draw, step, draw)
        else:
            print(f"no images of step {step}: {MAX_PENDING} steps are pending", file=sys.stderr)

    def _draw(self, step: int, draw: Callable[[], dict[str, np.ndarray]]):
        try:
            for name, image in draw().items():
                for tracker in self._trackers:
                    tracker.image(step, name, image)
        except Exception as e:
            print(f"no images of step {step}: {type(e).__name__}: {e}", file=sys.stderr)
        finally:
            self._pending.release()

    def config(self, resolved: dict[str, Any]):
        """Writes the resolved config to config.json and as text to the trackers."""
        if self._active:
            text = json.dumps(resolved, indent=1)
            (self._sync.local / "config.json").write_text(text + "\n")
            for tracker in self._trackers:
                tracker.config(resolved, text)

    def parameters(self, params: Any):
        """Writes a table of the parameters' names, shapes, types and sizes to PARAMETERS_FILE."""
        if self._active:
            table = parameter_overview.get_parameter_overview(params, include_stats=False)
            (self._sync.local / PARAMETERS_FILE).write_text(table + "\n")

    def copy(self):
        """Copies the files to a work directory on gs://; nothing to do for a local one."""
        if self._active:
            self._sync.sync()

    def close(self):
        """Closes and copies all files. Raises UserError if they cannot be copied to gs://; the
        local files stay."""
        if self._active:
            with contextlib.closing(self._sync):  # even if a tracker raises
                self._image_executor.shutdown()
                self._file.close()
                for tracker in self._trackers:
                    tracker.close()


def best_and_last(workdir: epath.Path | Path | str, best: str) -> list[str]:
    """Returns a line per evaluation metric with its best and last value; none if `best`, the
    metric of config.checkpoint.best, is empty."""
    if not best or not (epath.Path(workdir) / metrics_log.FILE).is_file():
        return []
    lines = []
    for name, curve in metrics_log.read(workdir).curves.items():
        finite = curve.finite()
        if "/" in name and not metrics_log.is_detail(name) and len(finite):
            index = finite.values.argmin() if metrics_log.is_loss(name) else finite.values.argmax()
            (value, step), (last, last_step) = finite.point(int(index)), finite.point(-1)
            lines.append(
                f"{name}: best {value:.4f} at step {step}, last {last:.4f} at step {last_step}"
            )
    return lines


class Profile:
    """Context that traces the steps of `config.profile`, in TensorBoard's layout.

    Every process traces the same steps, since one that traces alone would stall the others, and
    writes its own file (process index and host) to WORKDIR/profile/plugins/profile/step_N.
    """

    def __init__(self, workdir: epath.Path | Path | str, steps: tuple[int, int] | None, first: int):
        self._start, self._stop = (first + n for n in steps) if steps else (None, None)
        self._out = epath.Path(workdir) / f"profile/plugins/profile/step_{self._start}"
        # JAX's output: processes of one host would write to the same file.
        self._local: tempfile.TemporaryDirectory | None = None

    def reached(self, step: int, state: Any) -> bool:
        """Starts or stops tracing before `step`, if due, after `state` is ready; returns whether it
        did."""
        if step not in (self._start, self._stop):
            return False
        jax.block_until_ready(state)
        if step == self._start:
            self._local = tempfile.TemporaryDirectory()
            profiler.start(self._local.name)
        else:
            self._finish()
        return True

    def _finish(self):
        if self._local is None:
            return
        profiler.stop()
        with self._local as local, remote_sync.output_directory(self._out) as out:
            for file in Path(local).glob("plugins/profile/*/*"):
                shutil.copyfile(file, out / f"{jax.process_index():04}.{file.name}")
        self._local = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object):
        self._finish()
