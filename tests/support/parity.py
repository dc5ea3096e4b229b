"""Random weights and outputs of transformers' models."""

import numpy as np


def randomize(model, seed: int = 0):
    """The model in eval mode with random biases, norms and scales too, so that omissions show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            is_scale = p.ndim == 1 and name.endswith((".weight", ".lambda1"))
            fan_in = p[0].numel() if p.ndim in (2, 4) and "embedding.weight" not in name else 9
            p.copy_(1 + 0.3 * values if is_scale else values * fan_in**-0.5)
    return model.eval()


def images(seed: int, size: int) -> np.ndarray:
    """Normalized images (2, size, size, 3)."""
    values = np.random.default_rng(seed).standard_normal((2, 3, size, size))
    return values.astype(np.float32).transpose(0, 2, 3, 1)


def hidden_state(model, x, **kwargs) -> np.ndarray:
    """`last_hidden_state` of a model on `images`."""
    import torch

    with torch.no_grad():
        x = torch.tensor(x.transpose(0, 3, 1, 2).copy())
        return model(x, **kwargs).last_hidden_state.numpy()
