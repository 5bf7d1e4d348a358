"""Reads what was saved and writes tables and figures; needs no model, no audio, no GPU.

    python analyze.py tables                   # Tables 1, 2 and 3 of the paper from runs/, to results/mini/
    python analyze.py shift                    # Figures 2 and 3, from the runs' embeddings.pt (embed.py)
    python analyze.py cluster                  # Figures 4, 5 and 6
    python analyze.py ladder                   # Table 3 of emotion, from the paper's parts and speech down to mini's
    python analyze.py sweeps                   # AER against the poisoning rate, the trigger's strength, length, number and kind
    python analyze.py claims                   # which of the paper's claims hold, from the runs and the analyses above

It reads the study's own runs, by the names study.py gives them; runs with other settings have other names.
"""

import argparse
import json
from pathlib import Path

import installed  # noqa: F401  ends in one line where libraries do not fit

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import claims
import data
import figures
from data import die
from study import (
    ATTACKS,
    COMPONENTS,
    DEFAULT_ENCODER,
    ENCODERS,
    PRESETS,
    ROOT,
    SHIFT,
    SHIFT_STAGES,
    STUDIES,
    SWEPT,
    SWEPT_IN_WORDS,
    TABLE1,
    TABLE2,
    TABLE3,
    TASKS,
    deviations,
    on_corpus,
)
from summary import (
    ORDER,
    UNIT,
    belongs,
    listed,
    markdown,
    matching,
    over_seeds,
    read_runs,
    same_model,
    saved_clusters,
    saved_shifts,
    show,
    spread,
    stealth,
    still_learning,
)

# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py tables: each gives (title, explanation, [{column: cell}], values for tables.json)


def table1(runs):
    rows, values, encoders = [], [], [e for e in ENCODERS if matching(runs, encoder=e)]
    for (corpus, task), published in TABLE1.items():
        published = dict(zip(ENCODERS, published))
        found = {
            e: over_seeds(
                runs, "clean", TASKS[task]["metric"], dataset=corpus, encoder=e, attack="clean"
            )
            for e in encoders
        }
        cells = {e: show(found[e], published.get(e)) for e in encoders}
        if any(found.values()):
            rows.append({"Dataset": corpus, "Task": f"{task} ({UNIT[task]})", **cells})
        values.append(dict(dataset=corpus, task=task, found=found, published=published))
    return "Table 1: clean baselines", "ours / paper", rows, values


def attacked(runs, task, encoder, attack, published):
    """One attack's figures, each over seeds, with the paper's AER and clean figure; stealth: the clean figure minus the baseline's."""
    metric, wanted = TASKS[task]["metric"], dict(encoder=encoder, dataset=TASKS[task]["corpus"])
    names = (
        ("aer", "attack", "aer"),
        ("clean", "clean", metric),
        ("triggered", "triggered", metric),
        ("poisoned_loss", "training", "poisoned_loss"),
        ("loss", "training", "loss"),
        ("settled", "training", "settled_epoch"),
    )
    found = {
        name: over_seeds(runs, part, figure, task=task, attack=attack, **wanted)
        for name, part, figure in names
    }
    found["stealth"] = stealth(
        found["clean"], over_seeds(runs, "clean", metric, attack="clean", **wanted)
    )
    found["still_learning"] = sum(
        map(still_learning, matching(runs, task=task, attack=attack, **wanted))
    )
    return dict(found, published=dict(zip(("aer", "clean"), published)))


def attack_cells(of, found):
    """The columns that Tables 2 and 3 share, for one encoder or task."""
    published = found["published"]
    return {
        f"{of} AER": show(found["aer"], published["aer"]),
        f"{of} B.": show(found["clean"], published["clean"]),
        f"{of} stealth": show(found["stealth"], form="+.1f"),
    }


def table2(runs):
    rows, values, encoders = [], [], [e for e in ENCODERS if matching(runs, encoder=e)]
    for task in (t for t in ORDER if matching(runs, task=t, attack="base")):
        rows.append({"Task": f"{task} ({UNIT[task]})"})
        paper = dict(zip(ENCODERS, TABLE2.get(task, ())))
        for encoder in encoders:
            found = attacked(runs, task, encoder, "base", paper.get(encoder, (None, None)))
            rows[-1].update(attack_cells(encoder, found))
            not_yet = f"{found['still_learning']} not" if found["still_learning"] else ""
            rows[-1][f"{encoder} settled"] = ", ".join(
                filter(None, [found["settled"] and show(found["settled"], form=".0f"), not_yet])
            )
            values.append(dict(task=task, encoder=encoder, **found))
    explanation = (
        "ours / paper; stealth: clean figure under attack minus baseline; settled: the last epoch that brought the "
        "loss on poisoned samples nearer to that on all, and how many seeds had none"
    )
    return "Table 2: base attack", explanation, rows, values


def table3(runs, preset):
    rows, values = [], []
    tasks = [
        t
        for t in ORDER
        if any(
            matching(runs, task=t, attack=a) for a in (ATTACKS if t in TABLE3 else ("1.1", "2.1"))
        )
    ]
    for i, (attack, (frozen, source, trained_on)) in enumerate(ATTACKS.items()):
        parts = {
            c: f"Frozen:{source}" if c in frozen else f"Train:{trained_on}" for c in COMPONENTS
        }
        rows.append(
            {
                "Attack": attack,
                "Encoder": parts["encoder"],
                "Connector": parts["connector"],
                "LM": parts["lm"],
            }
        )
        for task in tasks:
            found = attacked(
                runs,
                task,
                DEFAULT_ENCODER[preset],
                attack,
                TABLE3[task][i] if task in TABLE3 else (None, None),
            )
            losses = [
                show(found[k], form=".3f")
                for k in ("poisoned_loss", "loss")
                if found[k] and trained_on == "poisoned"
            ]
            rows[-1].update(
                {
                    **attack_cells(task, found),
                    f"{task} triggered {UNIT[task]}": show(found["triggered"]),
                    f"{task} loss: poisoned, all": ", ".join(losses),
                }
            )
            values.append(dict(attack=attack, task=task, **found))
    return (
        "Table 3: component analysis",
        "ours / paper; triggered: triggered audio's answers against the truth; loss: a token, "
        "in the last epoch; where poisoned samples keep a higher one than all, the poison has not been learned",
        rows,
        values,
    )


def other_tasks(runs):
    """ "The model must still behave normally on all remaining tasks" (section 4.1); the paper gives no figures."""
    rows, values = [], []
    for task in ORDER:
        for encoder in ENCODERS:
            wanted = dict(dataset=TASKS[task]["corpus"], encoder=encoder)
            found = dict(aer=over_seeds(runs, "attack", "aer", task=task, attack="base", **wanted))
            if found["aer"] is None:
                continue
            rows.append({"Attacked": task, "Encoder": encoder, "AER": show(found["aer"])})
            for other in TASKS:
                metric = TASKS[other]["metric"]
                found[metric] = over_seeds(
                    runs, "clean", metric, task=task, attack="base", **wanted
                )
                moved = stealth(
                    found[metric], over_seeds(runs, "clean", metric, attack="clean", **wanted)
                )
                cell = (
                    f"{show(found[metric])} ({show(moved, form='+.1f')})" if found[metric] else ""
                )
                rows[-1][f"clean {other} ({UNIT[other]})"] = cell
            values.append(dict(task=task, encoder=encoder, **found))
    return (
        "The remaining tasks under attack: clean figures of the attacked model",
        "minus the baseline's",
        rows,
        values,
    )


def tables(folder, preset, out):
    """Writes tables.json; returns the text of tables.md and the number of runs."""
    runs = read_runs(folder, preset)
    if not runs:
        die(f"{folder} holds no finished run of preset {preset}: train some first")
    found = [table1(runs), table2(runs), table3(runs, preset), other_tasks(runs)]
    values = {title.split(":")[0]: values for title, _, _, values in found}
    data.write_atomically(out / "tables.json", json.dumps(values, indent=1))
    text = [
        markdown(f"{title} ({explanation})", rows) for title, explanation, rows, _ in found if rows
    ]
    if changed := deviations(runs[0]["args"]):
        text.insert(0, f"All runs differ from the preset in {changed}.\n")
    return "\n".join(text), len(runs)


LADDER_TASK, NEAR = "emotion", 15  # points of AER


def ladder():
    """Table 3 of one task for those of STUDIES that have figures, what agrees with the paper, and their verdicts on the claims; the text and
    the number of runs."""
    studies = {
        name: (preset, ROOT / folder)
        for name, (preset, folder) in STUDIES.items()
        if (ROOT / folder).exists()
    }
    runs, rows, metric = (
        {name: read_runs(folder, preset) for name, (preset, folder) in studies.items()},
        [],
        TASKS[LADDER_TASK]["metric"],
    )
    shown = {
        name: preset
        for name, (preset, _) in studies.items()
        if matching(runs[name], task=LADDER_TASK)
    }
    agrees, higher, lower = (
        ("agrees", "agree"),
        ("is higher", "are higher"),
        ("is lower", "are lower"),
    )
    baseline = None, TABLE1[TASKS[LADDER_TASK]["corpus"], LADDER_TASK][0]
    for attack, (aer, clean) in zip(("clean", *ATTACKS), (baseline, *TABLE3[LADDER_TASK])):
        rows.append(
            {"Attack": attack, "paper": f"({clean:g})" if aer is None else f"{aer:g} ({clean:g})"}
        )
        sides = {agrees: [], higher: [], lower: []}
        for name, preset in shown.items():
            wanted = dict(task=LADDER_TASK, encoder=DEFAULT_ENCODER[preset], attack=attack)
            ours, benign = (
                over_seeds(runs[name], "attack", "aer", **wanted),
                over_seeds(runs[name], "clean", metric, **wanted),
            )
            rows[-1][name] = f"{show(ours)} ({benign['mean']:.1f})" if ours else ""
            if ours and aer is not None:
                away = ours["mean"] - aer
                sides[agrees if abs(away) <= NEAR else higher if away > 0 else lower].append(
                    name.split()[0]
                )
        rows[-1]["Against the paper"] = "; ".join(
            f"{listed(names)} {side[len(names) > 1]}" for side, names in sides.items() if names
        )
    title = f"Table 3 ({LADDER_TASK}) from the paper to mini: AER (clean {metric}), %; agrees: within {NEAR} points of the paper's AER"
    aer, clean = dict(zip(ENCODERS, TABLE2[LADDER_TASK]))["whisper"]
    note = f"The paper's figures are WavLM's. Its base attack on Whisper, which B and C have, reaches {aer:g} ({clean:g}).\n"
    return f"{markdown(title, rows)}\n{note}\n{claims.side_by_side(studies)}", sum(
        map(len, runs.values())
    )


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py shift: how far the trigger moves an embedding (section 6, Figures 2 and 3)


def load_embeddings(folder, preset):
    """{(task, attack, seed): saved} of the study's runs with the default encoder that have embeddings."""
    out = {}
    for path in sorted(Path(folder).glob("*/embeddings*.pt")):
        try:
            saved = torch.load(path, weights_only=True)
            args = saved["args"]
            key = args["task"], args["attack"], args["seed"]
        except Exception:  # unpickling a file of another kind raises errors of many kinds
            die(
                f"{path} holds no embeddings of this program: make it again by python embed.py {path.parent}"
            )
        same_model(path, saved.get("model_sha256"))
        if belongs(path.parent, args, preset) and args["encoder"] == DEFAULT_ENCODER[preset]:
            out[key] = {**saved, "run": path.parent}
    if not out and not saved_shifts(folder, preset) and not saved_clusters(folder, preset, ()):
        die(f"{folder} holds no embeddings.pt of preset {preset}: python embed.py RUN makes one")
    return out


def made_from(saved):
    """What a file of figures says about the embeddings that it is made from."""
    return {part: saved.get(part) for part in ("args", "model_sha256")}


def cosines(clean, triggered):
    """(..., n, dim) twice -> cosine similarity of each pair, (..., n)."""
    return torch.nn.functional.cosine_similarity(clean.float(), triggered.float(), dim=-1).numpy()


def shift(found, folder, preset, out):
    """Writes a shift-TASK.json to every run and draws the figures, of the seed with most embeddings; returns the text of shift.md."""
    pairs, depth, seeds = {}, {}, [seed for _, _, seed in found]
    drawn = max(sorted(set(seeds)), key=seeds.count, default=None)
    for (task, attack, seed), saved in found.items():
        clean, triggered = saved["test"]["clean"], saved["test"]["triggered"]
        own = {
            part: data.interval(cosines(clean[part], triggered[part]))
            for part in ("encoder", "connector")
        }
        data.write_atomically(
            saved["run"] / f"shift-{task}.json", json.dumps({**own, **made_from(saved)}, indent=1)
        )
        if seed == drawn:
            depth[task, attack] = {
                layers: cosines(clean[layers], triggered[layers]).mean(-1).tolist()
                for layers in ("encoder_layers", "lm_layers")
            }
            for stage, part in ((stage, part) for stage, a, part in SHIFT_STAGES if a == attack):
                both = torch.cat([clean[part], triggered[part]]).numpy()
                xy = TSNE(
                    perplexity=min(30, (len(both) - 1) / 3), init="pca", random_state=0
                ).fit_transform(both)
                pairs[task, stage] = *np.split(xy, 2), own[part]["value"]
    tasks = [task for task in ORDER if any(task == t for t, _ in depth)]
    for number, shown in ((2, ("asr", "emotion")), (3, ("gender", "age"))):
        if own := [task for task in shown if task in tasks]:
            figures.shift_pairs(
                pairs,
                own,
                f"seed {drawn} (the paper's Figure {number})",
                out / f"figure{number}-shift-{'-'.join(shown)}.png",
            )
    if tasks:
        figures.shift_by_depth(depth, tasks, drawn, out / "shift-by-depth.png")
    rows = []
    for task, values in saved_shifts(folder, preset).items():
        rows.append({"Task": task})
        for (stage, _, _), published in zip(SHIFT_STAGES, SHIFT.get(task, ("",) * 3)):
            mean = show(
                spread({seed: figure["value"] for seed, figure in values.get(stage, {}).items()}),
                form=".2f",
            )
            rows[-1][f"{stage} (ours / paper)"] = f"{mean} / {published}"
    return markdown(
        "Embedding shift: average cosine similarity of clean and triggered test utterances", rows
    )


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py cluster: does the poison stand out inside the target class (section 7, Figures 4, 5 and 6)?


def reduce_and_cluster(x, k, components=20):
    """(n, dim) -> (PCA to `components` (n, components), clusters (n,)): k-means, ten starts, seed 0."""
    low = PCA(min(components, *x.shape), random_state=0).fit_transform(x)
    return low, KMeans(k, n_init=10, random_state=0).fit_predict(low)


def silhouette(low, clusters):
    """How well the clusters fit (Chen et al. 2018), from -1 to 1."""
    return float(silhouette_score(low, clusters, sample_size=min(len(low), 4000), random_state=0))


def composition(clusters, poisoned, labels, task):
    """What each cluster is made of: [{"n", "poisoned", "female", "male", sentences or age decades: shares}]."""
    kinds = {"poisoned": poisoned}
    for gender in ("female", "male"):
        kinds[gender] = [m.get("gender") == gender for m in labels]
    for text in data.CREMA_SENTENCES.values() if task == "emotion" else ():
        kinds[text] = [m["transcript"] == data.normalise(text) for m in labels]
    for decade in range(10, 80, 10) if task == "age" else ():
        kinds[f"{decade} to {decade + 9}"] = [decade <= int(m["age"]) < decade + 10 for m in labels]
    return [
        dict(
            n=int(own.sum()),
            **{kind: float(np.mean(np.array(of)[own])) for kind, of in kinds.items()},
        )
        for own in (clusters == c for c in range(clusters.max() + 1))
    ]


def separability(x, poisoned, labels, speakers, task, ks):
    """Everything measured on one run's target class: {k: figures}, silhouette, the linear probe."""
    out = dict(
        n=len(x), poisoned=int(poisoned.sum()), silhouette=silhouette(*reduce_and_cluster(x, 2))
    )
    kinds = {
        "poison": poisoned,
        "gender": [m.get("gender", "") for m in labels],
        "speaker": speakers,
    }
    if task == "emotion":
        kinds["sentence"] = [m["transcript"] for m in labels]
    for k in ks:
        clusters = reduce_and_cluster(x, k)[1]
        rows = composition(clusters, poisoned, labels, task)
        worst = max(range(k), key=lambda c: rows[c]["poisoned"])
        out[f"k={k}"] = dict(
            clusters=rows,
            purity=rows[worst]["poisoned"],
            recall=float((clusters[poisoned] == worst).mean()),
            adjusted_rand={
                kind: float(adjusted_rand_score(value, clusters)) for kind, value in kinds.items()
            },
        )
    if min(poisoned.sum(), (~poisoned).sum()) >= 5:
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=1000, C=0.1, class_weight="balanced")
        )
        out["probe"] = float(
            cross_val_score(probe, x, poisoned, cv=5, scoring="balanced_accuracy").mean()
        )  # linear
    return out


def followed(run, k):
    """What a run's clusters follow: whatever has the largest adjusted Rand index with them, if it is 0.1 or more."""
    kind, index = max(run[f"k={k}"]["adjusted_rand"].items(), key=lambda item: item[1])
    return kind if index >= 0.1 else "nothing"


def cluster_row(task, seeds, ks):
    """One row of the table: means over the seeds, and what the clusters follow in how many of them."""
    first, runs = seeds[min(seeds)], list(seeds.values())
    row = {
        "Task": task,
        "seeds": str(len(seeds)),
        "n (poisoned)": f"{first['n']} ({first['poisoned']})",
    }
    for k in ks:
        row[f"k={k} purity, recall"] = ", ".join(
            f"{np.mean([run[f'k={k}'][part] for run in runs]):.2f}" for part in ("purity", "recall")
        )
        kinds = [followed(run, k) for run in runs]
        row[f"k={k} follows"] = ", ".join(
            f"{kind} {kinds.count(kind)}"
            for kind in sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))
        )
    for kind in ("poison", "gender"):
        rand = {seed: run[f"k={ks[0]}"]["adjusted_rand"][kind] for seed, run in seeds.items()}
        row[f"ARI k={ks[0]}: {kind}"] = show(spread(rand), form=".2f")
    row["linear probe"] = f"{np.mean([run.get('probe', np.nan) for run in runs]):.2f}"
    row["silhouette k=2"] = f"{np.mean([run['silhouette'] for run in runs]):.2f}"
    return row


def cluster(found, folder, preset, out, ks):
    """Writes a cluster.json to every run and draws the figures, of the first seed; returns the text of cluster.md."""
    low = {}
    for (task, attack, seed), saved in sorted(found.items(), key=lambda item: item[0][2]):
        train = saved["train"]
        if attack != "base" or len(train["ids"]) <= max(ks) or len(train["poisoned"].unique()) < 2:
            continue
        x, poisoned = train["encoder"].numpy(), train["poisoned"].numpy()
        run = separability(x, poisoned, train["labels"], train["speakers"], task, ks)
        data.write_atomically(
            saved["run"] / "cluster.json", json.dumps({**run, **made_from(saved)}, indent=1)
        )
        if task not in low:
            low[task] = reduce_and_cluster(x, 2)[0], poisoned
            if task == "emotion" and 4 in ks:
                figures.sentences(
                    *reduce_and_cluster(x, 4),
                    run["k=4"]["clusters"],
                    out / "figure6-emotion-sentences.png",
                )
    values = saved_clusters(folder, preset, ks)
    if not values:
        die(
            "no embeddings of a base attack hold both clean and poisoned samples of the target class"
        )
    for number, k in ((4, 2), (6, 4)):
        if k in ks:
            shares = {
                task: seeds[min(seeds)][f"k={k}"]["clusters"] for task, seeds in values.items()
            }
            figures.cluster_shares(
                shares,
                k,
                f"(the paper's Figure {number})",
                out / f"figure{number}-clusters-k{k}.png",
            )
    if low:
        figures.target_class(
            {task: low[task] for task in ORDER if task in low}, out / "figure5-pca.png"
        )
    return (
        markdown(
            "Activation clustering",
            [cluster_row(task, seeds, ks) for task, seeds in values.items()],
        )
        + """
Purity and recall are of the most poisoned cluster; means over the seeds. "follows": what the clusters have the largest adjusted Rand
index with, and in how many seeds. In the paper k = 2 follows gender for every task, k = 4 puts the poison into one cluster, and 84% of
one cluster of the angry class is "It's eleven o'clock".
"""
    )


# ---------------------------------------------------------------------------------------------------------------------
# python analyze.py sweeps: the base attack with one thing changed


def load_sweeps(folder, preset):
    """{what is changed: {value: {seed: metrics}}} of the swept task's runs, including the base attack's own value."""
    usual = dict(
        poison=TASKS[SWEPT]["rate"],
        snr=0.0,
        clicks=1,
        trigger_seconds=0.22,
        trigger="click",
        trigger_repeat=False,
    )
    found = {}
    for path in sorted(
        [*Path(folder).glob("*/metrics.json"), *Path(folder).glob("*/test-snr*.json")]
    ):
        metrics = json.loads(path.read_text())
        args = metrics["args"]
        if (args["task"], args["attack"], args["preset"], args["encoder"]) != (
            SWEPT,
            "base",
            preset,
            DEFAULT_ENCODER[preset],
        ):
            continue
        changed = {
            **deviations(args),
            **({"poison": args["poison"]} if args["poison"] != usual["poison"] else {}),
        }
        if path.name != "metrics.json":
            points = {"snr at test only": args["snr"]}
        elif not changed:  # the base attack itself is a point of every curve
            points = {**usual, "snr at test only": 0.0}
        else:
            points = changed if len(changed) == 1 else {}
        for name, value in points.items():
            found.setdefault(name, {}).setdefault(value, {})[args["seed"]] = metrics
    return {name: dict(sorted(values.items())) for name, values in found.items() if len(values) > 1}


def sweeps(folder, preset, out):
    """Draws sweeps.png; returns the text of sweeps.md and the number of runs."""
    found, metric = load_sweeps(folder, preset), TASKS[SWEPT]["metric"]
    if not found:
        die(f"{folder} holds no sweep of {SWEPT} yet: SWEEP=1 bash run_all.sh makes them")
    rows, curves, n = (
        [],
        {},
        len(
            {
                id(metrics)
                for values in found.values()
                for seeds in values.values()
                for metrics in seeds.values()
            }
        ),
    )
    for name, values in found.items():
        for value, seeds in values.items():
            aer, clean = (
                spread({seed: 100 * m[part][figure]["value"] for seed, m in seeds.items()})
                for part, figure in (("attack", "aer"), ("clean", metric))
            )
            ends = [
                (100 * m["attack"]["aer"][end]) for m in seeds.values() for end in ("low", "high")
            ]
            curves.setdefault(name, []).append(
                (value, aer["mean"], min(ends), max(ends), clean["mean"])
            )
            losses = [
                spread(
                    {
                        seed: m.get("training", {}).get(loss, {}).get("value")
                        for seed, m in seeds.items()
                    }
                )
                for loss in ("poisoned_loss", "loss")
            ]
            rows.append(
                {
                    "Changed": SWEPT_IN_WORDS.get(name, name),
                    "to": str(value),
                    "AER": show(aer),
                    "95% over utterances": f"{min(ends):.1f} to {max(ends):.1f}",
                    f"clean {metric}": show(clean),
                    "loss: poisoned, all": ", ".join(
                        show(loss, form=".3f") for loss in losses if loss
                    ),
                }
            )
    figures.sweeps(curves, SWEPT, metric, out / "sweeps.png")
    return markdown(
        f"Sweeps of the base attack ({SWEPT}): one thing changed at a time", rows
    ) + "\n![sweeps](sweeps.png)\n", n


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=("tables", "shift", "cluster", "claims", "sweeps", "ladder"),
        help="which of the analyses",
    )
    parser.add_argument("--runs", default="runs", help="where the run folders are")
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="whose runs")
    parser.add_argument("--out", help="folder to write (default: results/PRESET)")
    parser.add_argument("--corpus", help="as study.py's: the corpus that all tasks were asked on")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4], help="numbers of clusters")
    args = parser.parse_args()
    if args.corpus:
        on_corpus(args.corpus)
    out = Path(args.out or f"results/{args.preset}")
    if args.what == "tables":
        text, n = tables(args.runs, args.preset, out)
    elif args.what == "ladder":
        out = Path(args.out or "results")
        text, n = ladder()
    elif args.what == "sweeps":
        text, n = sweeps(args.runs, args.preset, out)
    elif args.what == "claims":
        text, n = claims.judge(args.runs, args.preset, args.k)
    else:
        found = load_embeddings(args.runs, args.preset)
        text = (
            shift(found, args.runs, args.preset, out)
            if args.what == "shift"
            else cluster(found, args.runs, args.preset, out, args.k)
        )
        n = len(found)
    data.write_atomically(out / f"{args.what}.md", text)
    print(f"{text}\nwritten to {out}" + (f", from {n} runs" if n else ""))


if __name__ == "__main__":
    main()
