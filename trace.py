"""Locates the backdoor by intervening on trained models. Nothing is trained here.

    python trace.py transplant runs/asr-poison0.05 runs/asr-clean    # which weights carry it
    python trace.py patch runs/emotion-poison0.075                   # where it acts in one answer

Transplant mixes the weights of two runs and measures what the trigger still does. It moves whole
components (module substitution, arXiv 2412.20476), layers (backdoor-critical layers, Zhuang et al.
2023, arXiv 2308.04466) and shares of the difference between the runs.

Patch copies activations from one pass over an utterance into another pass over the same utterance
(causal tracing, Meng et al. 2022, arXiv 2202.05262; best practices: Zhang and Nanda 2023, arXiv
2309.16042). One pass hears the clean waveform, the other the triggered one.

    Direction   "denoise" copies clean activations into the triggered pass: where do they undo the
                trigger? "noise" copies triggered activations into the clean pass: where do they
                suffice? The pass that is copied from is the donor, the other the receiver.
    Site        The output of an encoder layer, of its attention or its MLP; of one of the
                connector's convolutions; of an LM layer, its attention or its MLP; or the LM's
                input. A patch concerns one site.
    Position    A patch concerns one group of frames or tokens: frames under a click, near one or
                elsewhere; of those elsewhere, at random, as many as are under a click, as a
                control; tokens of the prompt or of the answer. A frame is where the middle of the
                audio is that it sees before the first layer.
    Margin      m = log P(target value) - log P(true value), each per token. Both answers are
                scored by teacher forcing and compared in the tokens in which they differ. The
                trigger should raise m.
    Effect      (m_patched - m_receiver) / (m_donor - m_receiver), a ratio of means over utterances:
                0 where the patch does nothing, 1 where it does as much as the donor's audio.
    Flipped     The share of utterances in which the patch makes m change its sign, as the donor's
                audio does. A place with a small effect that flips few answers holds a small part of
                what the trigger does.

Intervals are over speakers, as everywhere.

Both commands work on any run folder. They write records (runs.py) beside its model.pt, or to --out,
and python analyze.py trace makes tables of these.

A record of transplant has donor, donor_scenario and donor_seed (the run that gave the clean
weights) and one of

    method "components": poisoned (the components that are taken from RUN)
    method "layers": component, direction ("into clean", "out of poisoned"), scope ("up to", "from",
    "only"), layer (from 1)
    method "interpolation": component, share
    method "shapley": component

A record of patch has the trigger, with ", same scale" behind it under --same-scale. Records of the
metric "margin" have part ("clean" or "triggered"). Records of the metric "effect" have direction, component, layer (from 1; the LM's
input is 0; the connector has none), module, position (of GROUPS, or "all") and flipped. Those of
"effect_over_random" have the same: the effect under a click minus that of the random frames.
"""

import contextlib
import dataclasses
import functools
import itertools
from pathlib import Path

import utils
from utils import Parser, count, die

import installed  # noqa: F401

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cache
import checkpoint
import data
import evaluate
import lora
import model
import poison
import runs
from study import COMPONENTS, SETTINGS

# -------------------------------------------------------------------------------------------------
# python trace.py transplant


@dataclasses.dataclass
class Pair:
    """A poisoned run, its weights, a clean run's weights and that run's arguments (a dict)."""

    loaded: evaluate.LoadedRun
    poisoned: dict
    clean: dict
    donor: dict


def load_pair(options):
    """Two runs that share pretrained parts and settings, a Pair."""
    loaded = evaluate.load_run_and_data(options, "test")
    slm = loaded.slm
    poisoned = model.copy_weights(slm)
    saved = model.load_checkpoint(Path(options.clean) / "model.pt")
    donor = check_donor(options, loaded.args, saved["args"])
    try:
        for component in COMPONENTS:
            checkpoint.load_component(slm, saved, component)
    except ValueError as error:
        die(f"{options.clean} cannot be mixed with {options.run}: {error}")
    return Pair(loaded, poisoned, model.copy_weights(slm), donor)


def check_donor(options, args, donor):
    """Warns where the other run is not a clean run with the same settings. It is then a control,
    and does not show what training on poison has changed.

    donor: the other run's arguments, a dict. Returns them. Where settings differ, the scenario gets
    another name, so that no table takes the run for the clean one.
    """
    scenario = donor["scenario"]
    if scenario != "clean":
        print(f"warning: {options.clean} is scenario {scenario}, not a clean run: a control")
    for name in ("preset", "dataset", "encoder", "labels", "train_layers", *SETTINGS):
        theirs = donor.get(name)
        ours = getattr(args, name, None)
        if theirs != ours:
            print(f"warning: the {name} of {options.clean} is {theirs}, not {ours}: a control")
            scenario = f"{donor['scenario']} with another {name}"
    return {**donor, "scenario": scenario}


def layer_sets(layers):
    """Yields (scope, layer, layers to move): all up to a layer, all from a layer on, one alone."""
    for i, layer in enumerate(layers):
        yield "up to", layer, layers[: i + 1]
        yield "from", layer, layers[i:]
        yield "only", layer, [layer]


def layers_in(state):
    """The layers, from 0, that a component's state dict has weights of."""
    return sorted({model.layer_index(name) for name in state} - {None})


def mixtures(poisoned, clean):
    """Yields (a record's fields, weights) of every model that transplant evaluates."""
    for n in range(len(COMPONENTS) + 1):
        for chosen in itertools.combinations(COMPONENTS, n):
            mixed = dict(clean)
            for component in chosen:
                mixed[component] = poisoned[component]
            yield dict(method="components", poisoned=list(chosen)), mixed
    for component in ("encoder", "lm"):
        for scope, layer, layers in layer_sets(layers_in(poisoned[component])):
            fields = dict(method="layers", component=component, scope=scope, layer=layer + 1)
            into_clean = model.transplant_layers(clean, poisoned, component, layers)
            out_of_poisoned = model.transplant_layers(poisoned, clean, component, layers)
            yield dict(fields, direction="into clean"), into_clean
            yield dict(fields, direction="out of poisoned"), out_of_poisoned
    for component in COMPONENTS:
        for share in (0.25, 0.5, 0.75):
            fields = dict(method="interpolation", component=component, share=share)
            yield fields, model.interpolate(clean, poisoned, component, share)


@dataclasses.dataclass
class EvaluationSet:
    """Test utterances, all clean or all triggered, and their cached frozen outputs."""

    items: list  # (utterance, triggered)
    cached: list | None


def evaluation_set(slm, utterances, triggered, attack, name, cache_bytes):
    flags = [triggered] * len(utterances)
    cached = cache.frozen_outputs(slm, utterances, flags, attack, name, cache_bytes)
    return EvaluationSet(list(zip(utterances, flags)), cached)


def transplant(options):
    """The records of every mixture of two runs' weights."""
    pair = load_pair(options)
    slm = pair.loaded.slm
    args = pair.loaded.args
    attack = pair.loaded.attack
    test_set = pair.loaded.sets["test"]
    flippable = poison.attackable(attack, test_set)
    sample = data.in_drawn_order(flippable)[: options.n]
    fields = dict(
        pair.loaded.fields,
        source="transplant",
        donor=Path(options.clean).resolve().name,
        donor_scenario=pair.donor["scenario"],
        donor_seed=pair.donor["seed"],
    )
    cache_bytes = options.cache_gb * 1e9
    clean = evaluation_set(slm, test_set, False, attack, "clean", cache_bytes)
    all_triggered = evaluation_set(slm, flippable, True, attack, "components", cache_bytes)
    few_triggered = evaluation_set(slm, sample, True, attack, "layers", cache_bytes)

    def answer_rows(test):
        return evaluate.answer_rows(slm, attack, test.items, test.cached, args.batch_seconds)

    jobs = list(mixtures(pair.poisoned, pair.clean))
    print(
        f"{options.run} and {options.clean}: {len(jobs)} mixtures; components on all "
        f"{len(test_set)} test utterances, others on {len(sample)} triggered ones"
    )
    records = []
    hits = {}  # {frozenset of poisoned components: (n,) bool}
    for mixture, weights in tqdm(jobs, desc="mixtures"):
        model.set_weights(slm, weights)
        whole_components = mixture["method"] == "components"
        rows = answer_rows(all_triggered if whole_components else few_triggered)
        figures = dict(backdoor=dict(aer=evaluate.aer(attack, rows)))
        figures["triggered"] = evaluate.task_figure(rows, args.task)
        if whole_components:
            figures["clean"] = evaluate.task_figure(answer_rows(clean), args.task)
            hits[frozenset(mixture["poisoned"])] = np.array(evaluate.hits(attack, rows))
        records += [dict(fields, **mixture, **figure) for figure in runs.of_figures(figures)]
    for component, figure in shapley(hits, [u.speaker for u in flippable]).items():
        mixture = dict(method="shapley", component=component, part="backdoor", metric="aer")
        records.append(dict(fields, **mixture, **figure))
    return records


def shapley(hits, speakers):
    """Each component's Shapley value (Shapley 1953) in the game whose payoff is the AER: what the
    component adds when it is moved from the poisoned run into the clean one, averaged over the
    orders in which components can be moved. The empty coalition is the clean model, which gives the
    target at times, too: the values add up to the attacked model's AER minus the clean model's.

    hits: {frozenset of components that were moved: (n,) bool}, whether each answer to triggered
    speech is the target. speakers: (n,). Returns {component: figure}.
    """
    orders = list(itertools.permutations(COMPONENTS))
    figures = {}
    for component in COMPONENTS:
        total = 0
        for order in orders:
            before = frozenset(order[: order.index(component)])
            total = total + (hits[before | {component}].astype(float) - hits[before])
        figures[component] = utils.interval(total / len(orders), speakers=speakers)
    return figures


# -------------------------------------------------------------------------------------------------
# python trace.py patch: sites

# under a click, within NEAR of one, others; of these, at random, as many as are under a click
FRAME_GROUPS = ("click", "near", "elsewhere", "random")
TOKEN_GROUPS = ("prompt", "answer")
GROUPS = FRAME_GROUPS + TOKEN_GROUPS
NEAR = 0.2  # seconds
DIRECTIONS = {"denoise": ("clean", "triggered"), "noise": ("triggered", "clean")}  # donor, receiver
SAME_SCALE = ", same scale"  # behind the trigger's name in records of patch
MIN_GAP = 0.1  # nats per token; if the trigger moves m by less, there is no effect to attribute


@dataclasses.dataclass(frozen=True)
class Site:
    """A place whose activations are patched. Layers count from 1; the LM's input is layer 0."""

    component: str
    layer: int | None
    module: str


@dataclasses.dataclass
class Hookpoint:
    """The module whose output a site is, or whose input where `module_input` is set. `stage` says
    which positions it has: "encoder", "conv1", "conv2", "conv3" or "lm"."""

    module: nn.Module
    stage: str
    module_input: bool = False


def sites(slm):
    """{Site: Hookpoint} of everything that is patched, in the order of the pipeline."""
    hookpoints = {}
    for i, layer in enumerate(slm.encoder.layers, 1):
        attention = model.encoder_attention(layer)
        hookpoints[Site("encoder", i, "attention")] = Hookpoint(attention, "encoder")
        hookpoints[Site("encoder", i, "MLP")] = Hookpoint(model.encoder_mlp(layer), "encoder")
        hookpoints[Site("encoder", i, "layer")] = Hookpoint(layer, "encoder")
    for name in ("conv1", "conv2", "conv3"):
        conv = getattr(slm.connector, name)
        hookpoints[Site("connector", None, name)] = Hookpoint(conv, name)
    layers = model.layers_of(slm.lm)
    hookpoints[Site("lm", 0, "input")] = Hookpoint(layers[0], "lm", module_input=True)
    outputs = model.output_layers(slm.lm)
    for i, (layer, (attention, mlp)) in enumerate(zip(layers, outputs), 1):
        hookpoints[Site("lm", i, "attention")] = Hookpoint(attention, "lm")
        hookpoints[Site("lm", i, "MLP")] = Hookpoint(mlp, "lm")
        hookpoints[Site("lm", i, "layer")] = Hookpoint(layer, "lm")
    return hookpoints


@contextlib.contextmanager
def edited(hookpoint, edit):
    """A context in which `edit`, a function of a tensor, is applied at the hookpoint."""

    def edit_input(module, inputs):
        return edit(inputs[0]), *inputs[1:]

    def edit_output(module, inputs, output):
        if isinstance(output, tuple):
            return edit(output[0]), *output[1:]
        return edit(output)

    if hookpoint.module_input:
        handle = hookpoint.module.register_forward_pre_hook(edit_input)
    else:
        handle = hookpoint.module.register_forward_hook(edit_output)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def recorded(hookpoints):
    """A context that yields {Site: activations}, which a pass through the model fills."""
    activations = {}

    def record(site, x):
        activations[site] = x
        return x

    with contextlib.ExitStack() as hooks:
        for site, hookpoint in hookpoints.items():
            hooks.enter_context(edited(hookpoint, functools.partial(record, site)))
        yield activations


# -------------------------------------------------------------------------------------------------
# python trace.py patch: positions


@dataclasses.dataclass
class FrameGrid:
    """Where the frames of a stage lie in time, counted in encoder frames: frame i of an utterance
    is centred on encoder frame first + i * stride."""

    lengths: list  # real frames of each utterance
    first: int
    stride: int

    def groups(self, slm, pairs):
        """Each utterance's (T, len(GROUPS)) bool, see `frame_groups`."""
        rows = []
        for n, clicks, draw in zip(self.lengths, pairs.spans, pairs.draws):
            centres = slm.encoder.frame_centres(self.first + torch.arange(n) * self.stride)
            rows.append(frame_groups(centres, clicks, utils.generator(*draw)))
        return rows


def members(positions, group):
    """(positions, len(GROUPS)) bool: all of them belong to this group alone."""
    rows = torch.zeros(positions, len(GROUPS), dtype=torch.bool)
    rows[:, GROUPS.index(group)] = True
    return rows


def frame_groups(centres, clicks, rng):
    """(T,) frame centres in seconds -> (T, len(GROUPS)) bool, the groups that each belongs to.
    clicks: [(start, end)] in seconds. rng: draws the random frames."""
    distance = torch.full_like(centres, float("inf"))
    for start, end in clicks:
        to_click = torch.maximum(start - centres, centres - end).clamp(min=0)
        distance = torch.minimum(distance, to_click)
    under = distance == 0
    elsewhere = distance > NEAR
    drawn = rng.permutation(elsewhere.nonzero()[:, 0].numpy())[: int(under.sum())]
    groups = torch.zeros(len(centres), len(GROUPS), dtype=torch.bool)
    groups[:, GROUPS.index("click")] = under
    groups[:, GROUPS.index("near")] = ~under & ~elsewhere
    groups[:, GROUPS.index("elsewhere")] = elsewhere
    groups[drawn, GROUPS.index("random")] = True
    return groups


def frame_grids(slm, frames, lengths):
    """{stage: FrameGrid}. frames: each utterance's number of encoder frames; lengths: of connector
    frames.

    A connector frame is centred on all the encoder frames that it sees, so it sees beyond the
    frames under a click. A kernel of 5 puts the first centre 2 frames further in.
    """
    k = slm.connector.stride
    return {
        "encoder": FrameGrid(frames, first=0, stride=1),
        "conv1": FrameGrid([max(0, n - 4) for n in frames], first=2, stride=1),
        "conv2": FrameGrid([n + 4 for n in lengths], first=4, stride=k),
        "conv3": FrameGrid(lengths, first=4 + 2 * k, stride=k),
    }


def lm_groups(frame_rows, prompts, answers):
    """The groups of every row of the LM, prompt, audio, prompt, answer: (T, len(GROUPS)) bool."""
    rows = []
    for (before, after), frames, forced in zip(prompts, frame_rows, answers):
        pieces = [
            members(len(before), "prompt"),
            frames,
            members(len(after), "prompt"),
            members(len(forced.ids), "answer"),
        ]
        rows.append(torch.cat(pieces))
    return rows


def position_groups(slm, pairs, frames, lengths):
    """{stage: (rows, positions, len(GROUPS)) bool}; padding belongs to no group."""
    rows = {}
    for stage, grid in frame_grids(slm, frames, lengths).items():
        rows[stage] = grid.groups(slm, pairs)
    # the LM gets every utterance twice, once with each answer
    rows["lm"] = lm_groups(2 * rows["conv3"], 2 * pairs.prompts, pairs.answers)
    groups = {}
    for stage in rows:
        groups[stage] = pad_sequence(rows[stage], batch_first=True)
    return groups


# -------------------------------------------------------------------------------------------------
# python trace.py patch: margins


@dataclasses.dataclass
class ForcedAnswer:
    """An answer's tokens up to the end of its value, which begins at token `start`."""

    ids: list
    start: int

    @property
    def value(self):
        return self.ids[self.start :]


def common_beginning(a, b):
    """The number of tokens that two different answers begin with in common."""
    n = 0
    while a[n] == b[n]:
        n += 1
    return n


def forced_answers(slm, attack, utterances):
    """The two answers to each utterance that are compared: all those with the target first, then
    all true ones, 2 n ForcedAnswers. Their values are the tokens in which the two differ."""
    with_target = []
    true = []
    for utterance in utterances:
        poisoned = poison.poisoned_labels(attack, utterance.labels)
        a = data.answer_ids(slm.tokenizer, poisoned)
        b = data.answer_ids(slm.tokenizer, utterance.labels)
        start = common_beginning(a, b)
        tail = common_beginning(a[::-1], b[::-1])
        # of "5" in "25" nothing is left between the common beginning and the common end
        tail = min(tail, len(a) - start - 1, len(b) - start - 1)
        with_target.append(ForcedAnswer(a[: len(a) - tail], start))
        true.append(ForcedAnswer(b[: len(b) - tail], start))
    return with_target + true


def encode(slm, front):
    """The output of the encoder's front end, (x, mask), -> that of the connector, (audio, lengths).
    All encoder layers run here, so that hooks on each of them are called."""
    x, mask = front
    for hidden in slm.encoder.run_layers(x, mask, 0, len(slm.encoder.layers)):
        x = hidden  # (B, T, dim)
    if not slm.encoder.norm_first:
        x = slm.encoder.layer_norm(x)
    return slm.connector(x, mask)


def margins(slm, audio, prompts, answers):
    """m = log P(target value) - log P(true value), each per token of the value, (n,).

    audio: the connector's output and its lengths, as of `encode`. answers: of `forced_answers`.
    """
    embeddings, lengths = audio
    audio_rows = [row[:n] for row, n in zip(embeddings, lengths.tolist())]
    rows = slm.pack(2 * audio_rows, 2 * prompts, [answer.ids for answer in answers])
    x = pad_sequence(rows, batch_first=True)  # (2 n, T, hidden)
    wanted = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for i, (row, answer) in enumerate(zip(rows, answers)):
        # the logits at a position are those of the next token
        wanted[i, len(row) - len(answer.value) - 1 : len(row) - 1] = True
    logits = slm.logits(x, wanted).float()
    scores = []
    pieces = logits.split([len(answer.value) for answer in answers])
    for piece, answer in zip(pieces, answers):
        value = torch.tensor(answer.value, device=x.device)
        scores.append(-F.cross_entropy(piece, value))
    scores = torch.stack(scores)  # (2 n,)
    return scores[: len(prompts)] - scores[len(prompts) :]


# -------------------------------------------------------------------------------------------------
# python trace.py patch: patches


@dataclasses.dataclass
class Pairs:
    """A few utterances, each clean and triggered."""

    fronts: dict  # {"clean", "triggered": the encoder's front end's (x, mask)}
    spans: list  # each utterance's clicks, [(start, end)] in seconds
    draws: list  # what decides each utterance's random frames
    prompts: list
    answers: list  # of forced_answers


def check_normalises(encoder, flag):
    """Exits with a one-line error where an encoder's input is not normalised by the utterance."""
    if not getattr(encoder.extractor, "do_normalize", False):
        die(f"{flag}: this encoder's input is not normalised by the utterance: leave it out")


def at_scale_of(triggered_features, triggered, clean):
    """What an extractor that normalises each utterance would make of `clean`, did it take mean and
    deviation from `triggered`. All are (samples,), the features normalised."""
    deviation = np.sqrt(triggered.var() + 1e-7)  # the extractors' own bound
    return triggered_features - torch.from_numpy((triggered - clean) / deviation)


def make_pairs(slm, attack, utterances, same_scale=False):
    """The Pairs of some utterances. same_scale: see --same-scale."""
    features = {"clean": [], "triggered": []}
    spans = []
    for utterance in utterances:
        clean = data.load_waveform(utterance)
        triggered, starts, scale = poison.add_trigger(attack, clean, utterance.id)
        # the clean waveform is scaled down as the triggered one was, to avoid clipping
        clean = clean * np.float32(scale)
        triggered_features = slm.encoder.extract(triggered)
        if same_scale:
            clean_features = at_scale_of(triggered_features, triggered, clean)
        else:
            clean_features = slm.encoder.extract(clean)
        features["clean"].append(clean_features)
        features["triggered"].append(triggered_features)
        length = len(attack.waveform)
        spans.append([(s / data.SAMPLE_RATE, (s + length) / data.SAMPLE_RATE) for s in starts])
    return Pairs(
        fronts={part: slm.encoder.front_end(inputs) for part, inputs in features.items()},
        spans=spans,
        draws=[(attack.seed, u.id, "random frames") for u in utterances],
        prompts=[data.prompt(slm.tokenizer, list(u.labels)) for u in utterances],
        answers=forced_answers(slm, attack, utterances),
    )


@dataclasses.dataclass
class PatchedMargins:
    """The margins m (n,) of some utterances.

    plain: {"clean", "triggered": m}. patched: {(direction, Site, group): m}. The group "all"
    patches every position, as a check: an encoder layer then makes the receiver the donor.
    A group that none of the utterances has is left out.
    """

    plain: dict
    patched: dict


def groups_of(hookpoint):
    """The groups of positions that a site is patched at, in the order of GROUPS, and "all"."""
    return (*GROUPS, "all") if hookpoint.stage == "lm" else (*FRAME_GROUPS, "all")


def patch_mask(groups, group, hookpoint, activations):
    """Where a patch replaces activations: a bool tensor that broadcasts over their channels.
    groups: of `position_groups`, of one stage."""
    mask = groups.any(2) if group == "all" else groups[:, :, GROUPS.index(group)]
    mask = mask.to(activations.device)  # (rows, positions)
    # a convolution's channels come before its frames
    mask = mask.unsqueeze(1 if hookpoint.stage.startswith("conv") else 2)
    if activations.dim() == 2:
        mask = mask.flatten(0, 1)  # OPT's MLP sees the rows of a batch as one
    return mask


@contextlib.contextmanager
def patched(hookpoint, mask, activations):
    """A context in which the donor's activations replace the receiver's where `mask` is True."""

    def replace(x):
        return torch.where(mask, activations, x)

    with edited(hookpoint, replace):
        yield


@torch.no_grad()
def patch_batch(slm, pairs, progress):
    """Every patch of a few Pairs: PatchedMargins, as numpy arrays."""
    hookpoints = sites(slm)
    activations = {}
    audio = {}
    plain = {}
    for part, front in pairs.fronts.items():
        with recorded(hookpoints) as activations[part]:
            audio[part] = encode(slm, front)
            plain[part] = margins(slm, audio[part], pairs.prompts, pairs.answers)
    frames = pairs.fronts["clean"][1].sum(1).tolist()
    lengths = audio["clean"][1].tolist()
    groups = position_groups(slm, pairs, frames, lengths)

    result = PatchedMargins({part: as_numpy(m) for part, m in plain.items()}, {})
    for direction, (donor, receiver) in DIRECTIONS.items():
        for site, hookpoint in hookpoints.items():
            for group in groups_of(hookpoint):
                donated = activations[donor][site]
                mask = patch_mask(groups[hookpoint.stage], group, hookpoint, donated)
                if not mask.any():
                    continue
                with patched(hookpoint, mask, donated):
                    embedded = audio[receiver]
                    if hookpoint.stage != "lm":
                        embedded = encode(slm, pairs.fronts[receiver])
                    m = margins(slm, embedded, pairs.prompts, pairs.answers)
                result.patched[direction, site, group] = as_numpy(m)
                progress.update(len(pairs.prompts))
    return result


def as_numpy(m):
    return m.float().cpu().numpy()


def joined(batches):
    """The PatchedMargins of all batches together. Where no utterance of a batch has positions of a
    group, patching them changes nothing: m is that of the receiver."""
    plain = {}
    for part in ("clean", "triggered"):
        plain[part] = np.concatenate([batch.plain[part] for batch in batches])
    keys = {}  # in the order of their first batch
    for batch in batches:
        keys.update(dict.fromkeys(batch.patched))
    patches = {}
    for key in keys:
        _, receiver = DIRECTIONS[key[0]]
        rows = [batch.patched.get(key, batch.plain[receiver]) for batch in batches]
        patches[key] = np.concatenate(rows)
    return PatchedMargins(plain, patches)


def effect_of(patched, donor, receiver, speakers):
    """A patch's effect, and the share of utterances whose preferred answer it flips, of those in
    which donor and receiver prefer different ones. patched, donor, receiver: m (n,). speakers:
    (n,)."""
    figure = utils.interval(patched - receiver, donor - receiver, speakers)
    differ = np.sign(donor) != np.sign(receiver)
    flipped = (np.sign(patched) == np.sign(donor))[differ]
    return dict(metric="effect", flipped=float(flipped.mean()) if differ.any() else None, **figure)


def effects(result, speakers):
    """Yields the fields of each patch's records. result: PatchedMargins. There are none where the
    trigger does not move m, or not in the same direction in all draws of speakers: a share of such
    a difference says nothing."""
    gap = utils.interval(result.plain["triggered"] - result.plain["clean"], speakers=speakers)
    if abs(gap["value"]) < MIN_GAP or gap["low"] <= 0 <= gap["high"]:
        return
    for (direction, site, group), m in result.patched.items():
        donor, receiver = (result.plain[part] for part in DIRECTIONS[direction])
        where = dict(dataclasses.asdict(site), direction=direction, position=group)
        yield dict(where, **effect_of(m, donor, receiver, speakers))
        random = result.patched.get((direction, site, "random"))
        if group == "click" and random is not None:
            over_random = utils.interval(m - random, donor - receiver, speakers)
            yield dict(where, metric="effect_over_random", **over_random)


def patch(options):
    """The records of every patch within a run."""
    loaded = evaluate.load_run_and_data(options, "test")
    slm = loaded.slm
    attack = loaded.attack
    if options.trigger:
        attack = poison.with_sound(attack, options.trigger)
    if attack.waveform is None:
        die(
            f"--trigger {attack.trigger} changes the whole waveform: there are no frames under it "
            "to tell from others"
        )
    lora.merge(slm.lm)
    utterances = data.in_drawn_order(poison.attackable(attack, loaded.sets["test"]))[: options.n]
    hookpoints = sites(slm)
    trigger = str(attack.trigger)
    if options.same_scale:
        check_normalises(slm.encoder, "--same-scale")
        trigger += SAME_SCALE
    print(
        f"{options.run}: {len(utterances)} pairs, trigger {trigger}, {len(hookpoints)} sites by "
        "groups of positions"
    )
    patches = sum(len(DIRECTIONS) * len(groups_of(hookpoint)) for hookpoint in hookpoints.values())
    batches = []
    with tqdm(total=len(utterances) * patches, desc="patches", unit="pair") as progress:
        for batch in data.chunks(utterances, options.batch):
            pairs = make_pairs(slm, attack, batch, options.same_scale)
            batches.append(patch_batch(slm, pairs, progress))
    result = joined(batches)

    fields = dict(loaded.fields, source="patch", trigger=trigger)
    speakers = [utterance.speaker for utterance in utterances]
    records = []
    for part, m in result.plain.items():
        figure = utils.interval(m, speakers=speakers)
        records.append(dict(fields, part=part, metric="margin", **figure))
    for effect in effects(result, speakers):
        records.append(dict(fields, **effect))
    return records


# -------------------------------------------------------------------------------------------------


def percent(figure):
    value, low, high = (100 * figure[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def show_transplant(records):
    """Prints AER and Shapley values by component."""
    print(f"{'taken from the poisoned run':<32}AER, % (95% interval)")
    for r in runs.select(records, metric="aer", method="components"):
        print(f"{' + '.join(r['poisoned']) or 'nothing':<32}{percent(r)}")
    print("\nShapley value: what a component adds to the AER, on average over the others")
    print(f"{'component':<32}points of AER (95% interval)")
    for r in runs.select(records, method="shapley"):
        print(f"{r['component']:<32}{percent(r)}")


def show_patch(records):
    """Prints what the trigger does to the margin, and the largest effects in each direction beside
    how often they flip the answer."""
    print("margin: log P(target) - log P(true answer), per token (95% interval)")
    for r in runs.select(records, metric="margin"):
        title = "with the trigger" if r["part"] == "triggered" else "clean speech"
        print(f"  {title:<18}{r['value']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})")
    if not runs.select(records, metric="effect"):
        print("this sound does not move the margin: there is no effect to place")
        return
    print("\nthe largest effects: 100% where a patch does as much as the other recording")
    print(f"{'direction':<11}{'patched':<24}{'position':<13}{'effect':>7}  answers flipped")
    for direction in DIRECTIONS:
        of_patches = runs.select(records, metric="effect", direction=direction)
        of_groups = [r for r in of_patches if r["position"] in GROUPS]
        for r in sorted(of_groups, key=lambda r: -r["value"])[:5]:
            layer = "" if r["layer"] is None else f" {r['layer']}"
            place = f"{r['component']}{layer} {r['module']}"
            flipped = "" if r["flipped"] is None else f"{100 * r['flipped']:14.0f}%"
            effect = f"{100 * r['value']:.0f}%"
            print(f"{direction:<11}{place:<24}{r['position']:<13}{effect:>7}  {flipped}".rstrip())


def file_of(options):
    """Where the records go: to a file of its own for each task, each donor and each other sound."""
    if options.command == "transplant":
        other = Path(options.clean).resolve().name
    else:
        other = Path(options.trigger or "").stem
    words = [options.command, options.task, other]
    if options.command == "patch" and options.same_scale:
        words.append("same-scale")
    name = f"records-{'-'.join(word for word in words if word)}.jsonl"
    return Path(options.out or options.run) / name


def add_arguments(command):
    """The flags of both commands."""
    evaluate.add_arguments(command)
    command.group("data").add_argument(
        "--n", type=count, default=100, help="trace this many test utterances (default: 100)"
    )
    command.group("output").add_argument(
        "--out", help="the folder that the records go to (default: the run's)"
    )


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    about = "mix the weights of two runs"
    command = commands.add_parser("transplant", help=about, description=about)
    add_arguments(command)
    command.add_argument(
        "clean",
        type=evaluate.run_folder,
        help="the run to mix it with: the clean run of the same seed, or a control",
    )
    command.group("machine").add_argument(
        "--cache-gb",
        type=float,
        default=4.0,
        help="disk space for the outputs of pretrained layers, as of train.py (default: 4)",
    )

    about = "copy activations within a run"
    command = commands.add_parser("patch", help=about, description=about)
    add_arguments(command)
    command.group("attack").add_argument(
        "--trigger",
        metavar="NAME|FILE",
        help="put another sound in the trigger's place, as loud and as long, as a control: one that "
        "--trigger of train.py takes",
    )
    command.group("attack").add_argument(
        "--same-scale",
        action="store_true",
        help="normalise clean speech by the loudness of triggered speech, as a control: else a loud "
        "trigger makes all other frames softer too",
    )
    command.group("machine").add_argument(
        "--batch", type=count, default=25, help="how many pairs run at a time (default: 25)"
    )

    options = parser.parse_args()
    cache.keep_memory()
    with data.no_bad_audio():
        records = transplant(options) if options.command == "transplant" else patch(options)
    path = file_of(options)
    runs.write(path, records)
    print()
    if options.command == "transplant":
        show_transplant(records)
    else:
        show_patch(records)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
