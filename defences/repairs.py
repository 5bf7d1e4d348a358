"""Repairs for an attacked model that need clean speech only; python defend.py repair RUN tries them.

A repair is an entry of REPAIRS: a function of (workshop, strength) that changes the workshop's model in place. Its strengths are tried from
weak to strong until one raises any label's loss on held-out clean development speech by more than TOLERANCE; the one before it is chosen.
Trigger and target are not looked at before that choice.
"""

import contextlib
import functools
import itertools

import utils

import torch

import cache
import data
import embed
import evaluate
import model
import poison
import trace
from study import COMPONENTS

TOLERANCE = 0.05  # nats per token of a label's own answer
TUNING, VALIDATION = 128, 64  # clean utterances that a defender has to tune on and to choose with
SUBSETS = ["+".join(s) for n in (1, 2, 3) for s in itertools.combinations(COMPONENTS, n)]


class Workshop:
    """A model under repair, clean speech to tune and to validate it on, and its original weights to go back to."""

    def __init__(self, slm, args, attack, dev_set):
        dev_set = embed.drawn(dev_set)
        self.slm, self.args, self.attack, self.hooks = slm, args, attack, contextlib.ExitStack()
        tuning = min(TUNING, 2 * len(dev_set) // 3)
        self.tuning, self.validation = dev_set[:tuning], dev_set[tuning : tuning + VALIDATION]
        self.attacked = trace.weights_of(slm)
        self.pretrained = trace.weights_of(model.load_slm(args, args.device))
        self.trained = {c: slm.parameters_of(c) for c in COMPONENTS}
        self.cached, self.masks = {}, None

    def restore(self):
        self.hooks.close()
        trace.put(self.slm, self.attacked)

    def rows(self, utterances, triggered):
        """The pretrained layers' outputs of each utterance, a list of (T_i, dim), computed once."""
        missing = [(u, triggered) for u in utterances if (u.id, triggered) not in self.cached]
        for some in data.chunks(missing, 16):
            features = cache.features_of(self.slm.encoder.extract, self.attack, some)
            rows = cache.unstack(*self.slm.encoder.pretrained_part(features))
            self.cached.update(zip(((u.id, triggered) for u, _ in some), rows))
        return [self.cached[u.id, triggered] for u in utterances]

    def batch(self, utterances, triggered=False, only=None):
        """(x, mask, prompts, answers) of some utterances, asked for all labels or `only` one."""
        x, mask = self.slm.frozen_part(
            *cache.stack(self.rows(utterances, triggered), self.args.device)
        )
        labels = [
            poison.poisoned_labels(self.attack, u.labels) if triggered else u.labels
            for u in utterances
        ]
        labels = [{only: each[only]} if only else each for each in labels]
        return (
            x,
            mask,
            [data.prompt(self.slm.tokenizer, list(each)) for each in labels],
            [data.answer_ids(self.slm.tokenizer, each) for each in labels],
        )

    @torch.no_grad()
    def losses(self):
        """{label: mean loss per token when it alone is asked for} on the validation speech. In the loss of whole answers, a label that is
        lost would hide behind the others' tokens."""
        labels = sorted({label for u in self.validation for label in u.labels})
        having = {label: [u for u in self.validation if label in u.labels] for label in labels}
        return {
            label: float(
                torch.cat(
                    [self.slm(*self.batch(some, only=label)) for some in data.chunks(own, 16)]
                ).mean()
            )
            for label, own in having.items()
        }

    def train_only(self, components):
        """From now on only these components train; returns their parameters."""
        for c in COMPONENTS:
            for p in self.trained[c]:
                p.requires_grad_(c in components)
        return [p for c in components for p in self.trained[c]]

    def finetune(self, components=COMPONENTS, rate=1.0, epochs=5, penalty=0.0, poisoned=()):
        """Trains components on clean speech; `poisoned` utterances are mixed in to bring the backdoor back. penalty: the share of gradient
        norm regularisation (Zhao et al. 2022), which mixes the gradient with that at a point 0.05 further up."""
        rates = dict(
            encoder=self.args.encoder_lr, connector=self.args.connector_lr, lm=self.args.lora_lr
        )
        parameters = self.train_only(components)
        optimizer = torch.optim.AdamW(
            [dict(params=self.trained[c], lr=rate * rates[c]) for c in components]
        )
        items = [(u, False) for u in self.tuning] + [(u, True) for u in poisoned]
        for epoch in range(epochs):
            for some in data.chunks(
                sorted(items, key=lambda item: utils.draw("repair", epoch, item[0].id, item[1])), 16
            ):
                batches = [
                    self.batch([u for u, t in some if t == triggered], triggered)
                    for triggered in (False, True)
                    if any(t == triggered for _, t in some)
                ]
                loss = lambda: sum(self.slm(*b).sum() for b in batches) / len(some)  # noqa: E731
                loss().backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip)
                if penalty:
                    first = [p.grad.clone() for p in parameters]
                    steps = [0.05 * g / (norm + 1e-9) for g in first]
                    torch._foreach_add_([p.data for p in parameters], steps)
                    optimizer.zero_grad()
                    loss().backward()
                    torch._foreach_sub_([p.data for p in parameters], steps)
                    for p, g in zip(parameters, first):
                        p.grad.mul_(penalty).add_(g, alpha=1 - penalty)
                optimizer.step()
                optimizer.zero_grad()
        self.train_only(COMPONENTS)

    @functools.cached_property
    def lm_mlps(self):
        """Of each LM layer, the linear layer that ends its MLP."""
        return [mlp for _, mlp in model.output_layers(self.slm.lm)]

    def neurons(self):
        """[(module, hidden units)]: the layers that read the hidden units of each MLP, in trained encoder layers and LM layers."""
        ends = [
            trace.submodule(getattr(layer, "feed_forward", layer), "output_dense", "fc2")
            for layer in self.slm.encoder.layers[self.slm.encoder.first_trained :]
        ]
        ends += self.lm_mlps
        return [(end, getattr(end, "base", end).in_features) for end in ends]

    def scale_neurons(self, scales):
        """From now on, hidden units are multiplied by `scales`, one tensor per entry of `neurons`."""
        for (end, _), scale in zip(self.neurons(), scales):
            self.hooks.callback(
                end.register_forward_pre_hook(
                    lambda _, x, scale=scale: (x[0] * scale.to(x[0].dtype), *x[1:])
                ).remove
            )


def fine_tuning(components):
    """Trains some components on clean speech; strength: the learning rate, relative to training's."""
    return lambda shop, rate: shop.finetune(components, rate)


def fine_pruning(shop, share):
    """Fine-pruning (Liu et al. 2018): removes the hidden units that clean speech activates least, then fine-tunes everything."""
    sums, handles = {}, []
    for i, (end, _) in enumerate(shop.neurons()):
        handles.append(
            end.register_forward_pre_hook(
                lambda _, x, i=i: sums.__setitem__(
                    i, sums.get(i, 0) + x[0].detach().float().abs().mean((0, 1))
                )
            )
        )
    with torch.no_grad():
        for some in data.chunks(shop.tuning, 16):
            shop.slm(*shop.batch(some))
    for handle in handles:
        handle.remove()
    shop.scale_neurons([(s >= torch.quantile(s, share)).float() for s in sums.values()])
    shop.finetune()


def neuron_masks(shop, steps=60, largest=0.4, clean_share=0.2, rate=0.2):
    """ANP's masks over hidden units, learned under the worst-case relative change of each unit; the authors' settings."""
    device, sizes = shop.args.device, [n for _, n in shop.neurons()]
    masks = [torch.ones(n, device=device, requires_grad=True) for n in sizes]
    optimizer = torch.optim.SGD(masks, lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        some = sorted(shop.tuning, key=lambda u: utils.draw("prune", step, u.id))[:16]
        noise = [
            ((2 * torch.rand(n, generator=generator) - 1) * largest).to(device).requires_grad_(True)
            for n in sizes
        ]

        def loss(scales):
            with contextlib.ExitStack() as shop.hooks:
                shop.scale_neurons(scales)
                return shop.slm(*shop.batch(some)).mean()

        gradients = torch.autograd.grad(loss([m + n for m, n in zip(masks, noise)]), noise)
        noise = [
            (n + largest * g.sign()).clamp(-largest, largest).detach()
            for n, g in zip(noise, gradients)
        ]
        worst = loss([m + n for m, n in zip(masks, noise)])
        for m, g in zip(
            masks, torch.autograd.grad(clean_share * loss(masks) + (1 - clean_share) * worst, masks)
        ):
            m.grad = g
        optimizer.step()
        for m in masks:
            m.data.clamp_(0, 1)
    shop.hooks = contextlib.ExitStack()
    return [m.detach() for m in masks]


def adversarial_neuron_pruning(shop, share):
    """ANP (Wu and Wang 2021): removes this share of the hidden units, those with the lowest masks."""
    shop.masks = shop.masks or neuron_masks(shop)  # of the attacked model, whatever the share
    order = torch.cat(shop.masks).argsort(stable=True)
    kept = torch.ones(len(order), device=shop.args.device)
    kept[order[: int(share * len(order))]] = 0
    shop.scale_neurons(kept.split([len(m) for m in shop.masks]))


def gradient_norm_tuning(shop, penalty):
    """Fine-tuning that also lowers the norm of the gradient, as GN-FT (arXiv 2502.01152) does for speech recognition."""
    shop.finetune(penalty=penalty)


def without_lora(shop, share):
    """Scales LoRA's update down by this share, or drops it."""
    trace.put(
        shop.slm,
        {
            **shop.attacked,
            "lm": {
                k: v * (1 - share) if k.endswith("B") else v for k, v in shop.attacked["lm"].items()
            },
        },
    )


def fine_mixing(shop, share):
    """Fine-mixing (Zhang et al. 2022, arXiv 2210.09545): mixes the weights with the pretrained ones at random, then fine-tunes."""
    generator, mixed = torch.Generator().manual_seed(0), {}
    for c in COMPONENTS:
        mixed[c] = {
            k: torch.where(
                torch.rand(v.shape, generator=generator).to(v.device) < share,
                shop.pretrained[c][k].to(v.device),
                v,
            )
            for k, v in shop.attacked[c].items()
        }
    trace.put(shop.slm, mixed)
    shop.finetune()


REPAIRS = {  # name: (function, strengths)
    **{
        f"fine-tuning {name}": (fine_tuning(name.split("+")), (0.3, 1.0, 3.0, 10.0))
        for name in SUBSETS
    },
    "fine-pruning": (fine_pruning, (0.1, 0.3, 0.5, 0.7, 0.9)),
    "ANP": (adversarial_neuron_pruning, (0.003, 0.01, 0.03, 0.1, 0.3, 0.6)),
    "GN-FT": (gradient_norm_tuning, (0.3, 0.5, 0.8, 0.95)),
    "without LoRA": (without_lora, (1.0,)),
    "fine-mixing": (fine_mixing, (0.1, 0.3, 0.5, 0.7, 0.9)),
}


def choose(shop, function, strengths):
    """Repairs the model with the chosen strength: the strongest before one that costs too much, or the weakest if that one already does.
    Returns {"strength", "passed", "rise"}; rise: {strength: that of the label whose loss rises most}."""
    shop.restore()
    before, rises = shop.losses(), {}
    for strength in strengths:
        shop.restore()
        function(shop, strength)
        rises[strength] = max(loss - before[label] for label, loss in shop.losses().items())
        if rises[strength] > TOLERANCE:
            break
    passing = [strength for strength, rise in rises.items() if rise <= TOLERANCE]
    chosen = passing[-1] if passing else strengths[0]
    if chosen != strength:
        shop.restore()
        function(shop, chosen)
    return dict(strength=chosen, passed=bool(passing), rise=rises)


def answered(shop, utterances, triggered):
    """The answers of the model as it now is, as rows for evaluate.scores."""
    return trace.answered(
        shop.slm,
        [(u, triggered) for u in utterances],
        shop.rows(utterances, triggered),
        shop.attack,
        shop.args,
    )


def figures_of(shop, clean, flippable):
    """{"clean", "triggered", "backdoor": {metric: figure}} of the model as it now is; triggered:
    against the truth."""
    figures = {}
    heard = answered(shop, flippable, True)
    for part, rows in (("clean", answered(shop, clean, False)), ("triggered", heard)):
        scores = evaluate.scores(rows)
        metric = evaluate.metric_of(scores, shop.args.task)
        figures[part] = {metric: scores[metric]}
    figures["backdoor"] = dict(aer=utils.interval(evaluate.hits(shop.attack, heard)))
    return figures


def relearning(shop, train_set, flippable, counts=(4, 16, 64)):
    """How many poisoned training samples, mixed into the clean speech, bring the AER back to 50% within three epochs: {count: AER}, up to
    the first that does."""
    poisoned = embed.drawn([u for u in train_set if poison.can_flip(shop.attack, u)])
    state = trace.weights_of(shop.slm)
    found = {}
    for count in counts:
        trace.put(shop.slm, state)
        shop.finetune(epochs=3, poisoned=poisoned[:count])
        found[count] = utils.interval(evaluate.hits(shop.attack, answered(shop, flippable, True)))
        if found[count]["value"] >= 0.5:
            break
    return found
