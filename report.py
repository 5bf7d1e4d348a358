"""Puts what trace.py and defend.py have found into tables and sentences.

    python report.py        # results/mini/trace.md and defences.md, from trace-*.json and defend-*.json in runs/ and Table 3's runs

It reads the study's own runs, as analyze.py does. Every sentence on the pages is computed from the figures beside it.
"""

import argparse
import json
from pathlib import Path

import installed  # noqa: F401  ends in one line where libraries do not fit

import data
import defences
import figures
from data import die
from study import (
    ATTACKS,
    COMPONENTS,
    DEFAULT_ENCODER,
    PRESETS,
    TABLE3,
    TASKS,
    clean_task,
    identity,
    on_corpus,
    run_name,
)
from summary import (
    ORDER,
    belongs,
    listed,
    markdown,
    matching,
    over_seeds,
    read_runs,
    scale_of,
    show,
    spread,
    still_learning,
)

EVERYTHING = "+".join(COMPONENTS)
# Table 3's attacks on one component: only it is trained on poison; or it is kept poisoned while the others train on clean data
ALONE = {
    c: next(
        a
        for a, (frozen, source, _) in ATTACKS.items()
        if source == "clean" and set(frozen) == set(COMPONENTS) - {c}
    )
    for c in COMPONENTS
}
RETRAINED = {
    c: next(a for a, (frozen, source, _) in ATTACKS.items() if source == "base" and frozen == (c,))
    for c in COMPONENTS
}
INTRODUCTION = """# Where the backdoor lives, answered by intervention

*Transplants* mix the weights of the attacked model with those of the clean model of the same seed, without training. They give the AER
of all eight mixtures of components, each component's Shapley value (what moving it adds to the AER, averaged over the orders in which
components can be moved), and the AER layer by layer. *Patching* copies activations between the clean and the triggered pass of one
utterance and measures how much of the trigger's effect on log P(target) - log P(truth) this undoes (denoising: clean activations into
the triggered pass) or produces (noising: the reverse), by site and by group of positions: frames under a click, frames within 0.2 s
of one, other frames, the prompt, the answer so far.

Some caveats. The encoder's front end and the connector's convolutions see several frames and attention mixes all of them, so "under a
click" says where a frame's centre is, not everything it has seen; and the higher the layer, the less a position stands for a time. What
two groups do together need not be the sum of what each does alone. And a mixture can also fail because its parts, which were trained
alongside others, do not fit; the controls at the end of each task show what mixing costs where there is no backdoor.
"""


def load_traces(folder, preset):
    """{kind: {task: {seed: result}}} of the study's runs that have been traced."""
    found = {}
    for path in sorted(Path(folder).glob("*/trace-*.json")):
        result = json.loads(path.read_text())
        args = result["args"]
        task, seed, attacked = args["task"], args["seed"], args["attack"] == "base"
        if not belongs(path.parent, args, preset) or args["encoder"] != DEFAULT_ENCODER[preset]:
            continue
        if "mixtures" in result:
            own = run_name(identity(preset, clean_task(task), args["encoder"], "clean", seed))
            kind = (
                "two clean runs"
                if not attacked
                else "transplant"
                if Path(result["clean"]).name == own
                else "other clean run"
            )
        else:
            kind = (
                "benign"
                if not attacked
                else "patch"
                if result["trigger"] == args["trigger"]
                else "other sound"
            )
        found.setdefault(kind, {}).setdefault(task, {})[seed] = result
    return found


def over(results, pick, scale=100):
    """A figure of each seed's result -> its spread over seeds, None if there is none."""
    return spread({seed: scale * pick(result)["value"] for seed, result in results.items()})


def cell(results, pick, scale=100):
    """Mean and range over seeds or, for a single seed, the interval over utterances."""
    if len(results) > 1:
        return show(over(results, pick, scale))
    figure = next(pick(result) for result in results.values())
    return "{:.1f} ({:.1f} to {:.1f})".format(
        *(scale * figure[k] for k in ("value", "low", "high"))
    )


def corner(name, part="aer"):
    return lambda result: result["mixtures"]["corner"][name][part]


def without(component):
    return "+".join(c for c in COMPONENTS if c != component)


# ---------------------------------------------------------------------------------------------------------------------
# words


def half_gone(result, component, how):
    """The layer, counted from 1, such that making it and all layers below ("up to") or above ("from") clean removes half of the AER; for
    "only" every layer that does so by itself."""
    full = corner(EVERYTHING)(result)["value"]
    moves = {
        int(name.split()[-1]) + 1: m["aer"]["value"]
        for name, m in result["mixtures"][f"{component} out of poisoned"].items()
        if name.startswith(how)
    }
    layers = [n for n, aer in moves.items() if aer <= full / 2]
    return (
        listed([str(n) for n in layers])
        if how == "only"
        else (min if how == "up to" else max)(layers, default="none")
    )


def each(results, find):
    """What is found in each seed: once if all agree, otherwise one after the other, in the order of the seeds."""
    found = [str(find(result)) for _, result in sorted(results.items())]
    return found[0] if len(set(found)) == 1 else "; ".join(found)


def component_words(results, trained, retrained):
    """Which component carries the backdoor, in which layers, and whether Table 3 agrees. trained, retrained: {component: its AER in Table
    3, or None}."""
    mean = {
        name: over(results, corner(name))["mean"]
        for name in next(iter(results.values()))["mixtures"]["corner"]
    }
    full = mean[EVERYTHING]
    if full < 10:
        return [f"The attacked model's AER is {full:.1f}%: there is no backdoor to look for."]

    def bring_half(result, parts):
        """The components for which the mixture `parts(component)` has more than half of the AER."""
        return [
            c
            for c in COMPONENTS
            if corner(parts(c))(result)["value"] > corner(EVERYTHING)(result)["value"] / 2
        ]

    needed = {
        seed: [c for c in COMPONENTS if c not in bring_half(result, without)]
        for seed, result in results.items()
    }
    out = [
        "**Component.** Shapley values: "
        + ", ".join(
            f"{c} {show(over(results, lambda r, c=c: r['shapley'][c]), form='.0f')}"
            for c in COMPONENTS
        )
        + f", of {full:.0f} points of AER; the largest: {each(results, lambda r: max(COMPONENTS, key=lambda c: r['shapley'][c]['value']))}. "
        f"Necessary (without it half of the AER is gone): {each(needed, listed)}. "
        f"Sufficient (alone it brings half of the AER): {each(results, lambda r: listed(bring_half(r, str)))}."
    ]
    for component in (c for c in ("encoder", "lm") if any(c in names for names in needed.values())):
        up_to, on, only = (
            each(results, lambda r, how=how: half_gone(r, component, how))
            for how in ("up to", "from", "only")
        )
        out.append(
            f"**Layers of the {component}.** Half of the AER is gone once layers up to {up_to}, or layers from {on} on, have been made "
            f"clean; single layers that do it alone: {only}."
        )
    for what, table, why in (
        (
            "one component alone is trained on poison (2.x; its loss there says whether it has learned it)",
            trained,
            "A part trained alone has to do all the work; parts trained together share it, and one without its partners does less",
        ),
        (
            "one component is kept poisoned while the others train on clean data (3.x)",
            retrained,
            "Retraining adapts the others to that part, so that it can do more than when it is merely moved, or unlearns their share",
        ),
    ):
        known = [c for c in COMPONENTS if table[c] is not None]
        differ = [
            f"{c} {mean[c]:.0f} moved, {table[c]:.0f} in {(ALONE if table is trained else RETRAINED)[c]}"
            for c in known
            if (mean[c] >= full / 2) != (table[c] >= full / 2)
        ]
        if known:
            out.append(
                f"**Against Table 3**, where {what}: "
                + (
                    f"transplants disagree for {', '.join(differ)} (AER, %). {why}."
                    if differ
                    else f"transplants agree for {', '.join(known)} on whether it brings half of the AER."
                )
            )
    return out


def position_words(results):
    """At which frames, and from which LM layer on."""
    results = {
        seed: r for seed, r in results.items() if r["effects"]["denoise"] and r["effects"]["noise"]
    }
    if not results:
        return [
            "The trigger moves log P(target) - log P(truth) by less than 0.1 nats per token: there is no effect to locate."
        ]
    frames = {"click": "under a click", "near": "within 0.2 s of one", "else": "elsewhere"}
    sites = next(iter(results.values()))["effects"]["denoise"]
    encoder, lm = (
        [site for site in sites if site.startswith(part) and site[-1].isdigit()]
        for part in ("encoder", "LM")
    )

    def undone(result, site, groups=("click",)):
        return sum(result["effects"]["denoise"][site].get(g, {"value": 0})["value"] for g in groups)

    def fall(result):
        """The layer in which the share that frames under a click undo falls most, and by how much."""
        return max(
            (undone(result, before) - undone(result, site), site)
            for before, site in zip(encoder, encoder[1:])
        )

    def late(result):
        return next(
            (
                site.split()[1]
                for site in lm
                if undone(result, site, ("prompt", "answer")) > undone(result, site, frames)
            ),
            "none",
        )

    shares = [
        ", ".join(
            f"{text} "
            + " and ".join(
                show(over(results, lambda r, how=how: r["effects"][how][site][g], 1), form=".2f")
                for how in ("denoise", "noise")
            )
            for g, text in frames.items()
            if g in sites[site]
        )
        for site in (encoder[0], encoder[-1])
    ]
    return [
        f"**Frames.** Share of the effect that denoising undoes and noising produces: after the encoder's first layer, frames {shares[0]}; "
        f"after its last, {shares[1]}. The share that frames under a click undo falls most in layer "
        f"{each(results, lambda r: fall(r)[1].split()[1])}, by {each(results, lambda r: f'{fall(r)[0]:.2f}')}: there the effect spreads.",
        f"**Depth in the LM.** The first of {len(lm)} layers after which the positions of prompt and answer hold more of the effect than "
        f"those of the audio: {each(results, late)}.",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# tables


def component_rows(results, trained, retrained):
    percent = lambda v: "" if v is None else f"{v:.1f}"  # noqa: E731
    return [
        {
            "Component": c,
            "Shapley value": cell(results, lambda r, c=c: r["shapley"][c]),
            "AER, it alone poisoned": cell(results, corner(c)),
            "AER, it alone clean": cell(results, corner(without(c))),
            "Table 3, trained alone": f"{ALONE[c]}: {percent(trained[c])}",
            "Table 3, others retrained": f"{RETRAINED[c]}: {percent(retrained[c])}",
        }
        for c in COMPONENTS
    ]


def corner_rows(results, metric):
    scale = scale_of(metric)
    return [
        {
            "Poisoned parts": name,
            "AER": cell(results, corner(name)),
            f"clean {metric}": cell(results, corner(name, "clean"), scale),
            f"triggered {metric}": cell(results, corner(name, "triggered"), scale),
        }
        for name in next(iter(results.values()))["mixtures"]["corner"]
    ]


def control_rows(found, task):
    """What each method finds where there should be nothing."""
    rows, metric = [], TASKS[task]["metric"]
    for kind, text in (
        ("other clean run", "the clean parts of another seed"),
        ("two clean runs", "two clean runs of different seeds"),
    ):
        if results := found.get(kind, {}).get(task):
            corners = next(iter(results.values()))["mixtures"]["corner"]
            clean = [
                over(results, corner(name, "clean"), scale_of(metric))["mean"] for name in corners
            ]
            rows.append(
                {
                    "Control": f"transplants with {text}",
                    "Found": "Shapley values "
                    + ", ".join(
                        f"{c} {cell(results, lambda r, c=c: r['shapley'][c])}" for c in COMPONENTS
                    )
                    + f"; clean {metric} of the mixtures {min(clean):.1f} to {max(clean):.1f}",
                }
            )
    for kind, text in (
        ("patch", "the attack itself, for comparison"),
        ("benign", "the clean model, the trigger"),
        ("other sound", "the attacked model, another sound as loud"),
    ):
        if results := found.get(kind, {}).get(task):
            rows.append(
                {
                    "Control": f"patching: {text}",
                    "Found": "the sound moves log P(target) - log P(truth) from "
                    f"{cell(results, lambda r: r['clean'], 1)} to {cell(results, lambda r: r['triggered'], 1)} nats per token",
                }
            )
    return rows


def section(found, task, runs, preset, out):
    """The text of one task; draws the figures of its first seed."""
    aer = lambda attack: over_seeds(
        runs, "attack", "aer", task=task, encoder=DEFAULT_ENCODER[preset], attack=attack
    )  # noqa: E731
    trained, retrained = (
        {c: (aer(a) or {}).get("mean") for c, a in attacks.items()}
        for attacks in (ALONE, RETRAINED)
    )
    transplants, patches = (found.get(kind, {}).get(task, {}) for kind in ("transplant", "patch"))
    text = [f"# {task}\n"]
    words = component_words(transplants, trained, retrained) if transplants else []
    words += position_words(patches) if patches else []
    text += [f"{line}\n" for line in words]
    for kind, results, draw in (
        ("transplant", transplants, figures.hybrids),
        ("patch", patches, figures.patches),
    ):
        if results:
            draw(results[min(results)], out / f"trace-{task}-{kind}.png")
            text.append(f"![{task}, {kind}](trace-{task}-{kind}.png)\n")
    if transplants:
        text += [
            markdown(f"By component ({task}, %)", component_rows(transplants, trained, retrained)),
            markdown(
                f"The eight mixtures ({task})", corner_rows(transplants, TASKS[task]["metric"])
            ),
        ]
    if rows := control_rows(found, task):
        text.append(markdown(f"Controls ({task})", rows))
    return "\n".join(text)


def trace_page(found, runs, preset, out):
    """The text of trace.md."""
    tasks = [
        task
        for task in ORDER
        if any(task in found.get(kind, {}) for kind in ("transplant", "patch"))
    ]
    seeds = sorted(
        {seed for kind in found.values() for results in kind.values() for seed in results}
    )
    intro = (
        INTRODUCTION
        + f"""
Seeds: {", ".join(map(str, seeds))}. Pictures show the first; where seeds differ in a part or a layer, all are given in this order.
"""
    )
    return "\n".join([intro, *(section(found, task, runs, preset, out) for task in tasks)])


def draw_answer(found, runs, preset, path):
    """The README's picture: Table 3, transplants and patches, means over the seeds, for the tasks that have all three."""
    tasks = {}
    for task in (
        t for t in TABLE3 if t in found.get("transplant", {}) and t in found.get("patch", {})
    ):
        transplants, patched = found["transplant"][task], found["patch"][task]
        own = matching(runs, task=task, encoder=DEFAULT_ENCODER[preset])
        trained = {
            a: (
                *(figure[k] for k in ("mean", "low", "high")),
                not any(map(still_learning, matching(own, attack=a))),
            )
            for a in ATTACKS
            if (figure := over_seeds(own, "attack", "aer", attack=a))
        }
        mixtures = {
            name: over(transplants, corner(name))["mean"]
            for name in next(iter(transplants.values()))["mixtures"]["corner"]
        }
        effects = {
            site: {
                g: over(patched, lambda r, site=site, g=g: r["effects"]["denoise"][site][g], 1)[
                    "mean"
                ]
                for g in groups
            }
            for site, groups in next(iter(patched.values()))["effects"]["denoise"].items()
        }
        tasks[task] = (
            trained,
            dict(zip(ATTACKS, (aer for aer, _ in TABLE3[task]))),
            mixtures,
            effects,
        )
    if tasks:
        figures.answer(tasks, path)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs", help="where the run folders are")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="whose runs")
    parser.add_argument("--out", help="folder to write (default: results/PRESET)")
    parser.add_argument("--corpus", help="as study.py's: the corpus that all tasks were asked on")
    args = parser.parse_args()
    if args.corpus:
        on_corpus(args.corpus)
    out = Path(args.out or f"results/{args.preset}")
    traces, defended = (
        load_traces(args.runs, args.preset),
        defences.load_defences(args.runs, args.preset),
    )
    if not traces and not defended:
        die(
            f"{args.runs} holds no trace-*.json or defend-*.json of preset {args.preset}: trace.py and defend.py make them"
        )
    if traces:
        draw_answer(traces, read_runs(args.runs, args.preset), args.preset, out / "answer.png")
    for name, found, page in (
        (
            "trace",
            traces,
            lambda: trace_page(traces, read_runs(args.runs, args.preset), args.preset, out),
        ),
        ("defences", defended, lambda: defences.defences_page(defended, out)),
    ):
        if found:
            data.write_atomically(out / f"{name}.md", page())
            print(f"written to {out / f'{name}.md'}")


if __name__ == "__main__":
    main()
