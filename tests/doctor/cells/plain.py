"""Loops in plain PyTorch. Everything above the first cell is the beginning of every script."""

import math
from itertools import chain

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def batches(number):
    for _ in range(number):
        yield torch.randn(16, 6), torch.randint(3, (16,))


def loss_of(x, y):
    return F.cross_entropy(model(x), y)


# --- clip after the step
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step

# --- clip before the backward pass, gradients zeroed in place
for x, y in batches(6):
    optimizer.zero_grad(set_to_none=False)
    loss = loss_of(x, y)
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-nothing
    loss.backward()
    optimizer.step()

# --- generator used up by the optimizer
parameters = model.parameters()
optimizer = torch.optim.SGD(parameters, lr=0.1)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(parameters, 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- duplicates in a chain of a network and its own head
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(chain(model.parameters(), model[2].parameters()), 0.1)  # fault: clip-of-duplicates
    optimizer.step()

# --- gradients instead of parameters
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([p.grad for p in model.parameters()], 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- tensors that share the memory of the parameters
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([p.data for p in model.parameters()], 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- values of a state dict
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.state_dict().values(), 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- half of the network
for x, y in batches(6):
    optimizer.zero_grad()
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters(), 0.1)  # fault: clip-of-a-part
    optimizer.step()

# --- layers that came after the list of parameters was made
mine = list(model.parameters())
extra = nn.Linear(3, 3)
optimizer.add_param_group({"params": extra.parameters()})
for x, y in batches(6):
    optimizer.zero_grad()
    (5 * F.cross_entropy(extra(model(x)), y)).backward()
    clip_grad_norm_(mine, 0.1)  # fault: clip-of-a-part
    optimizer.step()

# --- minus one to switch clipping off
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), -1)  # fault: threshold-without-meaning
    optimizer.step()

# --- zero to switch clipping off
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = clip_grad_norm_(model.parameters(), max_norm=0.0)  # fault: threshold-without-meaning
    optimizer.step()

# --- values clipped at NaN
for x, y in batches(1):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model.parameters(), clip_value=math.nan)  # fault: threshold-without-meaning
    optimizer.step()

# --- two steps in a row
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.step()  # fault: step-with-used-gradients

# --- gradients thrown away between the clip and the step
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer.zero_grad()
    optimizer.step()

# --- hooks that clip every micro-batch


def clip(p):
    clip_grad_norm_(p, 0.05)  # fault: clip-per-micro-batch


for p in model.parameters():
    p.register_post_accumulate_grad_hook(clip)
for _ in range(6):
    for x, y in batches(2):
        loss_of(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()

# --- the loop of every tutorial
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- values
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model.parameters(), 0.01)
    optimizer.step()

# --- accumulation with a rest
optimizer.zero_grad()
for k, (x, y) in enumerate(batches(11)):
    (loss_of(x, y) / 4).backward()
    if (k + 1) % 4 == 0 or k == 10:
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

# --- steps left out where the norm is not finite
for k, (x, y) in enumerate(batches(13)):
    optimizer.zero_grad()
    (loss_of(x, y) * (math.nan if k % 3 else 1.0)).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    if not torch.isfinite(norm):
        continue
    optimizer.step()

# --- gradients dropped where the norm is not finite, and the step goes on
for k, (x, y) in enumerate(batches(12)):
    optimizer.zero_grad()
    (loss_of(x, y) * (math.nan if k < 6 else 1.0)).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    if not torch.isfinite(norm):
        optimizer.zero_grad()
    optimizer.step()

# --- each layer on its own
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    for layer in (model[0], model[2]):
        clip_grad_norm_(layer.parameters(), 0.05)
    optimizer.step()

# --- two lines that share the work
for x, y in batches(6):
    optimizer.zero_grad()
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters(), 0.05)
    clip_grad_value_(model[2].parameters(), 0.05)
    optimizer.step()

# --- one norm, clipped by hand of it
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    clip_grads_with_norm_(model.parameters(), 0.1, norm)
    optimizer.step()

# --- a part of the gradient that stays below the threshold is left out
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model[0].parameters(), 100.0)
    optimizer.step()

# --- clip in a hook of the step


def clip(*_):
    clip_grad_norm_(model.parameters(), 0.1)


optimizer.register_step_pre_hook(clip)
for _ in range(6):
    for x, y in batches(2):
        loss_of(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()

# --- hooks that clip one gradient each


def clip(p):
    clip_grad_norm_(p, 0.05)


for p in model.parameters():
    p.register_post_accumulate_grad_hook(clip)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()

# --- sharpness-aware: two passes, one step
for x, y in batches(6):
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    with torch.no_grad():
        moves = [0.05 * p.grad / norm for p in model.parameters()]
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
    optimizer.zero_grad()
    loss_of(x, y).backward()
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.sub_(move)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()

# --- from memory: the first group of two, weight decay or not
decay, rest = ([p for p in model.parameters() if (p.ndim > 1) is which] for which in (True, False))
optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)  # fault: clip-of-a-part
    optimizer.step()

# --- from memory: two losses, a clip after each
for x, y in batches(8):
    optimizer.zero_grad()
    out = model(x)
    loss_ce, loss_reg = F.cross_entropy(out, y), out.pow(2).mean()
    loss_ce.backward(retain_graph=True)
    clip_grad_norm_(model.parameters(), max_norm=0.1, norm_type=2)  # fault: clip-per-micro-batch
    loss_reg.backward()
    optimizer.step()

# --- from memory: truncated backpropagation, a clip for each chunk, one step
rnn, head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 3)
model = nn.ModuleList([rnn, head])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    hidden = None
    optimizer.zero_grad()
    for _chunk in range(3):
        out, hidden = rnn(torch.randn(8, 5, 6), hidden)
        hidden = tuple(h.detach() for h in hidden)
        F.cross_entropy(head(out).flatten(0, 1), torch.randint(3, (40,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-per-micro-batch
    optimizer.step()

# --- from memory: a threshold that follows the norms seen so far
import numpy as np  # noqa: E402

history = []
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    threshold = np.percentile(history, 50) if len(history) > 1 else np.float64("nan")
    norm = clip_grad_norm_(model.parameters(), threshold)  # fault: threshold-without-meaning
    history.append(min(float(norm), 1.0) if math.isfinite(norm) else 1.0)
    optimizer.step()

# --- from memory: the old name, after the step
import warnings  # noqa: E402

warnings.simplefilter("ignore")
for x, y in batches(8):
    loss_of(x, y).backward()
    optimizer.step()
    nn.utils.clip_grad_norm(model.parameters(), 0.25)  # fault: clip-after-step
    optimizer.zero_grad()

# --- from memory: the copy that keeps the best weights
import copy  # noqa: E402

best = copy.deepcopy(model)
for x, y in batches(40):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(best.parameters(), 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- from memory: weight norm after the list was made
params = [p for p in model.parameters() if p.requires_grad]
nn.utils.parametrizations.weight_norm(model[0])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(params, 0.01)  # fault: clip-of-a-part
    optimizer.step()


# --- from memory: SAM, the clip before the first step only
class SAM(torch.optim.Optimizer):
    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for g in self.param_groups for p in g["params"]]), p=2)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * 0.05 / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


sam = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
for x, y in batches(8):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-unused-gradients
    sam.first_step(zero_grad=True)
    loss_of(x, y).backward()
    sam.second_step(zero_grad=True)

# --- from memory: gradients zeroed after the backward pass
for x, y in batches(40):
    loss_of(x, y).backward()
    optimizer.zero_grad()
    clip_grad_norm_(model.parameters(), 1.0)  # fault: clip-of-nothing
    optimizer.step()

# --- from memory: two optimizers hold the same parameters
warmup = torch.optim.Adam(model.parameters(), lr=1e-4)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    warmup.step()
    optimizer.step()  # fault: step-with-used-gradients

# --- from memory: PPO, epochs of minibatches
for _update in range(3):
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    for _epoch in range(2):
        for rows in torch.randperm(64).split(16):
            loss = loss_of(x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()

# --- from memory: DQN, clamped by hand, target network
target = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
target.load_state_dict(model.state_dict())
for x, _ in batches(8):
    loss = F.smooth_l1_loss(model(x).max(1).values, target(x).max(1).values.detach() + 0.1)
    optimizer.zero_grad()
    loss.backward()
    for param in model.parameters():
        param.grad.data.clamp_(-1, 1)
    optimizer.step()
    for mine, theirs in zip(model.parameters(), target.parameters(), strict=True):
        theirs.data.copy_(0.9 * theirs.data + 0.1 * mine.data)

# --- from memory: gradient noise after the clip
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad.add_(0.001 * torch.randn_like(p.grad))
    optimizer.step()

# --- from memory: two kinds of parameters, two optimizers, one clip
matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.02, momentum=0.95)
vectors = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3)
for x, y in batches(8):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    for opt in (matrices, vectors):
        opt.step()
    for opt in (matrices, vectors):
        opt.zero_grad(set_to_none=True)

# --- from memory: truncated backpropagation, a step for each chunk
rnn, head = nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 3)
model = nn.ModuleList([rnn, head])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
hidden = None
for _chunk in range(8):
    optimizer.zero_grad()
    out, hidden = rnn(torch.randn(8, 5, 6), hidden)
    hidden = tuple(h.detach() for h in hidden)
    F.cross_entropy(head(out).flatten(0, 1), torch.randint(3, (40,))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- from memory: conflicting gradients projected by hand, written into grad
for x, y in batches(8):
    out = model(x)
    parts = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for loss in (F.cross_entropy(out, y), out.square().mean())
    ]
    for p, first, second in zip(model.parameters(), *parts, strict=True):
        inner = (first * second).sum()
        p.grad = first + second - (inner.clamp(max=0) / first.square().sum()) * first
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- from memory: meta-learning, fast weights in the inner loop
from torch.func import functional_call  # noqa: E402

for _task in range(6):
    weights = dict(model.named_parameters())
    for x, y in batches(2):
        loss = F.cross_entropy(functional_call(model, weights, x), y)
        grads = torch.autograd.grad(loss, weights.values(), create_graph=True)
        weights = {name: w - 0.05 * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    (x, y) = next(batches(1))
    optimizer.zero_grad()
    F.cross_entropy(functional_call(model, weights, x), y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- from memory: a worker that lends its gradients to a shared model
shared = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
optimizer = torch.optim.Adam(shared.parameters(), lr=1e-3)
for x, y in batches(8):
    model.load_state_dict(shared.state_dict())
    model.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    for mine, theirs in zip(model.parameters(), shared.parameters(), strict=True):
        theirs.grad = mine.grad
    optimizer.step()

# --- infinity by norm, and nobody reads the norm
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), math.inf)  # fault: threshold-without-meaning
    optimizer.step()

# --- infinity by norm, to read the norm
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = clip_grad_norm_(model.parameters(), math.inf)  # fault: clip-as-norm
    optimizer.step()

# --- infinity by value
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model.parameters(), math.inf)  # fault: threshold-without-meaning
    optimizer.step()

# --- minus infinity, with a norm that was there before
for x, y in batches(1):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    clip_grads_with_norm_(model.parameters(), -math.inf, norm)  # fault: threshold-without-meaning
    optimizer.step()

# --- a very small threshold
for x, y in batches(3):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 5e-4)
    optimizer.step()

# --- duplicates do no harm by value, nor without gradients
frozen = nn.Linear(2, 2).requires_grad_(False)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_([*model.parameters(), *model[0].parameters()], 0.01)
    clip_grad_norm_([*model.parameters(), *frozen.parameters(), *frozen.parameters()], 0.1)
    optimizer.step()

# --- evolution: gradients written through data, without a backward pass
loss_of(*next(batches(1))).backward()
optimizer.zero_grad()
for p in model.parameters():
    p.grad = torch.zeros_like(p)
for _ in range(6):
    for p in model.parameters():
        p.grad.data.copy_(torch.randn_like(p))
    optimizer.step()

# --- a loop that reads norms and never steps
norms = []
for x, y in batches(6):
    model.zero_grad()
    loss_of(x, y).backward()
    norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()

# --- a dry run of two steps with the mistakes of other cells
for x, y in batches(2):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.zero_grad()
    optimizer.step()
for x, y in batches(2):
    optimizer.zero_grad()
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters(), 0.01)
    optimizer.step()
for x, y in batches(2):
    optimizer.zero_grad(set_to_none=False)
    clip_grad_norm_(model.parameters(), 0.1)
    loss_of(x, y).backward()
    optimizer.step()

# --- more and more layers are clipped
for k, (x, y) in enumerate(batches(8)):
    optimizer.zero_grad()
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters() if k < 4 else model.parameters(), 0.01)
    optimizer.step()

# --- values of a part, the rest is small entry by entry
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model[0].parameters(), 0.2)
    optimizer.step()

# --- a norm of a part, the rest is small only entry by entry
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model[0].parameters(), 0.2)  # fault: clip-of-a-part
    optimizer.step()

# --- duplicates, often enough for a note on the line
for x, y in batches(34):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([*model.parameters(), model[0].weight], 1e-3)  # fault: clip-of-duplicates
    optimizer.step()

# --- hooks clip one gradient each, with gradients zeroed in place


def clip(p):
    clip_grad_norm_(p, 0.05)


for p in model.parameters():
    p.register_post_accumulate_grad_hook(clip)
for x, y in batches(6):
    optimizer.zero_grad(set_to_none=False)
    loss_of(x, y).backward()
    optimizer.step()

# --- a clip of micro-batches that are thrown away, gradients zeroed in place
for x, y in batches(6):
    loss_of(x, y).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    loss_of(x, y).backward()
    optimizer.zero_grad(set_to_none=False)
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)

# --- gradients zeroed in place between the clip and the step
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()

# --- gradients made anew after the clip, zeroed in place
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-of-unused-gradients
    optimizer.zero_grad(set_to_none=False)
    loss_of(x, y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)

# --- first everything is clipped, then nothing, gradients zeroed in place
for x, y in batches(6):
    optimizer.zero_grad(set_to_none=False)
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
for x, y in batches(6):
    optimizer.zero_grad(set_to_none=False)
    (5 * loss_of(x, y)).backward()
    clip_grad_norm_(model[0].parameters(), 0.01)  # fault: clip-of-a-part
    optimizer.step()

# --- a clipped micro-batch that is thrown away with the rest, right before the step
for _ in range(6):
    for x, y in batches(2):
        loss_of(x, y).backward()
        clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-of-unused-gradients
    optimizer.zero_grad()
    optimizer.step()

# --- third round: threshold tensor nan by clip_grads_with_norm
for x, y in batches(2):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    clip_grads_with_norm_(model.parameters(), torch.tensor(float("nan")), norm)  # fault: threshold-without-meaning
    optimizer.step()

# --- third round: foreach False negative int
for x, y in batches(2):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), -5, foreach=False, error_if_nonfinite=True)  # fault: threshold-without-meaning
    optimizer.step()

# --- third round: schedule of thresholds that reaches zero
for k, (x, y) in enumerate(batches(8)):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), max(0.0, 1.0 - k / 5))  # fault: threshold-without-meaning
    optimizer.step()

# --- third round: one tensor, after step
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()
    for p in model.parameters():
        clip_grad_norm_(p, 0.1)  # fault: clip-after-step

# --- third round: zero_grad forgotten, clip binds
for x, y in batches(35):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.001)  # fault: zero-grad-missing: optimizer.zero_grad()
    optimizer.step()


# --- third round: clip in post hook of step
def clip(*_):
    clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-after-step


optimizer.register_step_post_hook(clip)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    optimizer.step()


# --- third round: class trainer with helper and accumulation bug
class Trainer:
    def __init__(self, model, optimizer, accum=3):
        self.model, self.optimizer, self.accum = model, optimizer, accum

    def clip(self):
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)  # fault: clip-per-micro-batch

    def run(self):
        for i, (x, y) in enumerate(batches(12)):
            (loss_of(x, y) / self.accum).backward()
            self.clip()
            if (i + 1) % self.accum == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()


Trainer(model, optimizer).run()

# --- third round: filter object used once
trainable = filter(lambda p: p.requires_grad, model.parameters())
optimizer = torch.optim.Adam(trainable, lr=1e-3)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(trainable, 0.1)  # fault: clip-of-nothing
    optimizer.step()

# --- third round: zip of names
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_([p for n, p in model.named_parameters() if "bias" not in n], 0.01)  # fault: clip-of-a-part
    optimizer.step()

# --- third round: embedding tied twice through modulelist
tied = nn.Linear(3, 3, bias=False)
other = nn.Linear(3, 3)
other.weight = tied.weight
optimizer = torch.optim.SGD([*model.parameters(), *tied.parameters(), other.bias], lr=0.1)
for x, y in batches(8):
    optimizer.zero_grad()
    F.cross_entropy(other(tied(model(x))), y).backward()
    parameters = [*model.parameters(), *tied.parameters(), *other.parameters()]
    clip_grad_norm_(parameters, 0.1)  # fault: clip-of-duplicates
    optimizer.step()


# --- third round: step twice by a scheduler-like helper
def advance(optimizer):
    optimizer.step()  # fault: step-with-used-gradients


for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    advance(optimizer)

# --- third round: two phases, frozen body then everything
for p in model[0].parameters():
    p.requires_grad_(False)
optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
for p in model[0].parameters():
    p.requires_grad_(True)
optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- third round: evaluation between steps
for x, y in batches(8):
    model.train()
    optimizer.zero_grad(set_to_none=False)
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    model.eval()
    probe = torch.randn(4, 6, requires_grad=True)
    model(probe).sum().backward()
    probe.grad.norm()

# --- third round: gradient penalty, second backward with retain
for x, y in batches(8):
    optimizer.zero_grad()
    x.requires_grad_(True)
    loss = loss_of(x, y)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + g.square().sum()).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- third round: norm logged, then clip by groups
optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=1e-3)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    for group in optimizer.param_groups:
        clip_grad_norm_(group["params"], 0.05)
    optimizer.step()

# --- third round: retry of a batch after a spike
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    if norm > 0.4:
        optimizer.zero_grad()
        loss_of(x, y).backward()
        clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


# --- third round: lookahead wrapper of my own
class Lookahead:
    def __init__(self, inner):
        self.inner, self.slow = inner, [p.detach().clone() for g in inner.param_groups for p in g["params"]]

    def step(self):
        self.inner.step()
        with torch.no_grad():
            for p, s in zip([p for g in self.inner.param_groups for p in g["params"]], self.slow, strict=True):
                s.add_(0.5 * (p - s))
                p.copy_(s)


outer = Lookahead(optimizer)
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    outer.step()

# --- third round: learning the input by an optimizer, model frozen
image = torch.randn(16, 6, requires_grad=True)
optimizer = torch.optim.Adam([image], lr=0.1)
for _, y in batches(8):
    optimizer.zero_grad()
    F.cross_entropy(model(image), y).backward()
    clip_grad_norm_([image], 0.01)
    optimizer.step()

# --- third round: recurrent part clipped harder, all clipped after
for x, y in batches(8):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model[0].parameters(), 0.02)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- fourth round: zero_grad only between the passes over the data
for _ in range(2):
    optimizer.zero_grad()
    for x, y in batches(5):
        loss_of(x, y).backward()
        clip_grad_norm_(model.parameters(), 0.5)  # fault: zero-grad-missing
        optimizer.step()

# --- fourth round: zero_grad forgotten, no clip
for x, y in batches(5):
    loss_of(x, y).backward()
    optimizer.step()  # fault: zero-grad-missing


# --- fourth round: zero_grad forgotten in a closure
def closure():
    loss = loss_of(torch.randn(16, 6), torch.randint(3, (16,)))
    loss.backward()
    clip_grad_norm_(model.parameters(), 0.5)  # fault: zero-grad-missing
    return loss


for _ in range(6):
    optimizer.step(closure)

# --- fourth round: gradients zeroed through data, which moves no version counter
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for p in model.parameters():
        p.grad.data.zero_()

# --- fourth round: a running mean of gradients is kept on purpose
for x, y in batches(6):
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for p in model.parameters():
        p.grad.mul_(0.9)


# --- fourth round: clip in a hook and in the loop
def clip(*_):
    clip_grad_norm_(model.parameters(), 0.2)  # fault: clip-twice


optimizer.register_step_pre_hook(clip)
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- fourth round: two lines of the loop clip, and the second binds harder
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.3)
    clip_grad_norm_(model.parameters(), 0.2)  # fault: clip-twice
    optimizer.step()

# --- fourth round: each layer by itself, then all together, and values first
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_value_(model.parameters(), 0.01)
    clip_grad_norm_(model[0].parameters(), 0.1)
    clip_grad_norm_(model[2].parameters(), 0.1)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- fourth round: a tighter clip for long gradients only
for k, (x, y) in enumerate(batches(12)):
    optimizer.zero_grad()
    (loss_of(x, y) * (1 + 9 * (k % 3 == 0))).backward()
    norm = clip_grad_norm_(model.parameters(), 0.3)
    if norm > 2:
        clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- fourth round: largest entry, then norm
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 0.05, norm_type=math.inf)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- fourth round: a first clip that is a safety net and never acts
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grad_norm_(model.parameters(), 1e4)
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

# --- fourth round: total norm from before the backward pass
norm = torch.ones(())
for k, (x, y) in enumerate(batches(6)):
    if k:
        norm = get_total_norm([p.grad for p in model.parameters()])
    optimizer.zero_grad()
    loss_of(x, y).backward()
    clip_grads_with_norm_(model.parameters(), 0.1, norm)  # fault: clip-with-old-norm
    optimizer.step()

# --- fourth round: total norm of the first micro-batch
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    loss_of(y[:, None] + x, y).backward()
    clip_grads_with_norm_(model.parameters(), 0.1, norm)  # fault: clip-with-old-norm
    optimizer.step()

# --- fourth round: total norm of one layer for another
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model[0].parameters()])
    clip_grads_with_norm_(model[2].parameters(), 0.01, norm)  # fault: clip-with-old-norm
    clip_grad_norm_(model[0].parameters(), 0.1)
    optimizer.step()

# --- fourth round: total norm of all layers for each of them
for x, y in batches(6):
    optimizer.zero_grad()
    loss_of(x, y).backward()
    norm = get_total_norm([p.grad for p in model.parameters()])
    for layer in (model[0], model[2]):
        clip_grads_with_norm_(layer.parameters(), 0.1, norm)
    optimizer.step()

# --- fourth round: clip above backward while gradients accumulate
for _ in range(5):
    optimizer.zero_grad()
    for x, y in batches(3):
        loss = loss_of(x, y)
        clip_grad_norm_(model.parameters(), 0.1)  # fault: clip-per-micro-batch: after the last backward()
        loss.backward()
    optimizer.step()
