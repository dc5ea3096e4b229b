"""Metrics: CLU collections on the device; JSONL, TensorBoard and W&B; traces."""

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

import jax
import numpy as np
from clu import metrics as clu_metrics
from clu import profiler
from etils import epath

from dgpt_jax import boards, mirror, run_log, sharding
from dgpt_jax.schema import UserError

Metrics = clu_metrics.Collection
MOST_WAITING = 4  # steps whose pictures are not drawn yet; each keeps arrays on a device


def averages(names: Iterable[str]) -> type[Metrics]:
    """A CLU collection that averages each of the named outputs of a step."""
    return Metrics.create(**{n: clu_metrics.Average.from_output(n) for n in names})


class Interval:
    """The averages of the steps since the last log line, as they run on the devices.

    What is logged of an interval is fetched when the next one ends: the host waits for no step.
    """

    def __init__(self, names: Iterable[str], mesh):
        self._empty = jax.device_get(averages(names).empty())
        self._place = sharding.replicated(mesh)
        self._ended: tuple[int, dict, dict] | None = None
        self._begin()

    def _begin(self):  # placed as the step leaves it; from the host, which waits for no step
        self.running = jax.tree.map(lambda x: sharding.placed(x, self._place), self._empty)

    def end(self, step: int, values: dict[str, float], counts: dict[str, jax.Array]):
        """Ends it after `step`, with values of the host and more from the device; the next begins.
        What ended before must have been taken."""
        self._ended = step, values, self.running.compute() | counts
        self._begin()

    def take(self) -> tuple[int, dict[str, float]] | None:
        """(step, all values) of the interval that ended last, once; waits for its last step."""
        ended, self._ended = self._ended, None
        if ended is None:
            return None
        step, values, computed = ended
        return step, values | {name: float(v) for name, v in jax.device_get(computed).items()}


class Writer:
    """Scalars to `metrics.jsonl` (always), TensorBoard in the work directory, and W&B where a
    project is named, on process 0. Pictures are drawn by a thread."""

    def __init__(self, workdir, project: str = ""):
        self._active = jax.process_index() == 0
        self._boards: list[boards.Board] = []
        if self._active:
            self._mirror = mirror.Mirror(workdir, (run_log.FILE, boards.WANDB_ID))
            near = self._mirror.near
            # Unbuffered: closing is not to write, and fail, once more on a full disk.
            self._file = (near / run_log.FILE).open("ab", buffering=0)
            self._boards.append(boards.TensorBoard(near / "tensorboard"))
            if project:
                name = epath.Path(workdir).name
                self._boards.append(boards.Wandb(project, name, near))
            self._draughtsman = ThreadPoolExecutor(1)
            self._waiting = threading.BoundedSemaphore(MOST_WAITING)

    def scalars(self, step: int, values: dict[str, float]):
        """Raises UserError where the disk is full."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        # JSON has no NaN; a reader should not need a special parser to find one.
        shown = {n: v if math.isfinite(v) else str(v) for n, v in values.items()}
        try:
            self._file.write(f"{json.dumps({'step': step} | shown)}\n".encode())
        except OSError as e:
            raise UserError(
                f"{self._file.name} cannot be written: {e.strerror}: mend that, then the same "
                f"command continues"
            ) from e
        for board in self._boards:
            board.scalars(step, values)
        self._mirror.copy_sometimes()

    def pictures(self, step: int, draw: Callable[[], dict[str, np.ndarray]]):
        """{name: uint8 (height, width, 3)} of `draw`, which is called in a thread: nothing waits
        for it. What goes wrong there is said, and no more; so is a step that is left out, because
        drawing does not keep up."""
        if not self._active:
            return
        if self._waiting.acquire(blocking=False):
            self._draughtsman.submit(self._draw, step, draw)
        else:
            print(f"no pictures of step {step}: those before are still drawn", file=sys.stderr)

    def _draw(self, step: int, draw):
        try:
            for name, picture in draw().items():
                for board in self._boards:
                    board.picture(step, name, picture)
        except Exception as e:
            print(f"no pictures of step {step}: {type(e).__name__}: {e}", file=sys.stderr)
        finally:
            self._waiting.release()

    def config(self, resolved: dict):
        """The resolved config: config.json, and a text in TensorBoard."""
        if self._active:
            text = json.dumps(resolved, indent=1)
            (self._mirror.near / "config.json").write_text(text + "\n")
            for board in self._boards:
                board.config(resolved, text)

    def copy(self):
        """Sees to it that all until now is in the work directory, if that is on gs://."""
        if self._active:
            self._mirror.copy()

    def close(self):
        """Raises UserError where the files cannot be copied to gs://; they are kept."""
        if self._active:
            with contextlib.closing(self._mirror):  # whatever a board raises
                self._draughtsman.shutdown()
                self._file.close()
                for board in self._boards:
                    board.close()


def best_and_last(workdir, best: str) -> list[str]:
    """A line for every metric of the evaluations of a run that keeps its `best`: its best value,
    its last."""
    if not best or not (epath.Path(workdir) / run_log.FILE).is_file():
        return []
    lines = []
    for name, curve in run_log.read(workdir).curves.items():
        finite = curve.finite()
        # knn/cls: what an evaluation has measured
        if "/" in name and not run_log.is_detail(name) and len(finite):
            top = finite.values.argmin() if run_log.is_loss(name) else finite.values.argmax()
            (value, step), (last, last_step) = finite.point(top), finite.point(-1)
            lines.append(
                f"{name}: best {value:.4f} at step {step}, last {last:.4f} at step {last_step}"
            )
    return lines


class Profile:
    """A trace of the steps that `config.profile` names, in TensorBoard's layout; a context.

    Every process traces the same steps, into a file of its own (number and host) under
    WORKDIR/profile/plugins/profile/step_N. A process that traced alone would hold up the others.
    """

    def __init__(self, workdir, steps: tuple[int, int] | None, first: int):
        self._start, self._stop = (first + n for n in steps) if steps else (None, None)
        self._to = epath.Path(workdir) / f"profile/plugins/profile/step_{self._start}"
        self._local = None  # where JAX writes: processes of one host would take the same name

    def reached(self, step: int, state) -> bool:
        """Starts or stops before `step`, once the steps until then are done; whether it did."""
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
        with self._local as traced, mirror.written(self._to) as near:
            for file in Path(traced).glob("plugins/profile/*/*"):
                shutil.copyfile(file, near / f"{jax.process_index():04}.{file.name}")
        self._local = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_):
        self._finish()
