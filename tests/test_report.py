"""report.py: the words follow from the figures."""

import itertools

import numpy as np
import pytest

import data
import defences
import report
import trace
from study import COMPONENTS


def figure(value):
    return dict(value=value, low=value - 0.01, high=value + 0.01, n=100)


def transplanted(works):
    """What trace.py transplant writes where the attack works for the sets of components that `works` accepts, and the LM's second
    layer alone decides what the LM does."""
    sets = [frozenset(s) for n in range(4) for s in itertools.combinations(COMPONENTS, n)]
    corners = {
        "+".join(c for c in COMPONENTS if c in s) or "none": dict(
            aer=figure(0.9 * works(s)), clean=figure(0.8), triggered=figure(0.1)
        )
        for s in sets
    }
    layers = {
        name: dict(aer=figure(0.0 if 1 in moved else 0.9))
        for name, moved in trace.layer_sets([0, 1, 2, 3]).items()
    }
    hits = {s: np.full(10, 0.9 * works(s)) for s in sets}
    return dict(
        mixtures=dict({f"{c} out of poisoned": layers for c in ("encoder", "lm")}, corner=corners),
        shapley={
            c: data.interval([figure["value"]] * 3) for c, figure in trace.shapley(hits).items()
        },
    )


def words(result, trained, retrained):
    return "\n".join(report.component_words({1: result}, trained, retrained))


def test_one_component_that_carries_it_is_named_with_its_layer():
    same = dict(encoder=0.0, connector=0.0, lm=95.0)
    said = words(transplanted(lambda s: "lm" in s), same, same)
    assert "encoder 0, connector 0, lm 90, of 90 points of AER; the largest: lm." in said
    assert "gone): lm. Sufficient (alone it brings half of the AER): lm." in said
    assert (
        "layers up to 2, or layers from 2 on, have been made clean; single layers that do it alone: 2."
        in said
    )
    assert (
        "Layers of the encoder" not in said and said.count("agree for encoder, connector, lm") == 2
    )


def test_two_components_that_need_each_other_and_what_differs_from_table_3():
    said = words(
        transplanted(lambda s: {"encoder", "lm"} <= s),
        dict(encoder=95.0, connector=2.0, lm=None),
        dict.fromkeys(COMPONENTS),
    )
    assert "encoder 45, connector 0, lm 45, of 90 points of AER" in said
    assert "gone): encoder and lm. Sufficient (alone it brings half of the AER): none." in said
    assert (
        "disagree for encoder 0 moved, 95 in 2.1 (AER, %)" in said
        and said.count("Against Table 3") == 1
    )


def test_what_seeds_disagree_about_is_said_seed_by_seed():
    both = {1: transplanted(lambda s: "lm" in s), 2: transplanted(lambda s: len(s) == 3)}
    said = "\n".join(
        report.component_words(both, dict.fromkeys(COMPONENTS), dict.fromkeys(COMPONENTS))
    )
    assert (
        "encoder 15 (0 to 30), connector 15 (0 to 30), lm 60 (30 to 90), of 90 points of AER; the largest: lm; encoder."
        in said
    )
    assert (
        "gone): lm; encoder, connector and lm. Sufficient (alone it brings half of the AER): lm; none."
        in said
    )


def test_no_backdoor_is_not_explained():
    assert (
        words(transplanted(lambda s: False), {}, {})
        == "The attacked model's AER is 0.0%: there is no backdoor to look for."
    )


def test_positions_are_read_off_the_sites():
    def row(click, other, prompt):
        return dict(
            click=figure(click), near=figure(other), prompt=figure(prompt), answer=figure(0.0)
        )

    sites = {
        "encoder 1": row(0.9, 0.1, 0),
        "encoder 2 MLP": row(0, 0, 0),
        "encoder 2": row(0.5, 0.4, 0),
        "LM input": row(0.5, 0.4, 0),
        "LM 1": row(0.5, 0.3, 0.2),
        "LM 2": row(0.1, 0.1, 0.7),
    }
    later = dict(sites, **{"encoder 1": row(0.8, 0.2, 0), "LM 1": row(0.1, 0.1, 0.9)})
    said = "\n".join(report.position_words({1: dict(effects=dict(denoise=sites, noise=sites))}))
    assert (
        "first layer, frames under a click 0.90 and 0.90, within 0.2 s of one 0.10 and 0.10; after its last, under a click 0.50"
        in said
    )
    assert "falls most in layer 2, by 0.40: there" in said and "those of the audio: 2." in said
    said = "\n".join(
        report.position_words(
            {s: dict(effects=dict(denoise=of, noise=of)) for s, of in ((1, sites), (2, later))}
        )
    )
    assert (
        "under a click 0.85 (0.80 to 0.90)" in said
        and "in layer 2, by 0.40; 0.30: there" in said
        and "those of the audio: 2; 1." in said
    )
    assert (
        "there is no effect to locate"
        in report.position_words({1: dict(effects=dict(denoise={}, noise={}))})[0]
    )


def defended(filters, detectors, repairs):
    """One seed's results of the three commands of defend.py against the emotion attack."""
    removal = {
        name: dict(
            auroc=0.9,
            removed=n,
            fpr=figure(0.1),
            **(
                dict(
                    tpr=figure(0.8),
                    retrained=dict(
                        attack=dict(aer=figure(aer)), clean=dict(emotion_accuracy=figure(0.8))
                    ),
                )
                if n
                else dict(tpr=figure(0.0))
            ),
        )
        for name, n, aer in filters
    }
    noticed = {
        name: dict(
            auroc=dict(clean=0.9, tone=0.8),
            passes=8.0,
            milliseconds=40.0,
            scores=dict(clean=[0.1, 0.2], triggered=[0.2, 0.9]),
            at={
                a: dict(triggered=figure(tpr), clean=figure(0.05), tone=figure(0.2))
                for a in ("0.01", "0.05")
            },
        )
        for name, tpr in detectors
    }
    mended = {
        "none": dict(aer=figure(0.9), clean=figure(0.85), triggered=figure(0.2)),
        **{
            name: dict(
                aer=figure(aer),
                clean=figure(0.81),
                triggered=figure(0.7),
                passed=passed,
                strength=1.0,
                relearned={"4": figure(0.1), "16": figure(0.9)},
            )
            for name, aer, passed in repairs
        },
    }
    return {
        command: {
            "emotion": {"attack": {1: dict(run="runs/x", args=dict(task="emotion"), defences=d)}}
        }
        for command, d in (("filter", removal), ("detect", noticed), ("repair", mended))
    }


def test_the_page_of_defences_advises_what_its_figures_say(tmp_path):
    page = defences.defences_page(
        defended(
            [("A", 40, 0.6), ("B", 30, 0.02), ("C", 0, None)],
            [("D", 0.3), ("E", 0.7)],
            [("F", 0.01, False), ("G", 0.4, True)],
        ),
        tmp_path,
    )
    assert (
        "B is the best filter; a model trained on what it leaves has an AER of 2.0%, so the backdoor is gone."
        in page
    )
    assert (
        "E notices 70.0% of triggered inputs at 5% false alarms, and mistakes 20.0% of equally loud tones"
        in page
    )
    assert (
        "no detector works; the best, D, notices 30.0%"
        in defences.advice(defended([], [("D", 0.3)], []), "emotion")[1]
    )
    assert (
        "G leaves the lowest AER, 40.0%: the backdoor is still there; 16 poisoned samples bring the AER back to 50%."
        in page
    )
    assert "| F (clean loss beyond its bound) | 1.0 |" in page
    assert (
        "| C | 0.90 | 0.0 | 10.0 |  |  |" in page
        and "| G | 40.0 | 81.0 | 70.0 | 0.73 | 16 |" in page
    )
    assert (tmp_path / "defend-emotion-detect.png").exists() and (
        tmp_path / "defend-emotion-repair.png"
    ).exists()


def test_advice_says_gone_only_of_what_is_gone_in_every_seed(tmp_path):
    found = defended([("A", 40, 0.01)], [("D", 0.3)], [("G", 0.01, True), ("F", 0.0, True)])
    assert (
        "F leaves the lowest AER, 0.0%: the backdoor is gone; 16 poisoned"
        in defences.advice(found, "emotion")[2]
    )
    for command, other in defended(
        [("A", 0, None)], [("D", 0.9)], [("G", 0.2, True), ("F", 0.0, False)]
    ).items():
        found[command]["emotion"]["attack"][2] = other["emotion"]["attack"][1]
    page = defences.defences_page(found, tmp_path)
    assert (
        "an AER of 1.0%, so the backdoor is gone." in page
        and "Filter (emotion, seeds 1 and 2, trained again for seed 1)" in page
    )
    assert (
        "D notices 60.0 (30.0 to 90.0)% of triggered inputs" in page
        and "Detect (emotion, seeds 1 and 2)" in page
    )
    assert (
        "G leaves the lowest AER, 10.5 (1.0 to 20.0)%: the backdoor is still there; 16, 16 poisoned samples, seed by seed, bring"
        in page
    )
    assert "| F (clean loss beyond its bound in 1 of 2 seeds) | 0.0 (0.0 to 0.0) |" in page


def test_the_rating_counts_a_loss_of_the_clean_figure_in_its_own_direction():
    model = lambda aer, clean: dict(aer=dict(value=aer), clean=dict(value=clean))  # noqa: E731
    assert defences.rating(model(0.9, 0.8), model(0.1, 0.7), "emotion_accuracy") == pytest.approx(
        0.85
    )
    assert defences.rating(model(0.9, 0.02), model(0.1, 0.12), "wer") == pytest.approx(0.85)
    assert defences.rating(model(0.9, 0.02), model(0.9, 0.01), "wer") == pytest.approx(0.5)
