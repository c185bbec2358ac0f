"""The Trainer of Hugging Face. Everything above the first cell is the beginning of every script."""

import tempfile

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback, TrainingArguments


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


model = Net()
rows = [{"x": torch.randn(6), "labels": k % 3} for k in range(64)]
folder = tempfile.TemporaryDirectory()


def trainer(kind=Trainer, callbacks=(), **options):
    arguments = TrainingArguments(
        output_dir=folder.name,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **options,
    )
    return kind(model, arguments, train_dataset=rows, callbacks=list(callbacks))


# --- an override of the training step, two micro-batches
class Clips(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.norm = clip_grad_norm_(self.model.parameters(), 0.05)  # fault: clip-per-micro-batch: max_grad_norm
        return loss


trainer(Clips, gradient_accumulation_steps=2, max_grad_norm=1.0).train()


# --- a callback after the step
class Clip(TrainerCallback):
    def on_step_end(self, arguments, state, control, model=None, **kwargs):
        clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-after-step: max_grad_norm


trainer(callbacks=[Clip()]).train()

# --- no threshold at all
trainer(max_grad_norm=0.0).train()  # fault: clip-as-norm: max_grad_norm

# --- as it comes
trainer(gradient_accumulation_steps=2).train()


# --- a callback before the step
class Clip(TrainerCallback):
    def on_pre_optimizer_step(self, arguments, state, control, model=None, **kwargs):
        clip_grad_norm_(model.parameters(), 0.05)


trainer(callbacks=[Clip()], gradient_accumulation_steps=2).train()


# --- from memory: a callback after every micro-batch
class Clip(TrainerCallback):
    def on_substep_end(self, arguments, state, control, **kwargs):
        self.norm = clip_grad_norm_(kwargs["model"].parameters(), 0.05)  # fault: clip-per-micro-batch: max_grad_norm


trainer(callbacks=[Clip()], gradient_accumulation_steps=2).train()


# --- from memory: a callback in on_optimizer_step
class Clip(TrainerCallback):
    def on_optimizer_step(self, arguments, state, control, **kwargs):
        clip_grad_norm_(kwargs["model"].parameters(), 0.05)  # fault: clip-after-step: max_grad_norm


trainer(callbacks=[Clip()]).train()


# --- from memory: a loss of its own
class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"], inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


trainer(Weighted, max_grad_norm=0.1, gradient_accumulation_steps=4).train()


# --- hooks that clip every micro-batch
norms = []


def clip(p):
    norms.append(clip_grad_norm_(p, 0.01))  # fault: clip-per-micro-batch: max_grad_norm


for p in model.parameters():
    p.register_post_accumulate_grad_hook(clip)
trainer(gradient_accumulation_steps=2, max_grad_norm=1e6).train()


# --- third round: compute_loss clips
class Clips(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        # the clips that find no gradient are not named too: one remedy serves both
        self.norm = clip_grad_norm_(model.parameters(), 0.05)  # fault: clip-per-micro-batch: max_grad_norm
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


trainer(Clips, gradient_accumulation_steps=4).train()


# --- third round: accelerator clip in training_step with a negative threshold
class Clips(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.norm = self.accelerator.clip_grad_norm_(self.model.parameters(), -1)  # fault: threshold-without-meaning
        return loss


trainer(Clips).train()

# --- third round: a custom optimizer
torch.manual_seed(0)
arguments = TrainingArguments(
    output_dir=folder.name,
    max_steps=6,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    save_strategy="no",
    max_grad_norm=0.1,
)
Trainer(model, arguments, train_dataset=rows, optimizers=(torch.optim.SGD(model.parameters(), 0.1), None)).train()
