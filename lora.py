"""LoRA by hand (Hu et al. 2021, https://arxiv.org/abs/2106.09685):

    y = W x + (alpha / r) B A x, W frozen.

`add_lora(lm, ...)` puts one on every linear layer of a language model except the head, as the
reference implementation's `target_modules="all-linear"` does. `merge` and `unmerge` fold it into
the weights for generation and take it out again.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update.

    `lora_A` is (r, in), `lora_B` is (out, r). B starts at zero, so that the layer starts as the
    layer it wraps. Input and output as of `nn.Linear`: (..., in) -> (..., out).
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / r
        self.dropout = nn.Dropout(dropout)
        # float32 whatever the base holds: an update far below the base weights' bf16 step must not
        # be rounded away
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.original = None  # the base weight while LoRA is merged into it

    def forward(self, x):
        out = self.base(x)
        if self.original is not None:
            return out
        x = self.dropout(x).to(self.lora_A.dtype)
        low_rank = self.scaling * F.linear(x, self.lora_A)  # (..., r), scaled where it is small
        return out + F.linear(low_rank, self.lora_B).to(out.dtype)

    @torch.no_grad()
    def merge(self):
        if self.original is not None:
            return
        # kept rather than subtracted again later: unmerging restores the exact bytes
        self.original = self.base.weight.data
        merged = self.original + self.scaling * self.lora_B @ self.lora_A
        self.base.weight.data = merged.to(self.original.dtype)

    def unmerge(self):
        if self.original is not None:
            self.base.weight.data = self.original
            self.original = None


def as_linear(conv):
    """GPT-2's Conv1D, which is a linear layer with its weight transposed, as an `nn.Linear`."""
    weight = conv.weight  # (in, out)
    linear = nn.Linear(*weight.shape, device=weight.device, dtype=weight.dtype)
    linear.weight.data = weight.data.T.contiguous()
    linear.bias.data = conv.bias.data
    return linear


def replace_layers(lm, kind, replacement):
    """Puts `replacement(layer)` in the place of each layer of a kind but the head. Returns how many
    there were."""
    layers = []
    for parent in lm.modules():
        for name, child in parent.named_children():
            if isinstance(child, kind) and child is not lm.get_output_embeddings():
                layers.append((parent, name, child))
    for parent, name, child in layers:
        setattr(parent, name, replacement(child))
    return len(layers)


def add_lora(lm, r=8, alpha=16, dropout=0.05):
    """Freezes `lm` and wraps each of its linear layers but the head in place. Returns `lm`. Raises
    ValueError where it has none."""
    replace_layers(lm, Conv1D, as_linear)
    lm.requires_grad_(False)
    wrapped = replace_layers(lm, nn.Linear, lambda layer: LoRALinear(layer, r, alpha, dropout))
    if wrapped == 0:
        raise ValueError(f"its {lm.config.model_type} model has no linear layers for LoRA")
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
    return {name: tensor for name, tensor in lm.state_dict().items() if "lora_" in name}
