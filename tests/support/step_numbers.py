"""Saves twenty training steps on a device layout, for comparison with other layouts.

    python -m tests.support.step_numbers OUT DATA LAYOUT…
        [--hosts=ADDRESS,PROCESSES,PROCESS] [--fault=FAULT]

DATA is a token store, or labeled images with --task=classify. A LAYOUT is
DATAxFSDPxTENSOR[:MICROBATCHES]. FAULT plants a bug: `gradient` scales all gradients by 8, `half`
replaces half of every batch by the other half.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax

from dgpt_jax.config import roots, schema
from dgpt_jax.data import loader
from dgpt_jax.distributed import multihost, param_rules, sharding
from dgpt_jax.evals import pretraining
from dgpt_jax.monitoring import metrics
from dgpt_jax.training import loop, optimizer, tasks, train_step
from tests.support.data import TINY

STEPS, BATCH = 20, 16


def flat(tree, prefix: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{prefix}/{param_rules.path_of(path)}": np.asarray(leaf) for path, leaf in leaves}


# Classification with everything that is random within a step.
CLASSIFY = {
    "classify": {
        "num_classes": 2,
        "mixup_group_size": 8,
        "drop_path": 0.3,
        "random_erase_prob": 0.5,
    },
    "optim": {"layer_decay": 0.8, "ema": 0.9},
}


def run(layout: str, store: str, fault: str, task: str) -> dict[str, np.ndarray]:
    """losses (STEPS,); gradient/PATH: norms at step 0; params/PATH, heldout/NAME and val/NAME after
    the last step, on 20 examples: one batch on one device, padded batches on several."""
    shape, _, accum = layout.partition(":")
    sizes = [int(n) for n in shape.split("x")]
    settings = {
        "batch_size": BATCH, "accum_steps": int(accum or 1), "dtype": "float32", "model": TINY,
        "total": f"{STEPS} steps", "data": {"path": store, "threads": 2},
        "mesh": dict(zip(sharding.AXES, sizes, strict=True)),
        "evals": {"heldout": store, "heldout_split": "train",
                  "batch_size": 8 if max(sizes) > 1 else 20},
        "task": task,
    }  # fmt: skip
    run = schema.parse(roots.TrainConfig, settings | (CLASSIFY if task == "classify" else {}))
    task = tasks.open_task(run)
    devices = np.array(jax.devices()[: int(np.prod(sizes))])
    # Neighbors in the mesh belong to different processes, as on a pod.
    mesh = sharding.make_mesh(run.mesh, [*devices.reshape(jax.process_count(), -1).T.flat])
    rows = sharding.process_rows(mesh, BATCH)

    def loss(params, frozen, batch):
        value, terms = task.loss(params, frozen, batch)
        return value * (8 if fault == "gradient" else 1), terms

    def batches():
        stream = loader.train_batches(task.examples, BATCH, rows=rows, start_step=0)
        for batch in stream:
            if fault == "half":
                batch = jax.tree.map(lambda x: np.concatenate([x[: len(x) // 2]] * 2), batch)
            yield sharding.global_batch(mesh, BATCH, batch)

    gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    tx = task.optimizer(optimizer.schedule(5e-3, 2, STEPS))
    current = train_step.init_state(task.init, tx, mesh, 0, task.initial_weights().params)
    step = train_step.make_train_step(
        loss, tx, mesh, accum_steps=run.accum_steps, prepare=task.prepare, seed=run.seed
    )
    collection, losses = metrics.averages(task.metric_names), []
    for number, batch in zip(range(STEPS), batches(), strict=False):
        current, running = step(current, collection.empty(), batch, {})
        values = running.compute()
        losses.append(float(values["loss"]))
        if number == 0:  # AdamW's first moment is (1 - b1) times the first gradient
            moment = flat(gather(optax.tree.get(current.opt_state, "mu")), "gradient")
            norms = {n: np.linalg.norm(m) / (1 - run.optim.b1) for n, m in moment.items()}
    params = gather(optimizer.eval_params(current))
    (evaluate,) = loop.evaluations_of(task).make_evaluators(task, mesh)
    evals = evaluate(optimizer.eval_params(current))
    if (
        jax.process_count() > 1 and run.task == "pretrain"
    ):  # every process draws the gathered figures
        figure = pretraining.prediction_figures(task, mesh)(optimizer.eval_params(current))()[
            "predictions"
        ]
        assert figure.shape[1] > 500 and figure.std() > 10
    return {"losses": np.array(losses)} | norms | evals | flat(params, "params")


def without_keys(name: str, leaf: np.ndarray) -> np.ndarray:
    """Removes the biases of attention keys: softmax is invariant to them, so their gradient is
    rounding noise, which Adam scales up to a full step."""
    if name.endswith("qkv/bias"):
        return leaf[:, [0, 2]]
    return leaf[:, 1] if name.endswith("kv/bias") else leaf


def assert_same(a: dict, b: dict):
    """Losses within 1e-5 relative, gradient norms and parameters within 1e-4."""
    assert a.keys() == b.keys()
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-5)
    for name in a:
        if name.startswith(("heldout/", "val/")):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
        kind = name.partition("/")[0]
        if kind == "gradient":
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
        elif kind == "params":
            x, y = without_keys(name, a[name]), without_keys(name, b[name])
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(x).max(), err_msg=name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("store")
    parser.add_argument("layouts", nargs="+")
    parser.add_argument("--hosts", default="")
    parser.add_argument("--fault", default="")
    parser.add_argument("--task", default="pretrain")
    args = parser.parse_args()
    if args.hosts:
        address, processes, process = args.hosts.split(",")
        multihost.start(
            roots.HostsConfig(
                coordinator=address, num_processes=int(processes), process_id=int(process)
            ),
            "cpu",
        )
    for layout in args.layouts:
        arrays = run(layout, args.store, args.fault, args.task)
        if jax.process_index() == 0:
            np.savez(args.out / f"{layout.replace(':', '_')}{args.fault}.npz", **arrays)


if __name__ == "__main__":
    main()
