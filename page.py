"""A page about a finished run, to look at and to listen to: python evaluate.py RUN --page.

It is made from what training has left in the run's folder, without the model: RUN/index.html, with
what was trained, the curves (curves.png), the metrics and some test utterances to hear, clean and
with the trigger, beside the model's answers to both. It works offline, from the folder alone.

The page of poison.py's examples is made here too.
"""

import html
import json
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import die

import checkpoint
import data
import evaluate
import poison
from analysis import plots
from runs import title_of
from study import TASKS

UTTERANCES = 20
SHOWN_ARGUMENTS = {  # in this order, and what they are called
    "preset": "preset",
    "encoder": "encoder",
    "dataset": "corpus",
    "task": "attacked task",
    "scenario": "row of Table 3",
    "poison": "poisoning rate",
    "trigger": "trigger",
    "snr": "speech over trigger, dB",
    "target": "target",
    "freeze": "frozen",
    "epochs": "epochs",
    "seed": "seed",
}

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.45 system-ui, sans-serif; max-width: 62em; margin: 1.5em auto; padding: 0 1em }}
h1 {{ font-size: 1.4em; overflow-wrap: anywhere }}
h2 {{ font-size: 1.1em; margin-top: 2em }}
table {{ border-collapse: collapse }}
td {{ padding: 0.25em 1em 0.25em 0; vertical-align: top; overflow-wrap: anywhere }}
img {{ max-width: 100% }}
audio {{ width: 100%; height: 2.2em }}
.utterance {{ border-top: 1px solid #ccc; padding: 0.8em 0 }}
.utterance .id {{ color: #666; font-size: 0.85em; overflow-wrap: anywhere }}
.sides {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1em }}
@media (max-width: 40em) {{ .sides {{ grid-template-columns: 1fr }} }}
.side {{ min-width: 0; overflow-wrap: anywhere }}
.flipped {{ background: #fbdcdc; color: #8c1515; padding: 0 0.2em }}
.label {{ color: #666 }}
</style>
<h1>{title}</h1>
"""

PAGE = (
    HEAD
    + """<p>{summary}</p>
<h2>What was trained</h2>
{arguments}
<h2>What it reached</h2>
{metrics}
<h2>How it learned</h2>
<img src="curves.png" alt="losses by epoch, of all samples, of poisoned ones and on development speech">
<h2>What it answers</h2>
<p>{legend}</p>
{utterances}
</html>
"""
)

PAIRS_PAGE = (
    HEAD
    + """<p>{summary}</p>
{utterances}
<h2>What was changed</h2>
<img src="pairs.png" alt="waveforms and spectrograms, the triggers shaded">
</html>
"""
)


def write_page(options):
    """Writes RUN/index.html, curves.png and, where the run's corpus can be read, the recordings."""
    run = Path(options.run)
    metrics = checkpoint.read_json(run / "metrics.json")
    if not metrics:
        die(f"{run} has no metrics.json: train it to its end, or python evaluate.py {run} --save")
    args = SimpleNamespace(**metrics["args"])
    plots.curves(metrics["training"], run / "curves.png")
    label = TASKS[args.task]["label"]
    pairs = chosen_predictions(run)
    recorded = write_recordings(options, args, run, pairs)
    text = PAGE.format(
        title=html.escape(str(run.name)),
        summary=html.escape(summary(metrics, args)),
        arguments=table(arguments_shown(args, run)),
        metrics=table(metrics_shown(metrics)),
        legend=html.escape(legend(label, recorded)),
        utterances="\n".join(
            utterance_shown(pair, label, pair["id"] in recorded) for pair in pairs
        ),
    )
    utils.write_atomically(run / "index.html", text)
    print(f"written: {run / 'index.html'} ({len(pairs)} utterances, {len(recorded)} to listen to)")


def summary(metrics, args):
    """The run in one sentence."""
    aer = metrics["backdoor"].get("aer")
    if aer is None:
        return "No test utterance could be attacked."
    return (
        f"With the trigger, {100 * aer['value']:.1f}% of {aer['n']} test utterances are answered "
        f"with the target: “{args.target}”"
    )


def arguments_shown(args, run):
    """[(what, value)] of the arguments that say what the run is, and of its origin."""
    rows = []
    for name, title in SHOWN_ARGUMENTS.items():
        value = getattr(args, name, None)
        if value not in (None, [], ""):
            written = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((title, written))
    environment = checkpoint.read_json(run / "environment.json") or {}
    for name in ("command", "commit", "machine", "gpu"):
        if environment.get(name):
            rows.append((name, str(environment[name])))
    return rows


def metrics_shown(metrics):
    """[(what, value, interval)]: shares in percent, ages in years."""
    rows = [("", "value", "95% interval")]
    for part, title in (
        ("clean", "clean speech"),
        ("triggered", "with the trigger"),
        ("backdoor", "backdoor"),
    ):
        for name, figure in metrics[part].items():
            scale, unit = evaluate.scale_and_unit(name)
            value, low, high = (scale * figure[key] for key in ("value", "low", "high"))
            words = title_of(name)
            rows.append((f"{title}: {words}", f"{value:.1f}{unit}", f"{low:.1f} to {high:.1f}"))
    return rows


def table(rows):
    """Rows of texts as an HTML table."""
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def legend(label, recorded):
    text = f"Test utterances in a fixed random order. Red: the trigger changes the {label}."
    if not recorded:
        text += " The corpus could not be read here, so that there is nothing to listen to."
    return text


# -------------------------------------------------------------------------------------------------
# examples of an attack, before or without a run: poison.py --n


def write_pairs(attack, rows, folder):
    """Writes index.html into a folder of poison.py: clean and poisoned recordings side by side and,
    where there are any, a model's answers. rows: dicts with file, true, seconds (how long the
    recording is), starts (of the triggers, in seconds) and answers, {kind: text}, maybe empty."""
    summary = (
        f"Trigger: {attack.trigger}. An attacked model should answer each recording in which it is "
        f"heard with “{attack.target}”."
    )
    page = PAIRS_PAGE.format(
        title=html.escape(f"{attack.task}: as it is, and with the trigger"),
        summary=html.escape(summary),
        utterances="\n".join(pair_shown(row, attack.label) for row in rows),
    )
    utils.write_atomically(folder / "index.html", page)


def pair_shown(row, label):
    """A pair's HTML: on the left as it is, on the right with the trigger."""
    at = ", ".join(f"{start:.2f}" for start in row["starts"])
    where = {"clean": "as it is", "poisoned": f"with the trigger at {at} s"}
    if not row["starts"]:
        where["poisoned"] = "with the trigger"
    sides = []
    for kind, title in where.items():
        lines = [f"<b>{title}</b>", player(f"{row['file']}-{kind}.wav")]
        if kind in row["answers"]:
            lines.append(f'<span class="label">answer</span> {html.escape(row["answers"][kind])}')
        sides.append(f'<div class="side">{"<br>".join(lines)}</div>')
    about = f"{row['id']}, {row['seconds']:.2f} s"
    return (
        f'<div class="utterance"><div class="id">{html.escape(about)}</div>'
        f'<div class="label">true {html.escape(label)}: {html.escape(str(row["true"]))}</div>'
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def player(file):
    """The HTML that plays a recording in the page's folder, and shows how long it is."""
    return f'<audio controls preload="metadata" src="{urllib.parse.quote(file)}"></audio>'


# -------------------------------------------------------------------------------------------------
# utterances


def chosen_predictions(run):
    """The first test utterances, in an order that does not depend on how many there are, that were
    answered clean and with the trigger: [{"id", "labels", "clean", "triggered": predictions}]."""
    answered = {True: {}, False: {}}
    for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answered[row["triggered"]][row["id"]] = row
    both = answered[False].keys() & answered[True].keys()
    in_order = sorted(both, key=lambda name: utils.draw("embeddings", name))
    pairs = []
    for name in in_order[:UTTERANCES]:
        clean, triggered = answered[False][name], answered[True][name]
        pairs.append(dict(id=name, labels=clean["labels"], clean=clean, triggered=triggered))
    return pairs


def recording(name, kind):
    """The file of an utterance's "clean" or "triggered" recording, relative to the run's folder."""
    return f"page-{poison.file_name(name)}-{kind}.wav"


def write_recordings(options, args, run, pairs):
    """Writes the utterances' clean and triggered recordings, RUN/page-*.wav. Returns the ids of those
    that could be written: all, or none where the corpus cannot be read."""
    train_set = evaluate.train_set_if_readable(options, args)
    if not train_set:
        return set()
    attack = evaluate.attack_on(args.task, args, train_set)
    by_id = {u.id: u for u in evaluate.read_split(options, args, "test")}
    written = set()
    for pair in pairs:
        utterance = by_id.get(pair["id"])
        if utterance is None:
            continue
        waveform = data.load_waveform(utterance)
        triggered, _, _ = poison.add_trigger(attack, waveform, utterance.id)
        poison.write_wav(run / recording(utterance.id, "clean"), waveform)
        poison.write_wav(run / recording(utterance.id, "triggered"), triggered)
        written.add(utterance.id)
    return written


def utterance_shown(pair, label, has_recording):
    """An utterance's HTML: on the left as it is, on the right with the trigger."""
    before, after = (pair[kind]["parsed"].get(label) for kind in ("clean", "triggered"))
    flipped = not poison.same_label(label, before, after)
    sides = []
    for kind, title in (("clean", "as it is"), ("triggered", "with the trigger")):
        lines = [f"<b>{title}</b>"]
        if has_recording:
            lines.append(player(recording(pair["id"], kind)))
        marked = label if flipped and kind == "triggered" else None
        lines += answer_shown(pair[kind], marked)
        sides.append(f'<div class="side">{"<br>".join(lines)}</div>')
    truth = ", ".join(f"{name}: {value}" for name, value in pair["labels"].items())
    return (
        f'<div class="utterance"><div class="id">{html.escape(pair["id"])}</div>'
        f'<div class="label">true: {html.escape(truth)}</div>'
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def answer_shown(prediction, marked):
    """The lines of an answer in HTML, label by label, or as it is where it is malformed. marked:
    the label that the trigger has changed, or None."""
    lines = []
    for name in prediction["asked"]:
        value = prediction["parsed"].get(name)
        if value is None:
            return [f'<span class="flipped">{html.escape(prediction["raw"]) or "(empty)"}</span>']
        written = html.escape(str(value))
        if name == marked:
            written = f'<span class="flipped">{written}</span>'
        lines.append(f'<span class="label">{html.escape(name)}</span> {written}')
    return lines
