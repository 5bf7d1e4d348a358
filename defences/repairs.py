"""Repairs for an attacked model that need clean speech only, for python defend.py repair.

A repair is an entry of REPAIRS: a function of (defender, strength) that changes the defender's
model in place, and its strengths, one or more ladders of them. Each ladder is tried from weak to
strong until a strength raises the loss of any label on held-out clean development speech by more
than TOLERANCE; of those before it, the strongest is chosen. Neither the trigger nor the target is
looked at before that choice.

The clean speech that a defender has, TOLERANCE and the budget of fine-tuning are the same for all
repairs, though their authors have each their own. What else differs from a publication stands in
each repair's docstring.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import utils

import numpy as np
import torch
from tqdm import tqdm

import cache
import data
import evaluate
import model
import poison
from study import COMPONENTS

TOLERANCE = 0.05  # nats per token of a label's own answer
TUNING = 128  # clean utterances that a defender has to tune on
VALIDATION = 64  # clean utterances that a defender has to choose with
BATCH = 16
EPOCHS = 5  # of fine-tuning, where a strength says nothing else
RELEARNED_BY = (4, 16, 64)  # so many poisoned samples
RELEARNING = 3  # epochs
ANP_STEPS = 60  # the authors': 2,000


@dataclasses.dataclass
class Repaired:
    """A model after a repair: its weights, as model.copy_weights has them, and the scales of its
    hidden units, see Defender.scale_hidden_units."""

    weights: dict
    scales: list | None = None


@dataclasses.dataclass
class Defender:
    """An attacked model under repair and what its defender has: a little clean speech to tune and
    to validate the model on, and the pretrained weights. Weights are those of model.copy_weights.

    attack is for relearning and for the figures at the end; a repair does not look at it.
    """

    slm: model.SLM
    args: SimpleNamespace
    attack: poison.Attack
    tuning: list
    validation: list
    attacked: dict
    pretrained: dict

    def __post_init__(self):
        self.trainable = {c: self.slm.parameters_of(c) for c in COMPONENTS}
        self.pruned = contextlib.ExitStack()  # hooks that scale hidden units, until `restore`
        self.scales = None  # by how much they do
        self.anp_masks = None  # of the attacked model, which all strengths of ANP share
        self.cached = {}  # {(utterance id, triggered): the pretrained layers' output (T, dim)}
        self.progress = tqdm(disable=True)  # counts steps of training

    def restore(self):
        """Makes the model the attacked one again."""
        self.go_back_to(Repaired(self.attacked))

    def as_it_is(self):
        """The model as it is now, to go back to."""
        return Repaired(model.copy_weights(self.slm), self.scales)

    def go_back_to(self, repaired):
        """Makes the model one that it has been before."""
        self.pruned.close()
        self.scales = None
        model.set_weights(self.slm, repaired.weights)
        if repaired.scales is not None:
            self.scale_hidden_units(repaired.scales)

    def pretrained_outputs(self, utterances, triggered):
        """The pretrained layers' output of each utterance, a list of (T_i, dim), computed once."""
        missing = [(u, triggered) for u in utterances if (u.id, triggered) not in self.cached]
        for batch in data.chunks(missing, BATCH):
            features = cache.features_of(self.slm.encoder.extract, self.attack, batch)
            x, mask = self.slm.encoder.pretrained_part(features)
            for (utterance, _), row in zip(batch, cache.unstack(x, mask)):
                self.cached[utterance.id, triggered] = row
        return [self.cached[u.id, triggered] for u in utterances]

    def loss(self, utterances, triggered=False, label=None):
        """The model's loss (B,), nats per token of the answer. Triggered utterances have the
        poisoned answer. With `label`, that one label is asked for instead of all."""
        prompts = []
        answers = []
        for utterance in utterances:
            labels = utterance.labels
            if triggered:
                labels = poison.poisoned_labels(self.attack, labels)
            if label:
                labels = {label: labels[label]}
            prompts.append(data.prompt(self.slm.tokenizer, list(labels)))
            answers.append(data.answer_ids(self.slm.tokenizer, labels))
        rows = self.pretrained_outputs(utterances, triggered)
        x, mask = cache.stack(rows, self.args.device)
        x, mask = self.slm.frozen_part(x, mask)
        return self.slm(x, mask, prompts, answers)

    @torch.no_grad()
    def validation_losses(self):
        """{label: mean loss when it alone is asked for} on the validation speech. In the loss of
        whole answers, a label that is lost would hide behind the other labels' tokens."""
        losses = {}
        labels = set().union(*(u.labels for u in self.validation))
        for label in sorted(labels):
            with_label = [u for u in self.validation if label in u.labels]
            batches = [self.loss(b, label=label) for b in data.chunks(with_label, BATCH)]
            losses[label] = float(torch.cat(batches).mean())
        return losses

    @contextlib.contextmanager
    def training_only(self, components):
        """A context in which only these components train. Yields their parameters."""
        for component, parameters in self.trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(component in components)
        yield list(itertools.chain(*(self.trainable[component] for component in components)))
        for parameters in self.trainable.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def finetune(self, components=COMPONENTS, rate=1.0, epochs=EPOCHS, penalty=0.0, poisoned=()):
        """Trains components on the clean tuning speech.

        rate: the learning rate relative to training's. penalty: the share of gradient norm
        regularisation. poisoned: utterances that are mixed in, triggered and with the target, to
        bring the backdoor back.
        """
        learning_rates = dict(
            encoder=self.args.encoder_lr, connector=self.args.connector_lr, lm=self.args.lora_lr
        )
        items = [(u, False) for u in self.tuning] + [(u, True) for u in poisoned]
        with self.training_only(components) as parameters:
            groups = []
            for component in components:
                lr = rate * learning_rates[component]
                groups.append(dict(params=self.trainable[component], lr=lr))
            optimizer = torch.optim.AdamW(groups)
            for epoch in range(epochs):
                order = sorted(items, key=functools.partial(position_in_epoch, epoch))
                for batch in data.chunks(order, BATCH):
                    self.mixed_loss(batch).backward()
                    norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip)
                    if penalty:
                        self.regularise_gradient_norm(batch, parameters, norm, penalty)
                    optimizer.step()
                    optimizer.zero_grad()
                    self.progress.update()

    def mixed_loss(self, items):
        """The mean loss of (utterance, triggered) items."""
        total = 0
        for triggered in (False, True):
            utterances = [u for u, with_trigger in items if with_trigger == triggered]
            if utterances:
                total = total + self.loss(utterances, triggered).sum()
        return total / len(items)

    def regularise_gradient_norm(self, items, parameters, norm, penalty, radius=0.05):
        """Penalises the gradient's norm (Zhao et al. 2022, arXiv 2202.03599): mixes the gradient g
        with that at a point `radius` further up, w + radius * g / |g|."""
        gradients = [p.grad.clone() for p in parameters]
        steps = [radius * g / (norm + 1e-9) for g in gradients]
        weights = [p.data for p in parameters]
        torch._foreach_add_(weights, steps)
        for parameter in parameters:
            parameter.grad = None
        self.mixed_loss(items).backward()
        torch._foreach_sub_(weights, steps)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad.mul_(penalty).add_(gradient, alpha=1 - penalty)

    @functools.cached_property
    def mlp_outputs(self):
        """The linear layer that reads the hidden units of each MLP, in the encoder's trained layers
        and in all of the LM's."""
        layers = []
        for layer in self.slm.encoder.layers[self.slm.encoder.first_trained :]:
            mlp = model.encoder_mlp(layer)
            layers.append(getattr(mlp, "output_dense", mlp))
        layers += [mlp for _, mlp in model.output_layers(self.slm.lm)]
        return layers

    @property
    def hidden_sizes(self):
        """How many hidden units each of `mlp_outputs` reads."""
        return [getattr(layer, "base", layer).in_features for layer in self.mlp_outputs]

    def scale_hidden_units(self, scales):
        """From now on, until `restore`, hidden units are multiplied by `scales`, one tensor for
        each of `mlp_outputs`."""
        self.scales = scales
        self.pruned.enter_context(scaled_inputs(self.mlp_outputs, scales))

    def answer_rows(self, utterances, triggered):
        """The answers of the model as it is now, as rows for evaluate.scores."""
        items = [(u, triggered) for u in utterances]
        outputs = self.pretrained_outputs(utterances, triggered)
        return evaluate.answer_rows(self.slm, self.attack, items, outputs, self.args.batch_seconds)


def make_defender(slm, args, attack, dev_set, other_speech=()):
    """The defender of a run's model, who has some of its clean development speech, or clean speech
    of another corpus to tune on."""
    drawn = data.in_drawn_order(dev_set)
    n = min(TUNING, 2 * len(drawn) // 3)
    tuning = data.in_drawn_order(other_speech)[:TUNING] or drawn[:n]
    validation = drawn[n : n + VALIDATION]
    attacked = model.copy_weights(slm)
    pretrained = model.copy_weights(model.load_slm(args, args.device))
    return Defender(slm, args, attack, tuning, validation, attacked, pretrained)


def position_in_epoch(epoch, item):
    """A sort key that shuffles (utterance, triggered) items anew in each epoch."""
    utterance, triggered = item
    return utils.draw("repair", epoch, utterance.id, triggered)


@contextlib.contextmanager
def input_hooks(layers, hook):
    """A context in which `hook(index of the layer, its input)` runs before each of these layers.
    What it returns, unless None, is the layer's input."""
    with contextlib.ExitStack() as handles:
        for i, layer in enumerate(layers):
            run = functools.partial(call_with_input, hook, i)
            handles.callback(layer.register_forward_pre_hook(run).remove)
        yield


def call_with_input(hook, i, module, inputs):
    x = hook(i, inputs[0])
    return None if x is None else (x, *inputs[1:])


def scaled_inputs(layers, scales):
    """A context in which the inputs (..., n) of each layer are multiplied by its scales (n,)."""

    def scale(i, x):
        return x * scales[i].to(x.dtype)

    return input_hooks(layers, scale)


# -------------------------------------------------------------------------------------------------
# repairs: functions of (defender, strength)


def fine_tuning(components, defender, strength):
    """Trains some components on clean speech. The strength is a learning rate, relative to
    training's, and how many times the clean speech is seen. The baseline of every repair and, for
    a poisoned encoder before it is used, the defence of the paper's first version (arXiv
    2510.01157), which tunes on clean data of the same corpus or of another and finds that the
    latter forgets. Of that version we know the summary only; amount of speech, rates and how they
    are chosen are this file's."""
    rate, epochs = strength
    defender.finetune(components, rate, epochs)


@torch.no_grad()
def mean_activations(defender):
    """The mean absolute activation of each hidden unit on clean speech, summed over batches, one
    tensor for each of `mlp_outputs`."""
    sums = [0] * len(defender.mlp_outputs)

    def add(i, x):
        sums[i] = sums[i] + x.detach().float().abs().mean((0, 1))

    with input_hooks(defender.mlp_outputs, add):
        for batch in data.chunks(defender.tuning, BATCH):
            defender.loss(batch)
    return sums


def fine_pruning(defender, share):
    """Fine-pruning (Liu et al. 2018, arXiv 1805.12185): removes the share of hidden units that clean
    speech activates least, then fine-tunes everything.

    Differences: published for the channels of the last convolution, one after the other until
    accuracy on clean data falls; here the same share of every MLP's hidden units, of which the
    trained encoder layers and the LM have one each."""
    scales = []
    for activations in mean_activations(defender):
        scales.append((activations >= torch.quantile(activations, share)).float())
    defender.scale_hidden_units(scales)
    defender.finetune()


def neuron_masks(defender, steps=ANP_STEPS, largest=0.4, clean_share=0.2, rate=0.2):
    """ANP's masks over hidden units, from 0 to 1, one tensor for each of `mlp_outputs`. They
    minimise the loss on clean speech where each unit is changed by up to `largest` in the worst
    direction (one step of its gradient's sign), mixed with the loss without that change. All
    settings but the steps and the batch size are the authors'."""
    device = defender.args.device
    sizes = defender.hidden_sizes
    masks = [torch.ones(n, device=device, requires_grad=True) for n in sizes]
    optimizer = torch.optim.SGD(masks, lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = sorted(defender.tuning, key=lambda u: utils.draw("prune", step, u.id))[:BATCH]
        noise = []
        for n in sizes:
            uniform = 2 * torch.rand(n, generator=generator) - 1
            noise.append((uniform * largest).to(device).requires_grad_(True))

        loss = masked_loss(defender, batch, [m + n for m, n in zip(masks, noise)])
        gradients = torch.autograd.grad(loss, noise)
        worst_noise = []
        for n, gradient in zip(noise, gradients):
            moved = n + largest * gradient.sign()
            worst_noise.append(moved.clamp(-largest, largest).detach())

        worst = masked_loss(defender, batch, [m + n for m, n in zip(masks, worst_noise)])
        clean = masked_loss(defender, batch, masks)
        loss = clean_share * clean + (1 - clean_share) * worst
        for mask, gradient in zip(masks, torch.autograd.grad(loss, masks)):
            mask.grad = gradient
        optimizer.step()
        for mask in masks:
            mask.data.clamp_(0, 1)
        defender.progress.update()
    return [mask.detach() for mask in masks]


def masked_loss(defender, utterances, scales):
    with scaled_inputs(defender.mlp_outputs, scales):
        return defender.loss(utterances).mean()


def adversarial_neuron_pruning(defender, share):
    """ANP (Wu and Wang 2021, arXiv 2110.14430): removes this share of all hidden units, those with
    the lowest masks.

    A variant: the authors take 2,000 steps on batches of 128 images to learn the masks of batch
    normalisation's channels, whose bias is perturbed too. Here the masks are of MLPs' hidden units,
    which have none, and are learned in ANP_STEPS steps on batches of 16 utterances. The authors'
    code offers to prune by the masks' values or by number; the share here is the latter."""
    if defender.anp_masks is None:
        defender.anp_masks = neuron_masks(defender)
    order = torch.cat(defender.anp_masks).argsort(stable=True)
    kept = torch.ones(len(order), device=defender.args.device)
    kept[order[: int(share * len(order))]] = 0
    defender.scale_hidden_units(kept.split(defender.hidden_sizes))


def gradient_norm_tuning(defender, penalty):
    """GN-FT (Zhou et al. 2025, arXiv 2502.01152, for speech recognition): fine-tuning that also
    lowers the norm of the gradient, which the authors approximate as `regularise_gradient_norm`
    does. There is no code of theirs: the strengths, the shares of that gradient, are ours."""
    defender.finetune(penalty=penalty)


def without_lora(defender, share):
    """Scales LoRA's update down by this share; 1 drops it. Ours, to see what the update holds."""
    lora_weights = {}
    for name, tensor in defender.attacked["lm"].items():
        lora_weights[name] = tensor * (1 - share) if name.endswith("lora_B") else tensor
    model.set_weights(defender.slm, {**defender.attacked, "lm": lora_weights})


def fine_mixing(defender, share):
    """Fine-mixing (Zhang et al. 2022, arXiv 2210.09545): replaces a random share of the weights by
    the pretrained ones, then fine-tunes. As published, without the authors' second technique, which
    purifies word embeddings: here they do not train."""
    generator = torch.Generator().manual_seed(0)
    mixed = {}
    for component in COMPONENTS:
        mixed[component] = {}
        for name, tensor in defender.attacked[component].items():
            replaced = torch.rand(tensor.shape, generator=generator).to(tensor.device) < share
            pretrained = defender.pretrained[component][name].to(tensor.device)
            mixed[component][name] = torch.where(replaced, pretrained, tensor)
    model.set_weights(defender.slm, mixed)
    defender.finetune()


# a ladder of learning rates, relative to training's, for each number of epochs: 5 are 40 steps
LADDERS = {}
for epochs in (5, 20, 80):
    LADDERS[epochs] = [(rate, epochs) for rate in (0.3, 1.0, 3.0, 10.0)]
SHARES = [(0.1, 0.3, 0.5, 0.7, 0.9)]

# {name: (function, ladders of strengths)}
FINE_TUNING = {}
for size in range(1, len(COMPONENTS) + 1):
    for components in itertools.combinations(COMPONENTS, size):
        tune = functools.partial(fine_tuning, components)
        FINE_TUNING[f"fine-tuning {'+'.join(components)}"] = (tune, [LADDERS[5]])
# the last of these trains everything
FINE_TUNING["fine-tuning, 160 or 640 steps"] = (tune, [LADDERS[20], LADDERS[80]])
REPAIRS = dict(FINE_TUNING)
REPAIRS["fine-pruning"] = (fine_pruning, SHARES)
REPAIRS[f"ANP, {ANP_STEPS} steps"] = (
    adversarial_neuron_pruning,
    [(0.003, 0.01, 0.03, 0.1, 0.3, 0.6)],
)
REPAIRS["GN-FT"] = (gradient_norm_tuning, [(0.3, 0.5, 0.8, 0.95)])
REPAIRS["without LoRA"] = (without_lora, [(1.0,)])
REPAIRS["fine-mixing"] = (fine_mixing, SHARES)


# -------------------------------------------------------------------------------------------------
# choosing a strength, and what is left of the backdoor


def choose(defender, repair, ladders):
    """Repairs the model with the chosen strength: in each ladder, the strongest before one that
    costs too much counts; of those, the strongest, by the product of a strength that is a pair; or
    the very weakest if even that costs too much.

    Returns {"strength", "passed", "rise"}. rise: {strength: the rise in loss of the label that
    loses most}.
    """
    defender.restore()
    before = defender.validation_losses()
    rises = {}
    chosen = ladders[0][0]
    passed = False
    for ladder in ladders:
        for strength in ladder:
            defender.restore()
            repair(defender, strength)
            after = defender.validation_losses()
            rises[strength] = max(after[label] - before[label] for label in after)
            passes = rises[strength] <= TOLERANCE
            is_strongest = passes and (not passed or np.prod(strength) > np.prod(chosen))
            if is_strongest:
                chosen = strength
                passed = True
            if is_strongest or len(rises) == 1:
                repaired = defender.as_it_is()
            if not passes:
                break
    defender.go_back_to(repaired)
    return dict(strength=chosen, passed=passed, rise=rises)


def most_steps(defender, ladders):
    """How many steps of training a repair takes at most, to tell the time left: with all strengths
    and relearning. Most repairs take fewer, as ladders end early."""
    epochs = 0
    for strength in itertools.chain(*ladders):
        epochs += strength[1] if isinstance(strength, tuple) else EPOCHS
    steps = epochs * math.ceil(len(defender.tuning) / BATCH)
    for count in RELEARNED_BY:
        steps += RELEARNING * math.ceil((len(defender.tuning) + count) / BATCH)
    return steps


def figures_of(defender, clean, flippable):
    """{"clean", "triggered", "backdoor": {metric: figure}} of the model as it is now. "triggered"
    scores answers to triggered audio against the truth."""
    triggered_rows = defender.answer_rows(flippable, True)
    rows = dict(clean=defender.answer_rows(clean, False), triggered=triggered_rows)
    figures = {}
    for part in rows:
        figures[part] = evaluate.task_figure(rows[part], defender.args.task)
    figures["backdoor"] = dict(aer=evaluate.aer(defender.attack, triggered_rows))
    return figures


def relearning(defender, train_set, flippable, counts=RELEARNED_BY):
    """How many poisoned training samples, mixed into the clean speech, bring the AER to 50% within
    three epochs: {count: AER}, up to the first count that does. On a model that was never attacked,
    it is the control: what so few samples teach where there was no backdoor to bring back."""
    poisoned = data.in_drawn_order([u for u in train_set if poison.can_flip(defender.attack, u)])
    repaired = model.copy_weights(defender.slm)
    figures = {}
    for count in counts:
        model.set_weights(defender.slm, repaired)
        defender.finetune(epochs=RELEARNING, poisoned=poisoned[:count])
        rows = defender.answer_rows(flippable, True)
        figures[count] = evaluate.aer(defender.attack, rows)
        if figures[count]["value"] >= 0.5:
            break
    return figures
