"""Where a backdoor lives, answered by intervening on trained models, without training.

    python trace.py transplant runs/asr-poison0.05 runs/asr-clean    # which weights carry it
    python trace.py patch runs/emotion-poison0.075                   # where it acts within one answer

transplant moves components, layers and shares of weights between two runs and measures what the
trigger still does (backdoor-critical layers, Zhuang et al. 2023, arXiv 2308.04466; module
substitution, arXiv 2412.20476). patch copies activations between the clean and the triggered pass
of one utterance (causal tracing, Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2023, arXiv
2309.16042). Both work on any run folder and write records (runs.py) beside its model.pt, or to
--out; python analyze.py trace makes tables of them.

A record of transplant has donor, donor_scenario and donor_seed (the run that the clean weights are
from) and one of

    method "components": poisoned (the components that are taken from RUN)
    method "layers": component, direction ("into clean", "out of poisoned"), scope ("up to", "from",
    "only"), layer (from 1)
    method "interpolation": component, share
    method "shapley": component

A record of patch has trigger and either part ("clean" or "triggered") and the metric "margin", or
direction ("denoise", "noise"), component, layer (from 1; the LM's input is 0; none in the
connector), module, position (of GROUPS) and the metric "effect".
"""

import contextlib
import dataclasses
import itertools
from pathlib import Path

import utils
from utils import Parser, count, die

import installed  # noqa: F401

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cache
import checkpoint
import data
import embed
import evaluate
import lora
import model
import poison
import runs
from study import COMPONENTS, SETTINGS

# ---------------------------------------------------------------------------------------------------------------------
# python trace.py transplant


def layer_of(key):
    """The layer that a weight of an encoder's or LM's state dict belongs to ("3.attention...",
    "model.layers.3...", "transformer.h.3..."), or None: OPT's projections around its layers."""
    return next((int(part) for part in key.split(".") if part.isdigit()), None)


def moved(receiver, donor, component, layers):
    """The receiver's weights of all components, with `layers` of one component taken from the donor."""
    mixed = {
        k: donor[component][k] if layer_of(k) in layers else v
        for k, v in receiver[component].items()
    }
    return {**receiver, component: mixed}


def interpolated(clean, poisoned, component, share):
    """The clean weights, with one component moved `share` of the way to the poisoned ones. For LoRA it is the product B A that is
    interpolated: both updates side by side in matrices of twice the rank, each scaled by its share."""
    a, b = clean[component], poisoned[component]
    if component != "lm":
        return {
            **clean,
            component: {
                k: torch.lerp(v.float(), b[k].float(), share).to(v.dtype) for k, v in a.items()
            },
        }
    mixed = {
        k: torch.cat([v, b[k]])
        if k.endswith("lora_A")
        else torch.cat([(1 - share) * v, share * b[k]], 1)
        for k, v in a.items()
    }
    return {**clean, component: mixed}


@torch.no_grad()
def put(slm, weights):
    """Loads weights of all components into the model; LoRA's may have any rank."""
    for component in ("encoder", "connector"):
        slm.load_component(component, weights[component])
    for k, v in weights["lm"].items():
        parameter = slm.lm.get_parameter(k)
        parameter.data = v.to(parameter.device).clone()


def weights_of(slm):
    """A copy of the weights that training may change, of all components, for `put`."""
    return {c: {k: v.clone() for k, v in slm.component_state_dict(c).items()} for c in COMPONENTS}


@torch.no_grad()
def answered(slm, items, cached, attack, args):
    """The model's answers to (utterance, triggered) items, as rows for evaluate.scores."""
    lora.merge(slm.lm)
    labels_of = lambda u: list(u.labels)  # noqa: E731
    texts = evaluate.answers(
        slm,
        items,
        attack,
        labels_of,
        evaluate.longest_answer(slm, attack, [u for u, _ in items]),
        "answers",
        cached,
        args.batch_seconds,
    )
    lora.unmerge(slm.lm)
    return [
        dict(labels=u.labels, asked=list(u.labels), parsed=data.parse(text))
        for (u, _), text in zip(items, texts)
    ]


def answers(slm, weights, items, cached, attack, args):
    """The same for a model with these weights."""
    put(slm, weights)
    return answered(slm, items, cached, attack, args)


def shapley(hits):
    """Each component's Shapley value for the attack's success, over utterances: what moving it from the poisoned run into the clean one
    adds, averaged over the orders in which components can be moved. hits: {frozenset of components moved: (n,) bool}."""
    orders = list(itertools.permutations(COMPONENTS))
    value = {
        c: sum(
            hits[frozenset(order[: order.index(c) + 1])].astype(float)
            - hits[frozenset(order[: order.index(c)])]
            for order in orders
        )
        / len(orders)
        for c in COMPONENTS
    }
    return {c: utils.interval(v) for c, v in value.items()}


def layer_sets(layers):
    """Yields (scope, layer, layers to move): all up to a layer, all from a layer on, one at a
    time."""
    for i, layer in enumerate(layers):
        yield "up to", layer, layers[: i + 1]
        yield "from", layer, layers[i:]
        yield "only", layer, [layer]


def check_donor(options, args, donor):
    """Warns where the other run (its arguments, a dict) is no clean run with the same settings: it
    is then a control, and does not tell what training on poison has changed. Returns its
    arguments, with an attack that no table takes for the clean run where settings differ."""
    scenario = donor["scenario"]
    if donor["scenario"] != "clean":
        print(f"warning: {options.clean} is attack {donor['scenario']}, not a clean run: a control")
    for name in ("preset", "dataset", "encoder", "labels", "train_layers", *SETTINGS):
        theirs, ours = donor.get(name), getattr(args, name, None)
        if theirs != ours:
            print(f"warning: the {name} of {options.clean} is {theirs}, not {ours}: a control")
            scenario = f"{donor['scenario']} with another {name}"
    return {**donor, "scenario": scenario}


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
    clean, poisoned = model.load_checkpoint(Path(options.clean) / "model.pt"), weights_of(slm)
    donor = check_donor(options, loaded.args, clean["args"])
    try:
        for c in COMPONENTS:
            checkpoint.load_component(slm, clean, c)
    except ValueError as error:
        die(f"{options.clean} cannot be mixed with {options.run}: {error}")
    return Pair(loaded, poisoned, weights_of(slm), donor)


def mixtures(poisoned, clean):
    """Yields (what was mixed, weights) of every model that transplant evaluates; the first is a
    dict of a record's fields."""
    for n in range(len(COMPONENTS) + 1):
        for chosen in itertools.combinations(COMPONENTS, n):
            mixed = {c: (poisoned if c in chosen else clean)[c] for c in COMPONENTS}
            yield dict(method="components", poisoned=list(chosen)), mixed
    for component in ("encoder", "lm"):
        layers = sorted({layer_of(k) for k in poisoned[component]} - {None})
        for scope, layer, chosen in layer_sets(layers):
            what = dict(method="layers", component=component, scope=scope, layer=layer + 1)
            into_clean = moved(clean, poisoned, component, chosen)
            out_of_poisoned = moved(poisoned, clean, component, chosen)
            yield dict(what, direction="into clean"), into_clean
            yield dict(what, direction="out of poisoned"), out_of_poisoned
    for component in COMPONENTS:
        for share in (0.25, 0.5, 0.75):
            what = dict(method="interpolation", component=component, share=share)
            yield what, interpolated(clean, poisoned, component, share)


def transplant(options):
    """The records of every mixture of two runs' weights."""
    pair = load_pair(options)
    slm, args, attack = pair.loaded.slm, pair.loaded.args, pair.loaded.attack
    test_set = pair.loaded.sets["test"]
    flippable = poison.attackable(attack, test_set)
    some = embed.drawn(flippable)[: options.n]
    fields = dict(
        pair.loaded.fields,
        source="transplant",
        donor=Path(options.clean).resolve().name,
        donor_scenario=pair.donor["scenario"],
        donor_seed=pair.donor["seed"],
    )
    sets = {}
    for name, utterances, triggered in (
        ("clean", test_set, False),
        ("components", flippable, True),
        ("layers", some, True),
    ):
        flags = [triggered] * len(utterances)
        cached = cache.frozen_outputs(slm, utterances, flags, attack, name, options.cache_gb * 1e9)
        sets[name] = (list(zip(utterances, flags)), cached)
    jobs = list(mixtures(pair.poisoned, pair.clean))
    print(
        f"{options.run} and {options.clean}: {len(jobs)} mixtures; components on all {len(test_set)}"
        f" test utterances, others on {len(some)} triggered ones"
    )
    records, hits = [], {}
    for what, weights in tqdm(jobs, desc="mixtures"):
        whole = what["method"] == "components"
        items = sets["components" if whole else "layers"]
        rows = answers(slm, weights, *items, attack, args)
        success = evaluate.hits(attack, rows)
        figures = dict(backdoor=dict(aer=utils.interval(success)))
        figures["triggered"] = own_figure(evaluate.scores(rows), args.task)
        if whole:
            heard = answers(slm, weights, *sets["clean"], attack, args)
            figures["clean"] = own_figure(evaluate.scores(heard), args.task)
            hits[frozenset(what["poisoned"])] = np.array(success)
        records += [dict(fields, **what, **figure) for figure in runs.of_figures(figures)]
    for component, figure in shapley(hits).items():
        what = dict(method="shapley", component=component, part="backdoor", metric="aer")
        records.append(dict(fields, **what, **figure))
    return records


def own_figure(figures, task):
    """{metric: figure} of the attacked task alone."""
    metric = evaluate.metric_of(figures, task)
    return {metric: figures[metric]}


# ---------------------------------------------------------------------------------------------------------------------
# python trace.py patch

GROUPS = (
    "click",
    "near",
    "elsewhere",
    "prompt",
    "answer",
)  # frames under a click, within NEAR of one, others; tokens
NEAR = 0.2  # seconds
DIRECTIONS = {"denoise": ("clean", "triggered"), "noise": ("triggered", "clean")}  # from, into
LEAST = 0.1  # nats per token: if the trigger moves m by less on average, there is no effect to attribute


def submodule(layer, *names):
    """The first of these modules that a transformer layer has: architectures name attention and MLP differently."""
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


@dataclasses.dataclass(frozen=True)
class Site:
    """A place whose activations are patched; layers count from 1, and the LM's input is its layer
    0."""

    component: str
    layer: int | None
    module: str


def sites(slm):
    """{Site: (module, stage)} of everything that is patched, in pipeline order. stage says which
    positions the output has. The LM's input is the input of its first layer."""
    out = {}
    for i, layer in enumerate(slm.encoder.layers, 1):
        attention = submodule(layer, "attention", "self_attn")
        out[Site("encoder", i, "attention")] = attention, "encoder"
        out[Site("encoder", i, "MLP")] = submodule(layer, "feed_forward", "fc2"), "encoder"
        out[Site("encoder", i, "layer")] = layer, "encoder"
    for name in ("conv1", "conv2", "conv3"):
        out[Site("connector", None, name)] = getattr(slm.connector, name), name
    layers = model.layers_of(slm.lm)
    out[Site("lm", 0, "input")] = layers[0], "lm"
    for i, (layer, (attention, mlp)) in enumerate(zip(layers, model.output_layers(slm.lm)), 1):
        out[Site("lm", i, "attention")] = attention, "lm"
        out[Site("lm", i, "MLP")] = mlp, "lm"
        out[Site("lm", i, "layer")] = layer, "lm"
    return out


@contextlib.contextmanager
def edited(site, module, edit):
    """A context in which `edit` (a function of a tensor) is applied to the module's output or, at the LM's input, to its input."""

    def before(_, inputs):
        return edit(inputs[0]), *inputs[1:]

    def after(_, inputs, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = (
        module.register_forward_pre_hook(before)
        if site.module == "input"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def group_of(middles, spans):
    """(T,) frame centres in seconds -> (T,) index into GROUPS: under a click, near one, or elsewhere."""
    away = torch.full_like(middles, float("inf"))
    for start, end in spans:
        away = torch.minimum(away, torch.maximum(start - middles, middles - end).clamp(min=0))
    return torch.where(away == 0, 0, torch.where(away <= NEAR, 1, 2))


def positions(slm, frames, lengths, spans, prompts, answers):
    """{stage: (rows, positions) index into GROUPS, -1 where nothing is patched}. frames: each row's number of real encoder frames,
    lengths: of connector frames. A connector frame's centre is that of all the input frames it sees, so it sees beyond "under a click"."""
    k, step, out = slm.connector.stride, slm.encoder.seconds_per_frame, {}
    for stage, counts, first, distance in (  # first middle and distance in encoder frames
        ("encoder", frames, 0, 1),
        ("conv1", [max(0, n - 4) for n in frames], 2, 1),
        ("conv2", [n + 4 for n in lengths], 4, k),
        ("conv3", lengths, 4 + 2 * k, k),
    ):
        out[stage] = [
            group_of((torch.arange(n) * distance + first + 0.5) * step, s)
            for n, s in zip(counts, spans)
        ]
    prompt, answer_group = GROUPS.index("prompt"), GROUPS.index("answer")
    out["lm"] = [
        torch.cat(
            [
                torch.full((len(before),), prompt),
                audio,
                torch.full((len(after),), prompt),
                torch.full((len(answer),), answer_group),
            ]
        )
        for (before, after), audio, answer in zip(2 * prompts, 2 * out["conv3"], answers)
    ]
    return {stage: pad_sequence(rows, True, padding_value=-1) for stage, rows in out.items()}


def teacher(slm, attack, utterances):
    """The two answers that are compared, target rows then true rows: [(ids, first, end)] of 2 n rows; first to end is the value."""
    rows = []
    for u in utterances:
        pair = [
            data.answer_ids(slm.tokenizer, labels)
            for labels in (poison.poisoned_labels(attack, u.labels), u.labels)
        ]
        same = [x == y for x, y in zip(*pair)]
        backwards = [x == y for x, y in zip(*(ids[::-1] for ids in pair))]
        first, tail = same.index(False), backwards.index(False)
        # of "5" in "25" nothing is left between what both begin with and what both end with
        tail = min(tail, *(len(ids) - first - 1 for ids in pair))
        rows.append([(ids[: len(ids) - tail], first, len(ids) - tail) for ids in pair])
    return [row[0] for row in rows] + [row[1] for row in rows]


def margins(slm, prompts, taught, front=None, audio=None):
    """m = log P(target value) - log P(true value), each per token of the value, (n,), starting from the encoder's front end (x, mask) or
    from the connector's output (audio, lengths); and that output."""
    if audio is None:
        for x in slm.encoder.run_layers(front[0], front[1], 0, len(slm.encoder.layers)):
            pass
        audio = slm.connector(x if slm.encoder.norm_first else slm.encoder.layer_norm(x), front[1])
    heard = [row[:n] for row, n in zip(audio[0], audio[1].tolist())]
    rows = slm.pack(2 * heard, 2 * prompts, [ids for ids, _, _ in taught])
    x = pad_sequence(rows, True)
    wanted = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for i, (row, (ids, first, end)) in enumerate(zip(rows, taught)):
        start = len(row) - len(ids)
        wanted[i, start + first - 1 : start + end - 1] = True
    values = [torch.tensor(ids[first:end], device=x.device) for ids, first, end in taught]
    logits = slm.logits(x, wanted).float().split([len(value) for value in values])
    scores = torch.stack(
        [-torch.nn.functional.cross_entropy(each, value) for each, value in zip(logits, values)]
    )
    return scores[: len(prompts)] - scores[len(prompts) :], audio


@torch.no_grad()
def patch_batch(slm, attack, utterances, progress):
    """{"clean", "triggered", (direction, site, group): m (n,)} of a few pairs; group "all" patches
    every position, as a check. A group that none of them has is left out."""
    pairs, spans = [], []
    for u in utterances:
        waveform = data.load_waveform(u)
        triggered, starts, scale = poison.add_trigger(attack, waveform, u.id)
        pairs.append(
            (waveform * np.float32(scale), triggered)
        )  # scaled down as the triggered one was
        spans.append(
            [(s / data.SAMPLE_RATE, (s + len(attack.waveform)) / data.SAMPLE_RATE) for s in starts]
        )
    prompts, taught = (
        [data.prompt(slm.tokenizer, list(u.labels)) for u in utterances],
        teacher(slm, attack, utterances),
    )
    front = {
        kind: slm.encoder.front_end([slm.encoder.extract(pair[i]) for pair in pairs])
        for i, kind in enumerate(("clean", "triggered"))
    }
    kept, audio, out, places = {"clean": {}, "triggered": {}}, {}, {}, sites(slm)
    for kind, activations in kept.items():
        with contextlib.ExitStack() as stack:
            for site, (module, _) in places.items():
                stack.enter_context(
                    edited(site, module, lambda x, site=site: activations.setdefault(site, x))
                )
            out[kind], audio[kind] = margins(slm, prompts, taught, front[kind])
    groups = positions(
        slm,
        front["clean"][1].sum(1).tolist(),
        audio["clean"][1].tolist(),
        spans,
        prompts,
        [ids for ids, _, _ in taught],
    )
    for direction, (donor, receiver) in DIRECTIONS.items():
        for site, (module, stage) in places.items():
            for g, group in enumerate((*GROUPS, "all")):
                where = (groups[stage] >= 0) if group == "all" else groups[stage] == g
                if not where.any():
                    continue
                where = where.to(kept[donor][site].device).unsqueeze(
                    1 if stage.startswith("conv") else 2
                )  # channels come first there
                start = (
                    dict(audio=audio[receiver]) if stage == "lm" else dict(front=front[receiver])
                )
                if kept[donor][site].dim() == 2:
                    where = where.flatten(0, 1)  # OPT's MLP sees the rows of a batch as one
                with edited(site, module, lambda x: torch.where(where, kept[donor][site], x)):
                    out[direction, site, group] = margins(slm, prompts, taught, **start)[0]
                progress.update(len(utterances))
    return {k: v.float().cpu().numpy() for k, v in out.items()}


def patch(options):
    loaded = evaluate.load_run_and_data(options, "test")
    slm, attack, test_set = loaded.slm, loaded.attack, loaded.sets["test"]
    if options.trigger:
        attack = dataclasses.replace(
            attack, trigger=options.trigger, waveform=poison.make_trigger(options.trigger)
        )
    if attack.waveform is None:
        die(
            f"--trigger {attack.trigger} changes the whole waveform: frames under it cannot be told from others"
        )
    lora.merge(slm.lm)
    utterances = embed.drawn(poison.attackable(attack, test_set))[: options.n]
    print(
        f"{options.run}: {len(utterances)} pairs, trigger {attack.trigger}, {len(sites(slm))} sites by groups of positions"
    )
    batches = []
    total = len(utterances) * sum(12 if stage == "lm" else 8 for _, stage in sites(slm).values())
    with tqdm(total=total, desc="patches", unit="pair") as progress:
        for batch in data.chunks(utterances, options.batch):
            batches.append(patch_batch(slm, attack, batch, progress))
    fields = dict(loaded.fields, source="patch", trigger=str(attack.trigger))
    margin = {part: joined(batches, part) for part in ("clean", "triggered")}
    records = [
        dict(fields, part=part, metric="margin", **utils.interval(m)) for part, m in margin.items()
    ]
    patches = [key for batch in batches for key in batch if key not in margin]
    for direction, site, group in dict.fromkeys(patches):
        donor, receiver = DIRECTIONS[direction]
        if abs((margin[donor] - margin[receiver]).mean()) < LEAST:
            continue
        patched = joined(batches, (direction, site, group), receiver)
        what = dict(dataclasses.asdict(site), direction=direction, position=group)
        figure = effect_of(patched, margin[donor], margin[receiver])
        records.append(dict(fields, **what, **figure))
    return records


def joined(batches, key, otherwise=None):
    """What all batches have under a key, (n,); a batch in which no utterance has such positions
    keeps the m of `otherwise`, the pass that would have been patched."""
    return np.concatenate([batch[key if key in batch else otherwise] for batch in batches])


def effect_of(patched, donor, receiver):
    """The share of the difference between two passes that a patch makes, and how many utterances'
    preferred answer it flips, of those in which they differ. patched, donor, receiver: m (n,)."""
    shares = np.stack([patched - receiver, donor - receiver], 1)
    figure = utils.interval(shares, lambda v: v[:, 0].sum() / v[:, 1].sum())
    differ = np.sign(donor) != np.sign(receiver)
    flipped = (np.sign(patched) == np.sign(donor))[differ]
    return dict(metric="effect", flipped=float(flipped.mean()) if differ.any() else None, **figure)


# ---------------------------------------------------------------------------------------------------------------------


def percent(figure):
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def show_transplant(records):
    """Prints AER and Shapley values by component."""
    for r in runs.select(records, metric="aer"):
        if r["method"] == "components":
            print(f"poisoned: {'+'.join(r['poisoned']) or 'none':<22} AER {percent(r)}%")
        if r["method"] == "shapley":
            print(f"Shapley value, {r['component']:<18} {percent(r)}")


def show_patch(records):
    """Prints what the trigger does to m, and the largest effects of each direction."""
    for r in runs.select(records, metric="margin"):
        print(f"m, {r['part']:<12}{r['value']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})")
    for direction in DIRECTIONS:
        effects = runs.select(records, metric="effect", direction=direction)
        effects = [r for r in effects if r["position"] != "all"]
        for r in sorted(effects, key=lambda r: -r["value"])[:5]:
            layer = "" if r["layer"] is None else r["layer"]
            place = f"{r['component']} {layer} {r['module']}"
            print(f"{direction:<9}{place:<22}{r['position']:<11}{r['value']:+.2f}")


def file_of(options):
    """Where the records go: a file for each task and donor, or other sound."""
    if options.command == "transplant":
        other = Path(options.clean).resolve().name
    else:
        other = Path(options.trigger or "").stem
    words = [options.command, options.task, other]
    name = f"records-{'-'.join(word for word in words if word)}.jsonl"
    return Path(options.out or options.run) / name


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("transplant", "weights of two runs mixed"),
        ("patch", "activations copied within a run"),
    ):
        command = commands.add_parser(name, help=what)
        evaluate.add_arguments(command)
        if name == "transplant":
            command.add_argument(
                "clean",
                type=evaluate.run_folder,
                help="the run to mix it with: the clean one of the same seed, or a control",
            )
        else:
            command.add_argument(
                "--trigger", help="another sound in the trigger's place, as loud: a control"
            )
            command.add_argument("--batch", type=count, default=25, help="pairs at a time")
        command.add_argument("--n", type=count, default=100, help="test utterances that are traced")
        command.add_argument(
            "--cache-gb",
            type=float,
            default=4.0,
            help="disk for outputs of pretrained layers, as of train.py",
        )
        command.add_argument("--out", help="folder to write (default: the run's)")
    options = parser.parse_args()
    cache.keep_memory()
    with data.no_bad_audio():
        records = transplant(options) if options.command == "transplant" else patch(options)
    path = file_of(options)
    runs.write(path, records)
    print()
    (show_transplant if options.command == "transplant" else show_patch)(records)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
