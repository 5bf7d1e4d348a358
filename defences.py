"""The page on filters, detectors and repairs, task by task, from what defend.py has found; for report.py."""

import json
from pathlib import Path

import figures
from study import DEFAULT_ENCODER, TASKS, VARIANTS, clean_task, identity, run_name
from summary import ORDER, listed, markdown, scale_of, show, spread

DEFENCES = """# What removes the backdoor, and what notices it

Filters look at the training data of the target class. If one removes at least three quarters of the poison, a model is trained on what is
left (the attack at half the rate shows what happens if less is removed). Detectors look at one input at a time, with thresholds set on
clean development speech. Repairs change the model with clean speech alone. Settings are the authors', or chosen on clean figures before
looking at the trigger; a defence that fails is shown as it is. Variants of the attack: VARIANTS. Cells give the mean and, where several
seeds have run, the range; variants and clean models may have run for fewer seeds than the attack. Pictures show the first seed.
"""


def load_defences(folder, preset):
    """{command: {task: {role: {seed: result}}}}; role: "attack", a variant's name, or "clean model". The command "attack" has the runs' own
    figures."""
    found = {}
    for path in sorted(Path(folder).glob("*/defend-*.json")):
        result = json.loads(path.read_text())
        args = result["args"]
        task, seed = args["task"], args["seed"]
        base = identity(preset, task, DEFAULT_ENCODER[preset], "base", seed)
        roles = {
            run_name(base): "attack",
            **{run_name({**base, **change(task)}): name for name, change in VARIANTS.items()},
            run_name(
                identity(preset, clean_task(task), DEFAULT_ENCODER[preset], "clean", seed)
            ): "clean model",
        }
        if args["preset"] == preset and (role := roles.get(path.parent.name)):
            command = path.stem.split("-")[1]
            found.setdefault(command, {}).setdefault(task, {}).setdefault(role, {})[seed] = result
            if (metrics := path.parent / "metrics.json").exists():
                found.setdefault("attack", {}).setdefault(task, {}).setdefault(role, {})[seed] = (
                    json.loads(metrics.read_text())["attack"]
                )
    return found


def of_defence(name, *keys):
    """A function that picks a defence's figure from a result; a bare number becomes a figure."""

    def pick(result):
        value = result["defences"][name]
        for key in keys:
            value = (value or {}).get(key)
        return (
            value
            if isinstance(value, dict) or value is None
            else dict(value=value, low=value, high=value)
        )

    return pick


def over(results, pick, scale=100):
    """The spread over the seeds that have the figure, None if there is none."""
    return spread(
        {
            seed: figure["value"] * scale
            for seed, result in results.items()
            if (figure := pick(result))
        }
    )


def mean_of(results, pick, scale=100, form=".1f"):
    """Mean and range over the seeds that have the figure."""
    found = over(results, pick, scale)
    return show(found, form=form) if found else ""


def over_variants(roles, pick, scale=100, form=".1f"):
    return ", ".join(
        mean_of(roles[name], pick, scale, form) or "missing" for name in VARIANTS if name in roles
    )


def names_of(roles):
    return next(iter(roles["attack"].values()))["defences"]


def seeds_of(results):
    """In words: of which seeds these results are, and after which of them a model was trained on what a filter leaves."""
    again = [
        seed
        for seed, r in results.items()
        if any("retrained" in figures for figures in r["defences"].values())
    ]
    words = [
        ("seed " if len(seeds) == 1 else "seeds ") + listed([str(seed) for seed in sorted(seeds)])
        for seeds in (results, again)
        if seeds
    ]
    return ", trained again for ".join(words)


def filter_rows(roles, metric, scale):
    benign = roles.get("clean model", {})
    return [
        {
            "Filter": name,
            "AUROC": mean_of(roles["attack"], of_defence(name, "auroc"), 1, ".2f"),
            "removes % of the poison": mean_of(roles["attack"], of_defence(name, "tpr")),
            "% of the rest": mean_of(roles["attack"], of_defence(name, "fpr")),
            "then AER": mean_of(roles["attack"], of_defence(name, "retrained", "attack", "aer")),
            f"then {metric}": mean_of(
                roles["attack"], of_defence(name, "retrained", "clean", metric), scale
            ),
            "% of the variants' poison": over_variants(roles, of_defence(name, "tpr")),
            "% of clean data": mean_of(benign, of_defence(name, "fpr")),
        }
        for name in names_of(roles)
    ]


def detector_rows(roles, metric, scale):
    at = lambda name, alarms, kind, role="attack": mean_of(
        roles.get(role, {}), of_defence(name, "at", alarms, kind)
    )  # noqa: E731
    both = lambda name, kinds, role="attack": ", ".join(
        at(name, "0.05", kind, role) for kind in kinds
    )  # noqa: E731
    return [
        {
            "Detector": name,
            "AUROC": mean_of(roles["attack"], of_defence(name, "auroc", "clean"), 1, ".2f"),
            "against a tone": mean_of(roles["attack"], of_defence(name, "auroc", "tone"), 1, ".2f"),
            "TPR at 1%": at(name, "0.01", "triggered"),
            "TPR at 5%": at(name, "0.05", "triggered"),
            "FPR at 5%: clean, tone": both(name, ("clean", "tone")),
            "AUROC, variants": over_variants(roles, of_defence(name, "auroc", "clean"), 1, ".2f"),
            "clean model at 5%: clean, triggered": both(
                name, ("clean", "triggered"), "clean model"
            ),
            "passes": f"{first['passes']:.0f}",
            "ms (first seed)": f"{first['milliseconds']:.0f}",
        }
        for name, first in names_of(roles).items()
    ]


def rating(before, after, metric):
    """Defence effectiveness rating (Zhu et al. 2023): (the AER's decrease - the clean figure's decrease + 1) / 2."""
    lost = after["clean"]["value"] - before["clean"]["value"]
    lost = lost / 100 if metric.endswith("mae") else lost if metric.endswith("wer") else -lost
    return (max(0, before["aer"]["value"] - after["aer"]["value"]) - max(0, lost) + 1) / 2


def back_with(results, name):
    """How many poisoned samples brought the AER back to 50%, seed by seed; empty if it had not fallen below."""
    relearned = [
        r["defences"][name]["relearned"]
        for r in results.values()
        if "relearned" in r["defences"][name]
    ]
    return ", ".join(
        min(
            (n for n, aer in counts.items() if aer["value"] >= 0.5),
            key=int,
            default=f"over {max(counts, key=int)}",
        )
        for counts in relearned
    )


def repair_rows(roles, metric, scale):
    rows = []
    for name in names_of(roles):
        ratings = {
            seed: rating(r["defences"]["none"], r["defences"][name], metric)
            for seed, r in roles["attack"].items()
        }
        back = back_with(roles["attack"], name)
        failed, seeds = (
            sum(not r["defences"][name].get("passed", True) for r in roles["attack"].values()),
            len(roles["attack"]),
        )
        costly = (
            f" (clean loss beyond its bound{f' in {failed} of {seeds} seeds' if seeds > 1 else ''})"
            if failed
            else ""
        )
        rows.append(
            {
                "Repair": name + costly,
                "AER": mean_of(roles["attack"], of_defence(name, "aer")),
                metric: mean_of(roles["attack"], of_defence(name, "clean"), scale),
                f"triggered {metric}": mean_of(
                    roles["attack"], of_defence(name, "triggered"), scale
                ),
                "DER": show(spread(ratings), form=".2f"),
                "back with": back,
                "AER, variants": over_variants(roles, of_defence(name, "aer")),
                f"clean model's {metric}": mean_of(
                    roles.get("clean model", {}), of_defence(name, "clean"), scale
                ),
            }
        )
    return rows


def advice(found, task):
    """Advice to a defender against this attack, from the figures of all seeds: their means and ranges."""
    of = lambda command, name, *keys: over(found[command][task]["attack"], of_defence(name, *keys))  # noqa: E731
    mean = lambda figure: figure["mean"]  # noqa: E731
    gone = lambda figure: figure["high"] < 5  # noqa: E731, in every seed
    aer = {
        role: mean_of(seeds, lambda figures: figures.get("aer"))
        for role, seeds in found.get("attack", {}).get(task, {}).items()
    }
    known = [f"{role} {aer[role]}" for role in ("attack", *VARIANTS) if role in aer]
    out = [f"**AER without a defence:** {', '.join(known)}."] if known else []
    if task in found.get("filter", {}):
        left = {
            name: figure
            for name in names_of(found["filter"][task])
            if (figure := of("filter", name, "retrained", "attack", "aer"))
        }
        best = min(left, key=lambda name: mean(left[name])) if left else None
        out.append(
            "No filter removes three quarters of the poison."
            if not left
            else f"**Before training:** {best} is the best filter; a model trained on what it leaves has an AER of {show(left[best])}%"
            + (
                ", so the backdoor is gone."
                if gone(left[best])
                else ": a filter alone is not enough."
            )
        )
    if task in found.get("detect", {}):
        caught = {
            name: of("detect", name, "at", "0.05", "triggered")
            for name in names_of(found["detect"][task])
        }
        best = max(caught, key=lambda name: mean(caught[name]))
        which = best if mean(caught[best]) >= 50 else f"no detector works; the best, {best},"
        out.append(
            f"**At run time:** {which} notices {show(caught[best])}% of triggered inputs at 5% false alarms, and mistakes "
            f"{show(of('detect', best, 'at', '0.05', 'tone'))}% of equally loud tones for triggers."
        )
    if task in found.get("repair", {}):
        usable = {
            name: of("repair", name, "aer")
            for name in names_of(found["repair"][task])
            if name != "none"
            and all(r["defences"][name]["passed"] for r in found["repair"][task]["attack"].values())
        }
        if usable:
            best = min(usable, key=lambda name: mean(usable[name]))
            back = back_with(found["repair"][task]["attack"], best)
            out.append(
                f"**After training:** of the repairs that keep the clean loss within its bound, {best} leaves the lowest AER, "
                f"{show(usable[best])}%: the backdoor is {'gone' if gone(usable[best]) else 'still there'}"
                + (
                    f"; {back} poisoned samples{', seed by seed,' * (',' in back)} bring the AER back to 50%."
                    if back
                    else "."
                )
            )
        else:
            out.append("**After training:** no repair keeps the clean loss within its bound.")
    return out


def defences_page(found, out):
    """The text of defences.md; draws its figures, for the first seed."""
    text = [DEFENCES.replace("VARIANTS", ", ".join(VARIANTS))]
    for task in (t for t in ORDER if any(t in found[command] for command in found)):
        metric = TASKS[task]["metric"]
        text += [f"# {task}\n", *(f"{line}\n" for line in advice(found, task))]
        for command, rows, draw in (
            ("filter", filter_rows, None),
            ("detect", detector_rows, figures.roc),
            ("repair", repair_rows, figures.repairs),
        ):
            roles = found.get(command, {}).get(task, {})
            if "attack" in roles:
                text.append(
                    markdown(
                        f"{command.capitalize()} ({task}, {seeds_of(roles['attack'])})",
                        rows(roles, metric, scale_of(metric)),
                    )
                )
                if draw:
                    draw(
                        roles["attack"][min(roles["attack"])], out / f"defend-{task}-{command}.png"
                    )
                    text.append(f"![{task}, {command}](defend-{task}-{command}.png)\n")
    return "\n".join(text)
