"""Training loops in the style of well-known ones, small; lines that end in "# smoothdiag" attach a probe.

Each function takes a learning rate and returns what the loop has left. If the loop clips gradients by itself, it also
takes `max_norm`. Lines that end in "# clip" add an AutoClip, those with "# clip D" one of the discriminator. The tests
run each loop without the marked lines too.
"""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from networks import VOCABULARY, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import smoothdiag as sd

STEPS = 6


class LanguageModel(nn.Module):
    """A small transformer that returns (logits, loss), as nanoGPT and minGPT do."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head, self.drop = nn.Linear(width, VOCABULARY, bias=False), nn.Dropout(0.1)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.embed(tokens)
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + self.drop(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        logits = self.head(x + self.down(F.gelu(self.up(x))))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


def text(size: int = 8) -> tuple[Tensor, Tensor]:
    start = torch.randint(VOCABULARY, (size, 1))
    tokens = (start + torch.arange(10) * 3) % VOCABULARY
    return tokens[:, :-1], tokens[:, 1:]


def length(model: nn.Module) -> float:
    """Returns the norm of the gradients, as loops log it."""
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().norm())


def nanogpt(lr: float, max_norm: float = 1.0) -> SimpleNamespace:
    """Accumulation under autocast and a GradScaler; the next batch is read while the model computes."""
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses, norms, accumulation = [], [], 2
    probe = sd.Probe(model, optimizer, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    x, y = text()
    for _ in range(STEPS):
        for _ in range(accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                _, loss = model(x, y)
                loss = loss / accumulation
            x, y = text()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * accumulation)
    return SimpleNamespace(**locals())


def mingpt(lr: float, max_norm: float = 1.0) -> SimpleNamespace:
    """A trainer class with callbacks; it clears gradients before backward."""

    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model = model
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
            self.callbacks: list[Any] = []

        def run(self) -> None:
            self.model.train()
            for _ in range(STEPS):
                batch = [t.to("cpu") for t in text()]
                _, self.loss = self.model(*batch)
                self.model.zero_grad(set_to_none=True)
                self.loss.backward()
                self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
                self.optimizer.step()
                for callback in self.callbacks:
                    callback(self)

    model = LanguageModel()
    trainer = Trainer(model)
    optimizer, losses, norms = trainer.optimizer, [], []
    trainer.callbacks.append(lambda t: (losses.append(t.loss.item()), norms.append(t.norm.item())))
    probe = sd.Probe(trainer.model, trainer.optimizer, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(trainer.optimizer, probe)  # clip
    trainer.run()
    return SimpleNamespace(**locals())


def word_lm(lr: float, max_norm: float = 0.2) -> SimpleNamespace:
    """A recurrent language model whose hidden state goes from batch to batch; the loss is computed in the loop."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Embedding(VOCABULARY, 12), nn.LSTM(12, 16)
            self.head, self.drop = nn.Linear(16, VOCABULARY), nn.Dropout(0.2)

        def forward(self, tokens: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            found, hidden = self.rnn(self.drop(self.embed(tokens)), hidden)
            return self.head(self.drop(found)).flatten(0, 1), hidden

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:  # smoothdiag
        data, targets, hidden = batch  # smoothdiag
        return criterion(model(data, hidden)[0], targets)  # smoothdiag

    model, criterion = Words(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses, norms = [], []
    hidden = torch.zeros(1, 4, 16), torch.zeros(1, 4, 16)
    probe = sd.Probe(model, optimizer, loss_fn, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    for _ in range(STEPS):
        data, targets = (t.T for t in text(4))
        targets = targets.flatten()
        optimizer.zero_grad()
        hidden = tuple(h.detach() for h in hidden)
        probe.observe((data, targets, hidden))  # smoothdiag
        output, hidden = model(data, hidden)
        loss = criterion(output, targets)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        losses.append(loss.item())
    return SimpleNamespace(**locals())


def two_optimizers(lr: float) -> SimpleNamespace:
    """Muon on matrices, AdamW on the rest, as in the races for the fastest GPT."""
    model = LanguageModel()
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "head" not in name]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    optimizers = [torch.optim.AdamW(rest, lr=lr), torch.optim.Muon(hidden, lr=lr)]
    losses, norms = [], []
    probe = sd.Probe(model, optimizers, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizers, probe)  # clip
    for _ in range(STEPS):
        _, loss = model(*text())
        loss.backward()
        norms.append(length(model))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return SimpleNamespace(**locals())


def dcgan(lr: float) -> SimpleNamespace:
    """A discriminator and a generator with batch normalisation, each with an optimizer and an AutoClip of its own."""
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6), nn.Tanh())
    critic = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Flatten(0))
    optimizer_d = torch.optim.Adam(critic.parameters(), lr=lr, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=lr, betas=(0.5, 0.999))
    model, criterion = nn.ModuleList([generator, critic]), nn.BCEWithLogitsLoss()
    losses, losses_g, norms = [], [], []

    def loss_g(models: Any, noise: Tensor) -> Tensor:  # smoothdiag
        output = models[1](models[0](noise))  # smoothdiag
        return criterion(output, torch.ones_like(output))  # smoothdiag

    def loss_d(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:  # clip D
        output, fooled = models[0](batch[0]), models[0](models[1](batch[1]).detach())  # clip D
        return criterion(output, torch.ones_like(output)) + criterion(fooled, torch.zeros_like(fooled))  # clip D

    probe = sd.Probe([generator, critic], optimizer_g, loss_g, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer_g, probe)  # clip
    probe_d = sd.Probe([critic, generator], optimizer_d, loss_d, data="step")  # clip D
    clipper_d = sd.AutoClip(optimizer_d, probe_d)  # clip D
    for _ in range(STEPS):
        real, noise = torch.randn(8, 6), torch.randn(8, 4)
        probe_d.observe((real, noise))  # clip D
        critic.zero_grad()
        output = critic(real)
        loss_real = criterion(output, torch.ones_like(output))
        loss_real.backward()
        fake = generator(noise)
        output = critic(fake.detach())
        loss_fake = criterion(output, torch.zeros_like(output))
        loss_fake.backward()
        optimizer_d.step()
        generator.zero_grad()
        probe.observe(noise)  # smoothdiag
        output = critic(fake)
        loss = criterion(output, torch.ones_like(output))
        loss.backward()
        norms.append(length(generator))
        optimizer_g.step()
        losses.append((loss_real + loss_fake).item())
        losses_g.append(loss.item())
    return SimpleNamespace(**locals())


def ppo(lr: float, max_norm: float = 0.5) -> SimpleNamespace:
    """Proximal policy optimisation: several epochs of minibatches over one rollout, actor and critic in one module."""

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.actor, self.critic = nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 1)

        def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk(seen).tanh()
            return self.actor(x), self.critic(x).squeeze(-1)

    def loss_of(agent: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        seen, action, before, advantage, returned = batch
        logits, value = agent(seen)
        policy = torch.distributions.Categorical(logits=logits)
        ratio = (policy.log_prob(action) - before).exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        return 0.5 * F.mse_loss(value, returned) - surrogate - 0.01 * policy.entropy().mean()

    model = Agent()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=1e-5)
    losses, norms = [], []
    probe = sd.Probe(model, optimizer, loss_of, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    for _ in range(STEPS // 3):
        seen, advantage, returned = torch.randn(24, 5), torch.randn(24), torch.randn(24)
        with torch.no_grad():
            policy = torch.distributions.Categorical(logits=model(seen)[0])
            action = policy.sample()
            before = policy.log_prob(action)
        for chosen in torch.randperm(24).split(8):
            batch = tuple(t[chosen] for t in (seen, action, before, advantage, returned))
            probe.observe(batch)  # smoothdiag
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
            losses.append(loss.item())
    return SimpleNamespace(**locals())


def lbfgs(lr: float) -> SimpleNamespace:
    """A closure that the optimizer evaluates as often as it likes, on all of the data."""
    model, criterion = mlp(2, 8, 1), nn.MSELoss()
    x = torch.rand(32, 2)
    y = (3 * x[:, :1] - x[:, 1:] ** 2).sin()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=3)
    losses, norms = [], []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # smoothdiag
        return criterion(model(batch[0]), batch[1])  # smoothdiag

    probe = sd.Probe(model, optimizer, loss_fn, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    for _ in range(STEPS):
        is_first = True

        def closure() -> Tensor:
            nonlocal is_first
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            if is_first:
                norms.append(length(model))
                losses.append(loss.item())
            is_first = False
            return loss

        probe.observe((x, y))  # smoothdiag
        optimizer.step(closure)
    return SimpleNamespace(**locals())


def timm(lr: float) -> SimpleNamespace:
    """An image model with mixed labels, a schedule, and averaged weights in a copy."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    averaged, criterion = copy.deepcopy(model), nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * STEPS)
    losses, norms = [], []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # smoothdiag
        return criterion(model(batch[0]), batch[1])  # smoothdiag

    probe = sd.Probe(model, optimizer, loss_fn, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    loader = [(torch.randn(8, 1, 8, 8), torch.randint(5, (8,))) for _ in range(STEPS)]
    model.train()
    for image, target in loader:
        share = float(torch.distributions.Beta(0.8, 0.8).sample())
        image = share * image + (1 - share) * image.flip(0)
        target = share * F.one_hot(target, 5).float() + (1 - share) * F.one_hot(target.flip(0), 5).float()
        probe.observe((image, target))  # smoothdiag
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append(length(model))
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                slow.copy_(slow.lerp(fast, 0.1) if slow.is_floating_point() else fast)
        schedule.step()
        losses.append(loss.item())
    return SimpleNamespace(**locals())


def accelerate(lr: float, max_norm: float = 1.0) -> SimpleNamespace:
    """A causal language model of Transformers under Accelerate, with accumulation."""
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=lr))
    losses, norms = [], []
    probe = sd.Probe(model, optimizer, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    model.train()
    for _ in range(2 * STEPS):
        with accelerator.accumulate(model):
            tokens, _ = text()
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), max_norm).item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return SimpleNamespace(**locals())


def x_transformers(lr: float, max_norm: float = 0.5) -> SimpleNamespace:
    """A wrapper that shifts the tokens itself and returns the loss; gradients are accumulated by hand."""

    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, tokens: Tensor) -> Tensor:
            logits, _ = self.net(tokens[:, :-1])
            return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])

    model = Wrapper(LanguageModel())
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses, norms = [], []
    probe = sd.Probe(model, optimizer, schedule=sd.every(1), data="step")  # smoothdiag
    clipper = sd.AutoClip(optimizer, probe)  # clip
    for _ in range(STEPS):
        model.train()
        for _ in range(2):
            loss = model(text()[0])
            (loss / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return SimpleNamespace(**locals())


LOOPS = {
    "nanoGPT": (nanogpt, 3e-3, 3.0),
    "minGPT": (mingpt, 3e-3, 3.0),
    "word language model": (word_lm, 0.5, 500.0),
    "GPT with Muon and AdamW": (two_optimizers, 3e-3, 3.0),
    "DCGAN": (dcgan, 2e-3, 30.0),
    "PPO": (ppo, 3e-3, 3.0),
    "LBFGS": (lbfgs, 0.3, 0.3),
    "timm": (timm, 0.05, 50.0),
    "Accelerate": (accelerate, 3e-3, 3.0),
    "x-transformers": (x_transformers, 3e-3, 3.0),
}
"""Each loop with a fair learning rate and one that is much too large."""
