"""Training scripts of many kinds, and what a launch check makes of them."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

from smoothdiag.cli import main

HEAD = """
import sys, torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
X = torch.randn(2000, 6)
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
def batch(k, size=20):
    return X[size * k:size * (k + 1)], Y[size * k:size * (k + 1)]
def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
def told(*models):
    if len(sys.argv) > 1:
        torch.save([p.detach() for m in models for p in m.parameters()], sys.argv[1])
"""
"""Data, a network, and `told`, which saves the weights to the file that the script is given."""

STEP = "    optimizer.zero_grad()\n    loss.backward()\n    optimizer.step()\n    told(model)\n"
SGD = "model = mlp()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)\n"

MEASURED = {
    "plain": SGD + "for k in range(40):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y)\n" + STEP,
    "model returns a tuple": (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = mlp()\n"
        "    def forward(self, x, y):\n        out = self.net(x)\n        return out, F.cross_entropy(out, y)\n"
        "model = Net()\noptimizer = torch.optim.AdamW(model.parameters(), lr=0.01)\n"
        "for k in range(40):\n    _, loss = model(*batch(k))\n" + STEP
    ),
    "accumulation under a scaler": (
        SGD + "scaler = torch.amp.GradScaler('cpu')\n"
        "for k in range(40):\n    optimizer.zero_grad()\n    for part in range(2):\n"
        "        x, y = batch(2 * k + part)\n        loss = F.cross_entropy(model(x), y) / 2\n"
        "        scaler.scale(loss).backward()\n    scaler.unscale_(optimizer)\n"
        "    nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n    scaler.step(optimizer)\n    scaler.update()\n"
        "    told(model)\n"
    ),
    "two optimizers on one loss": (
        "encoder, head, criterion = mlp()[:2], nn.Linear(16, 4), nn.CrossEntropyLoss()\n"
        "optimizers = [torch.optim.SGD(encoder.parameters(), lr=0.1), torch.optim.Adam(head.parameters(), lr=0.01)]\n"
        "for k in range(40):\n    x, y = batch(k)\n    x = x + 0.1 * torch.randn_like(x)\n"
        "    loss = criterion(head(encoder(x)), y) + 1e-3 * sum(p.pow(2).sum() for p in encoder.parameters())\n"
        "    for each in optimizers: each.zero_grad()\n    loss.backward()\n"
        "    for each in optimizers: each.step()\n    told(encoder, head)\n"
    ),
    "two optimizers on two losses": (
        "G, D = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "of_g, of_d = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (G, D))\nbce = nn.BCEWithLogitsLoss()\n"
        "for k in range(40):\n    real, fake = batch(k)[0], G(torch.randn(20, 3))\n    of_d.zero_grad()\n"
        "    loss = bce(D(real), torch.ones(20, 1)) + bce(D(fake.detach()), torch.zeros(20, 1))\n"
        "    loss.backward()\n    of_d.step()\n    of_g.zero_grad()\n"
        "    bce(D(fake), torch.ones(20, 1)).backward()\n    of_g.step()\n    told(G, D)\n"
    ),
    "closure": (
        SGD + "for k in range(40):\n    x, y = batch(k)\n    def closure():\n        optimizer.zero_grad()\n"
        "        loss = F.cross_entropy(model(x), y)\n        loss.backward()\n        return loss\n"
        "    optimizer.step(closure)\n    told(model)\n"
    ),
    "writes in place and dropout": (
        "model = nn.Sequential(mlp(), nn.Dropout(0.2))\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for k in range(40):\n    x, y = batch(k)\n    out = model(x)\n    loss = torch.zeros(())\n"
        "    loss += F.cross_entropy(out, y)\n    weight = torch.ones(20)\n    weight[:5] = 2.0\n"
        "    loss = loss + 0.1 * (weight * out.pow(2).mean(1)).mean()\n" + STEP
    ),
    "main guarded by its name": (
        "import argparse\ndef main():\n    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('weights', nargs='?')\n"
        "    parser.parse_args()\n    model = mlp()\n    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    try:\n        for k in range(40):\n            try:\n                x, y = batch(k)\n"
        "                loss = F.cross_entropy(model(x), y)\n                optimizer.zero_grad()\n"
        "                loss.backward()\n                optimizer.step()\n                told(model)\n"
        "            except Exception:\n                print('swallowed')\n    finally:\n        print('tidied')\n"
        "if __name__ == '__main__':\n    main()\n"
    ),
}
"""Loops that can be measured."""

REFUSED = {
    "forward called by itself": (
        "model = nn.Linear(6, 4)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for k in range(40):\n    x, y = batch(k)\n    loss = F.cross_entropy(model.forward(x), y)\n" + STEP,
        "model.forward(...)",
    ),
    "function of its own": (
        "class Square(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x):\n"
        "        ctx.save_for_backward(x)\n        return x * x\n    @staticmethod\n    def backward(ctx, g):\n"
        "        return 2 * ctx.saved_tensors[0] * g\n"
        + SGD
        + "for k in range(40):\n    x, y = batch(k)\n    loss = Square.apply(model(x)).mean()\n"
        + STEP,
        "comes from SquareBackward",
    ),
    "no optimizer of torch": (
        "model = mlp()\nfor k in range(40):\n    x, y = batch(k)\n    F.cross_entropy(model(x), y).backward()\n",
        "no optimizer of torch.optim",
    ),
    "another loss when it is computed again": (
        "scale = [1.0]\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net = mlp()\n    def forward(self, x):\n        return self.net(x) * scale[0]\n"
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for k in range(40):\n    x, y = batch(k)\n    scale[0] = 1.0\n    loss = F.cross_entropy(model(x), y)\n"
        "    optimizer.zero_grad()\n    loss.backward()\n    scale[0] = 3.0\n    optimizer.step()\n",
        "another one than the loop trains",
    ),
    "batch that is written to": (
        SGD + "data = torch.empty(20, 6)\nfor k in range(40):\n    x, y = batch(k)\n    data.copy_(x)\n"
        "    loss = F.cross_entropy(model(data), y)\n    optimizer.zero_grad()\n    loss.backward()\n"
        "    data.zero_()\n    optimizer.step()\n",
        "has written to a tensor",
    ),
    "part kept in the model": (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = mlp()\n"
        "    def forward(self, x):\n        out = self.net(x)\n        self.extra = out.pow(2).mean()\n"
        "        return out\n"
        "model = Net()\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for k in range(40):\n    x, y = batch(k)\n    loss = F.cross_entropy(model(x), y) + model.extra\n" + STEP,
        "comes from MeanBackward",
    ),
}
"""Loops whose loss cannot be computed again, and a part of the reason."""


def check(folder, code, *options, arguments=()) -> dict:
    """Returns the JSON document of a launch check of a script, and what the script printed as ``printed``."""
    script = folder / "train.py"
    script.write_text(HEAD + code)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(["launch-check", "--json", *options, str(script), *map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return json.loads(out.getvalue()) | {"printed": err.getvalue(), "code": code}
