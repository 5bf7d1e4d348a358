"""Reads what was saved and writes tables; needs no model, no audio, no GPU.

    python analyze.py tables                   # Tables 1, 2 and 3 of the paper from runs/, to results/mini/
    python analyze.py tables --preset paper --out results/paper
"""
import argparse
import json
from pathlib import Path

import data

ENCODERS = ("wavlm", "hubert", "wav2vec2", "whisper")
METRIC = {"asr": ("wer", "WER"), "gender": ("gender_accuracy", "Acc"), "emotion": ("emotion_accuracy", "Acc"),
          "age": ("age_mae", "MAE")}
ATTACKS = {  # Table 3's rows: what becomes of encoder, connector, LM
    "base": ("Train:Poisoned", "Train:Poisoned", "Train:Poisoned"),
    "1.1": ("Frozen:Clean", "Train:Poisoned", "Train:Poisoned"),
    "1.2": ("Train:Poisoned", "Frozen:Clean", "Train:Poisoned"),
    "1.3": ("Train:Poisoned", "Train:Poisoned", "Frozen:Clean"),
    "2.1": ("Train:Poisoned", "Frozen:Clean", "Frozen:Clean"),
    "2.2": ("Frozen:Clean", "Train:Poisoned", "Frozen:Clean"),
    "2.3": ("Frozen:Clean", "Frozen:Clean", "Train:Poisoned"),
    "3.1": ("Frozen:Attack_0", "Train:Clean", "Train:Clean"),
    "3.2": ("Train:Clean", "Frozen:Attack_0", "Train:Clean"),
    "3.3": ("Train:Clean", "Train:Clean", "Frozen:Attack_0")}
# the paper's figures, in its own units: percent, age in years
TABLE1 = {("libri", "asr"): (2.5, 2.8, 3.1, 5.5), ("libri", "gender"): (98.7, 96.8, 99.9, 95.8),
          ("crema", "asr"): (1.1, 0.7, 0.2, 1.6), ("crema", "gender"): (98.8, 99.3, 98.2, 93.41),
          ("crema", "emotion"): (61.2, 57.7, 44.6, 61.5), ("crema", "age"): (9.3, 7.5, 10.3, 6.0),
          ("vox", "gender"): (98.1, 94.9, 98.1, 97.6), ("vox", "age"): (5.2, 6.0, 6.9, 6.0)}
TABLE2 = {"asr": ((99.2, 2.1), (90.8, 2.0), (93.9, 2.1), (93.4, 4.4)),
          "emotion": ((93.7, 64.2), (97.9, 51.2), (74.1, 46.7), (99.4, 70.4)),
          "gender": ((94.4, 94.0), (88.9, 96.8), (75.4, 98.3), (96.3, 97.8)),
          "age": ((94.2, 5.2), (84.8, 5.8), (51.8, 7.6), (90.1, 4.1))}
TABLE3 = {"asr": dict(zip(ATTACKS, ((99.2, 2.1), (91.0, 1.6), (98.7, 1.6), (97.2, 2.2), (95.9, 2.4), (59.0, 2.2),
                                    (0.0, 1.1), (0.0, 1.8), (0.0, 2.9), (0.0, 2.5)))),
          "emotion": dict(zip(ATTACKS, ((93.7, 64.2), (91.0, 70.6), (96.3, 46.4), (84.0, 50.5), (90.1, 62.2),
                                        (85.3, 56.5), (57.1, 56.8), (63.5, 67.4), (19.1, 69.2), (17.2, 53.1))))}


def read_runs(folder, preset):
    """Finished runs: [(arguments, metrics)]."""
    out = []
    for path in sorted(Path(folder).glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        if metrics["args"].get("preset") == preset:
            out.append((metrics["args"], metrics))
    return out


def figure(metrics, part, name):
    """A figure in the paper's units (percent, years), or None."""
    value = metrics[part].get(name, {}).get("value")
    return None if value is None else value if name == "age_mae" else 100 * value


def over_seeds(runs, part, name, **wanted):
    """{"mean", "low", "high", "seeds"} of a figure over the runs whose arguments are as wanted, or None without one."""
    values = {args["seed"]: figure(metrics, part, name) for args, metrics in runs
              if all(args.get(k) == v for k, v in wanted.items())}
    values = {seed: v for seed, v in values.items() if v is not None}
    if not values:
        return None
    return dict(mean=sum(values.values()) / len(values), low=min(values.values()), high=max(values.values()),
                seeds=sorted(values))


def show(found, published=None, sign=""):
    """One cell: mean, range over several seeds, the paper's figure behind it."""
    text = "missing" if found is None else f"{found['mean']:{sign}.1f}" + (
        f" ({found['low']:.1f} to {found['high']:.1f})" if len(found["seeds"]) > 1 else "")
    return text + ("" if published is None else f" / {published:g}")


def stealth(attacked, baseline):
    """Clean figure under attack minus the baseline's."""
    if attacked is None or baseline is None:
        return None
    return dict(mean=attacked["mean"] - baseline["mean"], seeds=[0])


def tables(runs):
    """The three tables: {title: (header, rows of cells, rows of values)}."""
    out = {}
    header, cells, values = ["Dataset", "Task", *ENCODERS], [], []
    for (corpus, task), published in TABLE1.items():
        found = [over_seeds(runs, "clean", METRIC[task][0], dataset=corpus, encoder=e, attack="clean") for e in ENCODERS]
        cells.append([corpus, f"{task} ({METRIC[task][1]})", *map(show, found, published)])
        values.append(dict(dataset=corpus, task=task, found=dict(zip(ENCODERS, found)),
                           published=dict(zip(ENCODERS, published))))
    out["Table 1: clean baselines (ours / paper)"] = header, cells, values

    header = ["Task", *(f"{e} {what}" for e in ENCODERS for what in ("AER", "B.", "stealth"))]
    cells, values = [], []
    for task, published in TABLE2.items():
        corpus, metric = data.TASK_CORPUS[task], METRIC[task][0]
        row = [f"{task} ({METRIC[task][1]})"]
        for encoder, (paper_aer, paper_clean) in zip(ENCODERS, published):
            wanted = dict(dataset=corpus, encoder=encoder)
            aer = over_seeds(runs, "attack", "aer", task=task, attack="base", **wanted)
            clean = over_seeds(runs, "clean", metric, task=task, attack="base", **wanted)
            moved = stealth(clean, over_seeds(runs, "clean", metric, attack="clean", **wanted))
            row += [show(aer, paper_aer), show(clean, paper_clean), show(moved, sign="+")]
            values.append(dict(task=task, encoder=encoder, aer=aer, clean=clean, stealth=moved,
                               published=dict(aer=paper_aer, clean=paper_clean)))
        cells.append(row)
    out["Table 2: base attack (ours / paper; stealth: clean figure under attack minus baseline)"] = header, cells, values

    tasks = [t for t in TABLE2 if t in TABLE3 or any(a["task"] == t and a["attack"] in ("1.1", "2.1") for a, _ in runs)]
    header = ["Attack", "Encoder", "Connector", "LM", *(f"{t} {what}" for t in tasks for what in ("AER", "B.", "stealth"))]
    cells, values = [], []
    for attack, states in ATTACKS.items():
        row = [attack, *states]
        for task in tasks:
            wanted = dict(task=task, attack=attack, encoder="wavlm", dataset=data.TASK_CORPUS[task])
            paper = TABLE3.get(task, {}).get(attack, (None, None))
            aer, clean = over_seeds(runs, "attack", "aer", **wanted), over_seeds(runs, "clean", METRIC[task][0], **wanted)
            baseline = over_seeds(runs, "clean", METRIC[task][0], attack="clean", encoder="wavlm", dataset=wanted["dataset"])
            moved = stealth(clean, baseline)
            row += [show(aer, paper[0]), show(clean, paper[1]), show(moved, sign="+")]
            values.append(dict(attack=attack, task=task, aer=aer, clean=clean, stealth=moved,
                               published=dict(aer=paper[0], clean=paper[1])))
        cells.append(row)
    out["Table 3: component analysis (ours / paper)"] = header, cells, values
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tables",))
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--out", default=None, help="default: results/PRESET")
    args = parser.parse_args()
    runs = read_runs(args.runs, args.preset)
    if not runs:
        data.die(f"{args.runs} holds no finished run of preset {args.preset}: train some first")
    out = Path(args.out or f"results/{args.preset}")
    text, values = [], {}
    for title, (header, cells, rows) in tables(runs).items():
        text += [f"## {title}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in cells] + [""]
        values[title.split(":")[0]] = rows
    data.write_atomically(out / "tables.md", "\n".join(text))
    data.write_atomically(out / "tables.json", json.dumps(values, indent=1))
    print("\n".join(text) + f"\nwritten to {out}/tables.md and tables.json, from {len(runs)} runs")


if __name__ == "__main__":
    main()
