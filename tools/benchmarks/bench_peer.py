"""Alternates training steps of bench.py with those of its PyTorch peer, bench_torch.py."""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgpt_jax.errors import UserError

if TYPE_CHECKING:
    from tools.benchmarks.bench import JaxStep

ROOT = Path(__file__).resolve().parents[2]
LOSS_RTOL = 1e-4  # in float32


def say(line: str):
    print(line, file=sys.stderr, flush=True)


class Peer:
    """Process of bench_torch.py, idle between requests.

    It starts to compile at once, in parallel with JAX, which takes about as long.
    """

    def __init__(self, kind: str, work: Path):
        command = [sys.executable, "-m", "tools.benchmarks.bench_torch", f"--work={work}"]
        self._process = subprocess.Popen(
            [*command, f"--kind={kind}"], cwd=ROOT, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._send("loss")
        self._send("run 2")

    def _send(self, command: str):
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(command + "\n")

    def seconds(self, steps: int) -> float:
        self._send(f"run {steps}")
        return self.receive()

    def receive(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise UserError("the PyTorch process exited (see above): pip install dgpt_jax[torch]")
        return json.loads(line)

    def close(self):
        self._requests.close()
        self._process.wait()


def alternate(
    step: "JaxStep", kind: str, steps: int, rounds: int
) -> tuple[list[float], dict[str, Any]]:
    """Times `rounds` × `steps` steps of both in turn. Returns (seconds of our steps, peer results).

    step: not compiled yet. Raises UserError if the losses differ.
    """
    with tempfile.TemporaryDirectory() as work:
        step.save(Path(work))
        with contextlib.closing(Peer(kind, Path(work))) as peer:
            step.compile()
            peer_losses = peer.receive()
            if kind == "torch":
                losses = step.losses()
                say(f"losses in float32: JAX {losses}, PyTorch {peer_losses}")
                if not np.allclose(losses, peer_losses, rtol=LOSS_RTOL):
                    raise UserError(f"losses differ: JAX {losses}, PyTorch {peer_losses}")
            say(f"PyTorch compiled in {peer.receive():.0f} s, 2 steps included")
            step.run(2)
            seconds, peer_seconds = [], []
            for _ in range(rounds):
                seconds.append(step.run(steps))
                peer_seconds.append(peer.seconds(steps) / steps)
    ratios = [b / statistics.mean(a) for a, b in zip(seconds, peer_seconds, strict=True)]
    results = {
        "peer": kind, "peer_ms": 1e3 * statistics.median(peer_seconds),
        "ratio_vs_peer": statistics.median(ratios), "ratios": ratios,
    }  # fmt: skip
    return [s for run in seconds for s in run], results
