"""Where a backdoor lives, answered by intervening on trained models, without training.

    python trace.py transplant runs/asr-poison0.05 runs/asr-clean      # which weights carry it
    python trace.py patch runs/emotion-poison0.075                     # where it acts within one answer

transplant moves components, layers and shares of weights between two runs and measures what the trigger still does (backdoor-critical
layers, Zhuang et al. 2023, arXiv 2308.04466; module substitution, arXiv 2412.20476). patch copies activations between the clean and the
triggered pass of one utterance (causal tracing, Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2023, arXiv 2309.16042). Both work
on any run folder and write trace-*.json and a figure beside its model.pt, or to --out.
"""

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

from utils import Parser, count  # first: from here on Ctrl-C ends in one line
import installed  # noqa: F401  ends in one line where libraries do not fit

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cache
import checkpoint
import data
import embed
import evaluate
import fast
import figures
import lora
import model
import poison
from data import die
from study import COMPONENTS, TASKS

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
    return {c: data.interval(v) for c, v in value.items()}


def layer_sets(layers):
    """{name: layers to move}: all up to a layer, all from a layer on, one at a time."""
    return {
        **{f"up to {n}": layers[: i + 1] for i, n in enumerate(layers)},
        **{f"from {n}": layers[i:] for i, n in enumerate(layers)},
        **{f"only {n}": [n] for n in layers},
    }


def load_pair(options):
    """(slm, arguments, attack, test set, poisoned weights, clean weights) of two runs that share pretrained parts."""
    slm, args, attack, test_set = evaluate.load_run_and_data(options, "test")
    clean, poisoned = model.load_checkpoint(Path(options.clean) / "model.pt"), weights_of(slm)
    try:
        for c in COMPONENTS:
            checkpoint.load_component(slm, clean, c)
    except ValueError as error:
        die(f"{options.clean} cannot be mixed with {options.run}: {error}")
    return slm, args, attack, test_set, poisoned, weights_of(slm)


def mixtures(poisoned, clean):
    """{(kind, name): weights} of every model that transplant evaluates."""
    out = {}
    for n in range(len(COMPONENTS) + 1):
        for s in itertools.combinations(COMPONENTS, n):
            out["corner", "+".join(s) or "none"] = {
                c: (poisoned if c in s else clean)[c] for c in COMPONENTS
            }
    for component in ("encoder", "lm"):
        layers = sorted({layer_of(k) for k in poisoned[component]} - {None})
        for name, chosen in layer_sets(layers).items():
            out[f"{component} into clean", name] = moved(clean, poisoned, component, chosen)
            out[f"{component} out of poisoned", name] = moved(poisoned, clean, component, chosen)
    for component in COMPONENTS:
        for share in (0.25, 0.5, 0.75):
            out[f"{component} interpolated", f"{share:g}"] = interpolated(
                clean, poisoned, component, share
            )
    return out


def transplant(options):
    slm, args, attack, test_set, poisoned, clean = load_pair(options)
    flippable = poison.attackable(attack, test_set)
    some, metric, jobs, found, hits = (
        embed.drawn(flippable)[: options.n],
        TASKS[args.task]["metric"],
        mixtures(poisoned, clean),
        {},
        {},
    )
    sets = {}
    for name, utterances, triggered in (
        ("clean", test_set, False),
        ("corner", flippable, True),
        ("layer", some, True),
    ):
        flags = [triggered] * len(utterances)
        sets[name] = (
            list(zip(utterances, flags)),
            cache.frozen_outputs(slm, utterances, flags, attack, name, options.cache_gb * 1e9),
        )
    print(
        f"{options.run} and {options.clean}: {len(jobs)} mixtures; corners on all {len(test_set)} test utterances, others on "
        f"{len(some)} triggered ones"
    )
    for (kind, name), weights in tqdm(jobs.items(), desc="mixtures"):
        rows = answers(slm, weights, *sets["corner" if kind == "corner" else "layer"], attack, args)
        figure = dict(
            aer=data.interval(evaluate.hits(attack, rows)),
            triggered=evaluate.scores(rows).get(metric),
        )
        if kind == "corner":
            figure["clean"] = evaluate.scores(
                answers(slm, weights, *sets["clean"], attack, args)
            ).get(metric)
            hits[frozenset(name.split("+")) - {"none"}] = np.array(evaluate.hits(attack, rows))
        found.setdefault(kind, {})[name] = figure
    return dict(
        run=options.run, clean=options.clean, args=vars(args), mixtures=found, shapley=shapley(hits)
    )


# ---------------------------------------------------------------------------------------------------------------------
# python trace.py patch

GROUPS = ("click", "near", "else", "prompt", "answer")
NEAR = 0.2  # seconds
LEAST = 0.1  # nats per token: if the trigger moves m by less on average, there is no effect to attribute


def submodule(layer, *names):
    """The first of these modules that a transformer layer has: architectures name attention and MLP differently."""
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def sites(slm):
    """{name: (module, stage)} of everything that is patched, in pipeline order. stage says which positions the output has. The LM's input
    is the input of its first layer."""
    out = {}
    for i, layer in enumerate(slm.encoder.layers):
        out[f"encoder {i + 1} attention"] = submodule(layer, "attention", "self_attn"), "encoder"
        out[f"encoder {i + 1} MLP"] = submodule(layer, "feed_forward", "fc2"), "encoder"
        out[f"encoder {i + 1}"] = layer, "encoder"
    for name in ("conv1", "conv2", "conv3"):
        out[f"connector {name}"] = getattr(slm.connector, name), name
    layers = model.layers_of(slm.lm)
    out["LM input"] = layers[0], "lm"
    for i, (layer, (attention, mlp)) in enumerate(zip(layers, model.output_layers(slm.lm)), 1):
        out[f"LM {i} attention"], out[f"LM {i} MLP"] = (attention, "lm"), (mlp, "lm")
        out[f"LM {i}"] = layer, "lm"
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
        if site == "LM input"
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
        first, tail = (
            same.index(False),
            [x == y for x, y in zip(*(ids[::-1] for ids in pair))].index(False),
        )
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
    """{"clean", "triggered", (direction, site, group): m (n,)} of a few pairs; group "all" patches every position, as a check."""
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
    for direction, donor, receiver in (
        ("denoise", "clean", "triggered"),
        ("noise", "triggered", "clean"),
    ):
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
    slm, args, attack, test_set = evaluate.load_run_and_data(options, "test")
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
    found = {}
    total = len(utterances) * sum(12 if stage == "lm" else 8 for _, stage in sites(slm).values())
    with tqdm(total=total, desc="patches", unit="pair") as progress:
        for batch in data.chunks(utterances, options.batch):
            for k, v in patch_batch(slm, attack, batch, progress).items():
                found.setdefault(k, []).append(v)
    found = {k: np.concatenate(v) for k, v in found.items()}
    effects = {"denoise": {}, "noise": {}}
    for (direction, site, group), m in ((k, v) for k, v in found.items() if not isinstance(k, str)):
        donor, receiver = (
            found[k]
            for k in (("clean", "triggered") if direction == "denoise" else ("triggered", "clean"))
        )
        if abs((donor - receiver).mean()) < LEAST:
            continue
        effect = data.interval(
            np.stack([m - receiver, donor - receiver], 1), lambda v: v[:, 0].sum() / v[:, 1].sum()
        )
        differ = np.sign(donor) != np.sign(receiver)
        effect["flipped"] = (
            float((np.sign(m) == np.sign(donor))[differ].mean()) if differ.any() else None
        )
        effects[direction].setdefault(site, {})[group] = effect
    return dict(
        run=options.run,
        args=vars(args),
        trigger=attack.trigger,
        groups=GROUPS,
        clean=data.interval(found["clean"]),
        triggered=data.interval(found["triggered"]),
        effects=effects,
    )


# ---------------------------------------------------------------------------------------------------------------------


def percent(figure):
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def report(result):
    """The short table at the end: corners and Shapley values, or where each direction's effect is largest."""
    if "mixtures" in result:
        rows = [
            f"{'poisoned: ' + name:<34} AER {percent(m['aer'])}%"
            for name, m in result["mixtures"]["corner"].items()
        ]
        return rows + [
            f"{'Shapley value of the ' + c:<34} {percent(v)} points"
            for c, v in result["shapley"].items()
        ]
    rows = [
        f"m {kind:<12}{result[kind]['value']:+.2f} ({result[kind]['low']:+.2f} to {result[kind]['high']:+.2f})"
        for kind in ("clean", "triggered")
    ]
    for direction, places in result["effects"].items():
        most = sorted(
            (
                (m["value"], site, g)
                for site, row in places.items()
                for g, m in row.items()
                if g != "all"
            ),
            reverse=True,
        )[:5]
        rows += [f"{direction:<9}{site:<22}{group:<8}{value:+.2f}" for value, site, group in most]
    return rows


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
    fast.keep_memory()
    with data.no_bad_audio():
        result = transplant(options) if options.command == "transplant" else patch(options)
    of = [
        options.command,
        options.task,
        Path(options.clean).name if options.command == "transplant" else options.trigger,
    ]
    path = Path(options.out or options.run) / f"trace-{'-'.join(word for word in of if word)}.json"
    data.write_atomically(path, json.dumps(result))
    (figures.hybrids if options.command == "transplant" else figures.patches)(
        result, path.with_suffix(".png")
    )
    print("\n".join(["", *report(result), f"written to {path} and {path.with_suffix('.png')}"]))


if __name__ == "__main__":
    main()
