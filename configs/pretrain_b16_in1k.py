"""D-iGPT ViT-B/16 on ImageNet-1K, 300 epochs: the main recipe (paper, section 4; official code).

    python -m dgpt_jax.train --config=configs/pretrain_b16_in1k.py:v5e-64 --workdir=DIR \\
        --config.data.path=TOKENS

Batch 4096, peak learning rate 2.4e-3, 40 epochs of warm-up. Fine-tuned accuracy in the paper: 86.2
(the authors' PyTorch on GPUs), 85.9 (their own TPU run). Ours: not run.

Estimates of `tools/plan.py` for each pod (libtpu 0.0.42.1; times are lower bounds from data sheets,
not measured on TPUs):

    pod      topology   images per chip   GiB per chip    ms per step, at least   days, at least
    v5e-64   v5e:8x8         64            6.1 of 15.8            50 (compute)         0.05
    v5e-16   v5e:4x4     2 x 128          10.7 of 15.8           199 (compute)         0.22
    v4-32    v4:2x2x4       256           17.8 of 30.8           162 (memory)          0.18

HBM traffic of a training step (planning/hlo_costs.py) by optimization, at equal model FLOPs, no
remat, one chip. Without them a step of 64 images does not fit a v5e (20 GiB).

    change, cumulative                             predicted    v5e, 32 images    v6e, 64 images
    XLA's attention, residuals of autodiff            100 %      58.3 GB 100 %    131.7 GB 100 %
    attention kernel (attention_tpu.py)                60 %      28.7 GB  49 %
    norms, GELU, scores recomputed, not saved;
    taps read from the blocks' inputs                  35 %      21.3 GB  37 %     49.0 GB  37 %
    attention output saved in bfloat16 instead of
    the residual stream after it in float32            33 %      18.7 GB  32 %     44.9 GB  34 %

At 64 images on v5e the last row moves 35.2 GB (36.8 with remat "dots", 37.9 with "full"). 224
images per chip fit without remat (15.5 GiB), which recomputes no projection and no MLP product.
Measured before non-finite gradients were guarded against, which adds 0.8 GB per step.
GELU by erf in float32, rounded before the multiplication, instead of erfc in bfloat16 (predicted:
no change): v5e:8x8 39.3 → 36.6 GB, v4:2x2x4 198.6 GB both; multiplied in float32, v4 212.1.
Explicit LayerNorm gradient (for GPUs; predicted: no change): v5e:8x8 35.9 GB, v4:2x2x4 194.2.

On one H200 (batch 256) a step takes 103 ms, 2,475 images/s: docs/results/gpu.md.
"""

from dgpt_jax.config import TrainConfig, check_choice, default_config

PODS = ("v5e-64", "v5e-16", "v4-32")


def get_config(pod: str = PODS[0]):
    check_choice("the pod of this config", pod, PODS)
    config = default_config(TrainConfig)
    config.model.size = "B/16"
    config.total = "300 epochs"
    config.batch_size = 4096
    config.accum_steps = 2 if pod == "v5e-16" else 1  # 128 images per chip and micro-batch
    config.optim.blr = 1.5e-4
    config.optim.warmup = "40 epochs"
    config.data.path = "tokens_in1k"
    config.data.examples = 1281167
    config.teacher.width = 1024  # OpenCLIP ViT-H/14, checked against the store
    config.teacher.grid = 16
    return config
