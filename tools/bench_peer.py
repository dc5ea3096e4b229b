"""Steps of tools/bench.py and of its PyTorch peer (bench_torch.py) in turns."""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dgpt_jax.schema import UserError

PARITY = 1e-4  # of losses in float32, relative


def say(line: str):
    print(line, file=sys.stderr, flush=True)


class Peer:
    """bench_torch.py in a process of its own, which waits while ours runs.

    It begins to compile when it is made, which takes it about as long as it takes us.
    """

    def __init__(self, kind: str, work: Path):
        words = [sys.executable, Path(__file__).with_name("bench_torch.py"), f"--work={work}"]
        self._process = subprocess.Popen(
            [*map(str, words), f"--kind={kind}"], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._tell("loss")
        self._tell("run 2")

    def _tell(self, command: str):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")

    def seconds(self, steps: int) -> float:
        self._tell(f"run {steps}")
        return self.answer()

    def answer(self):
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError("the peer has ended (see above): is torch installed? extra `torch`")
        return json.loads(answer)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def beside(ours, kind: str, steps: int, rounds: int) -> tuple[list[float], dict]:
    """Seconds of our steps, and what the peer took: `rounds` turns of `steps` steps each.

    `ours` is a bench.Ours, not compiled yet. Raises UserError where the peer's losses are others.
    """
    with tempfile.TemporaryDirectory() as work:
        ours.write(Path(work))
        with contextlib.closing(Peer(kind, Path(work))) as peer:
            ours.compile()
            losses = peer.answer()
            if kind == "torch":
                own = ours.losses()
                say(f"losses, float32: {own} ours, {losses} the peer's")
                if not np.allclose(own, losses, rtol=PARITY):
                    raise UserError(f"the peer computes other losses: {losses}, not {own}")
            say(f"the peer compiled in {peer.answer():.0f} s, 2 steps included")
            ours.run(2)
            mine, theirs = [], []
            for _ in range(rounds):
                mine.append(ours.run(steps))
                theirs.append(peer.seconds(steps) / steps)
    ratios = [b / statistics.mean(a) for a, b in zip(mine, theirs, strict=True)]
    found = {
        "peer": kind, "peer_ms": 1e3 * statistics.median(theirs),
        "ratio_vs_peer": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip
    return [s for run in mine for s in run], found
