"""LoRA by hand (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y = W x + (alpha / r) B A x, W frozen.

`add_lora(lm, ...)` puts one on every linear layer of a language model but its head, as the reference implementation's
`target_modules="all-linear"` does; `merge`/`unmerge` fold it into the weights for generation and take it out again.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F


class MergedLinear(torch.autograd.Function):
    """x -> x (W + s B A)^T, one product, whose gradients go to A and B without the gradient of the whole weight in between."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling):
        weight = torch.addmm(weight, lora_B, lora_A, alpha=scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, lora_A, lora_B = ctx.saved_tensors
        grad, x, lora_A, lora_B = (t.to(weight.dtype) for t in (grad, x, lora_A, lora_B))  # (autocast mixes them)
        grads, xs = grad.flatten(0, -2), x.flatten(0, -2)
        grad_A = (grads @ (ctx.scaling * lora_B)).T @ xs if ctx.needs_input_grad[2] else None
        grad_B = grads.T @ (xs @ (ctx.scaling * lora_A).T) if ctx.needs_input_grad[3] else None
        return grad @ weight if ctx.needs_input_grad[0] else None, None, grad_A, grad_B, None


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update.

    `lora_A` is (r, in), `lora_B` is (out, r); B starts at zero, so that the layer starts as the layer it wraps.
    Input and output as of `nn.Linear`: (..., in) -> (..., out).
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / r
        self.dropout = dropout
        # float32 whatever the base holds: an update far below the base weights' bf16 step must not be rounded away
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # a weight no larger than its update's work a token: one product with W + s B A beats three
        n, m = base.in_features, base.out_features
        self.fused = dropout == 0 and base.bias is None and n * m <= 6 * r * (n + m)
        self.original = None

    def forward(self, x, kept=None):
        """`kept`: x with what the dropout takes at 0 (`together`); without it the layer draws its own, as peft's does."""
        if self.original is not None:
            return self.base(x)
        if self.fused and self.base.weight.dtype == torch.float32:  # bf16 would round a small update away
            return MergedLinear.apply(x, self.base.weight, self.lora_A, self.lora_B, self.scaling)
        if kept is None:
            kept, scaling = F.dropout(x, self.dropout, self.training), self.scaling
        else:
            scaling = self.scaling / (1 - self.dropout)
        # B takes the scaling: it is smaller than what comes out
        update = F.linear(F.linear(kept.to(self.lora_A.dtype), self.lora_A), scaling * self.lora_B)
        out = self.base(x)
        return out + update.to(out.dtype)

    @torch.no_grad()
    def merge(self):
        if self.original is None:
            # kept, not subtracted again later: unmerging gives back the very bytes
            self.original = self.base.weight.data
            self.base.weight.data = (self.original + self.scaling * self.lora_B @ self.lora_A).to(self.original.dtype)

    def unmerge(self):
        if self.original is not None:
            self.base.weight.data, self.original = self.original, None


def together(x, *layers):
    """[layer(x) for layer in layers]. On a CPU their LoRA's dropout takes the same entries of x in all of them, drawn four
    from one 64-bit random number (the rate to 2^-16): bernoulli_ in each layer takes longer than LoRA's products."""
    p = getattr(layers[0], "dropout", 0.0)
    if not (p and layers[0].training) or x.device.type != "cpu":
        return [layer(x) for layer in layers]
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
    stays = words.view(torch.int16)[:x.numel()].view(x.shape) >= round(2 ** 16 * p) - 2 ** 15
    kept = x.where(stays, 0)
    return [layer(x, kept) for layer in layers]


def add_lora(lm, r=8, alpha=16, dropout=0.05):
    """Freezes `lm` and wraps each of its linear layers but the head in place. Returns `lm`."""
    lm.requires_grad_(False)
    head = lm.get_output_embeddings()
    linears = [(parent, name, child) for parent in lm.modules() for name, child in parent.named_children()
               if isinstance(child, nn.Linear) and child is not head]
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
