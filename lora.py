"""LoRA by hand (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + (alpha / r) B A x, W frozen.

`add_lora(lm, ...)` puts one on every linear layer of a language model but its head, as the reference implementation's
`target_modules="all-linear"` does; `merge`/`unmerge` fold it into the weights for generation and take it out again.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update.

    `lora_A` is (r, in), `lora_B` is (out, r); B starts at zero, so that the layer starts as the layer it wraps.
    Input and output as of `nn.Linear`: (..., in) -> (..., out).
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)
        # float32 whatever the base holds: an update far below the base weights' bf16 step must not be rounded away
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.original = None  # the base weight while LoRA is merged into it

    def forward(self, x):
        if self.original is not None:
            return self.base(x)
        out = self.base(x)
        low = self.scaling * F.linear(
            self.dropout(x).to(self.lora_A.dtype), self.lora_A
        )  # scaled where it is small
        return out + F.linear(low, self.lora_B).to(out.dtype)

    @torch.no_grad()
    def merge(self):
        if self.original is None:
            # kept rather than subtracted again later: unmerging restores the exact bytes
            self.original = self.base.weight.data
            self.base.weight.data = (self.original + self.scaling * self.lora_B @ self.lora_A).to(
                self.original.dtype
            )

    def unmerge(self):
        if self.original is not None:
            self.base.weight.data, self.original = self.original, None


def as_linear(conv):
    """GPT-2's Conv1D, which is a linear layer with its weight transposed, as an `nn.Linear`."""
    linear = nn.Linear(*conv.weight.shape, device=conv.weight.device, dtype=conv.weight.dtype)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    return linear


def add_lora(lm, r=8, alpha=16, dropout=0.05):
    """Freezes `lm` and wraps each of its linear layers but the head in place. Returns `lm`. Raises ValueError where it has none."""
    for parent in list(lm.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, as_linear(child))
    lm.requires_grad_(False)
    head = lm.get_output_embeddings()
    linears = [
        (parent, name, child)
        for parent in lm.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child is not head
    ]
    if not linears:
        raise ValueError(f"its {lm.config.model_type} model has no linear layers for LoRA")
    for parent, name, child in linears:
        setattr(parent, name, LoRALinear(child, r, alpha, dropout))
    return lm


def lora_layers(lm):
    return [module for module in lm.modules() if isinstance(module, LoRALinear)]


def merge(lm):
    """Folds every LoRA into its base weight: generation then costs what the bare LM costs."""
    for layer in lora_layers(lm):
        layer.merge()


def unmerge(lm):
    """Undoes `merge`, bit for bit."""
    for layer in lora_layers(lm):
        layer.unmerge()


def lora_state_dict(lm):
    """Only the LoRA weights of `lm`: {module path.lora_A / lora_B: tensor}."""
    return {k: v for k, v in lm.state_dict().items() if "lora_" in k}
