"""Parameters in groups, and gradients for them that are large, small, zero and missing."""

import itertools

import torch


def make_groups(shapes, seed=0, dtype=torch.float64, scale=1.0):
    """Returns one list of parameters for each list of shapes; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [(scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for s in group]
        for group in shapes
    ]


def random_grads(shapes, step, generator):
    """Gradients over decades; step 7 is all zero; one matrix misses every third; the last group misses all."""
    size = 10.0 ** torch.empty(()).uniform_(-2, 2, generator=generator)
    grads = []
    for i, group in enumerate(shapes):
        grads.append([])
        for j, shape in enumerate(group):
            g = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            missing = i == len(shapes) - 1 or ((i, j) == (0, 0) and step % 3 == 2)
            grads[i].append(None if missing else torch.zeros_like(g) if step == 7 else g)
    return grads


def set_grads(groups, grads):
    for p, g in zip(itertools.chain(*groups), itertools.chain(*grads), strict=True):
        p.grad = None if g is None else g.to(p.dtype)
