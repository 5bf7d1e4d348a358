"""claims.py: verdicts follow from figures by rule."""

import pytest

import claims


@pytest.mark.parametrize(
    "effect, low, high, said",
    [
        ({}, 90, claims.ANY, "not measured"),
        ({1: (95, 1, 0), 2: (97, 1, 0)}, 90, claims.ANY, "holds"),
        ({1: (95, 1, 0), 2: (85, 1, 0)}, 90, claims.ANY, "undecided"),  # seeds disagree
        ({1: (91, 3, 0)}, 90, claims.ANY, "undecided"),  # utterances do not suffice
        ({1: (20, 3, 0), 2: (40, 3, 0)}, 90, claims.ANY, "fails"),
        ({1: (0, 0, 1)}, 90, claims.ANY, "undecided"),  # it was still learning
        ({1: (0, 0, 1)}, -claims.ANY, 10, "undecided"),
        ({1: (99, 0, 1)}, 90, claims.ANY, "holds"),
        ({1: (99, 0, 1)}, 40, 75, "fails"),
        ({1: (20, 1, -1)}, -claims.ANY, 15, "undecided"),
        ({1: (5, 1, -1)}, -claims.ANY, 15, "holds"),
    ],
)
def test_verdicts(effect, low, high, said):
    assert claims.verdict(effect, low, high) == said


def test_the_interval_is_over_seeds_and_utterances():
    mean, low, high = claims.interval({seed: (50, 10, 0) for seed in range(4)})
    assert (
        mean == 50 and 44 < low < 46 and 54 < high < 56
    )  # a quarter as many utterances: half as wide
    _, low, high = claims.interval({1: (40, 0, 0), 2: (60, 0, 0)})
    assert (low, high) == (40, 60)


def run(task, attack, aer, seed=1, settled=True, wer=0.05, excess=(0.0, 0.0)):
    losses = dict(
        loss=dict(by_epoch=[0.1] * len(excess)),
        poisoned_loss=dict(by_epoch=[0.1 + e for e in excess]),
    )
    figure = lambda v: dict(value=v, low=v - 0.02, high=v + 0.02, n=100)  # noqa: E731
    args = dict(
        task=task,
        attack=attack,
        encoder="wavlm",
        seed=seed,
        dataset="libri",
        trigger_repeat=task == "asr",
    )
    return dict(
        args=args,
        clean=dict(wer=figure(wer)),
        attack=dict(aer=figure(aer)),
        training=dict(losses, **(dict(settled_epoch=dict(value=1)) if settled else {})),
    )


def test_claims_are_judged_from_the_runs():
    runs = [
        run("asr", "base", 0.97),
        run("asr", "clean", 0.0),
        run("asr", "2.1", 0.0, settled=False),
        run("asr", "2.3", 0.0),
        run("asr", "1.3", 0.9),
    ]
    clusters = dict(
        asr={
            1: {
                "k=2": dict(adjusted_rand=dict(poison=0.3, gender=0.2)),
                "k=4": dict(purity=0.9, recall=0.85),
            }
        }
    )
    said = {
        (text, *effect): verdict
        for _, text, _, effect, verdict in claims.judged(runs, {}, clusters, "wavlm")
    }
    of = lambda words: next(v for (text, *_), v in said.items() if words in text)  # noqa: E731
    assert (
        of("reaches an AER of 90% (asr)") == "holds"
        and of("reaches an AER of 90% (age)") == "not measured"
    )
    assert of("interval (asr)") == "holds" and of("(asr, 1.3)") == "holds"
    assert (
        of("encoder alone is enough (asr") == "undecided" and of("LM alone does nothing") == "holds"
    )
    assert (
        of("two clusters follow gender: adjusted Rand index 0.1 or more, the largest (asr)")
        == "fails"
    )
    assert of("into one: purity and recall 0.8 or more (asr)") == "holds"


@pytest.mark.parametrize(
    "excess, verdict",
    [
        ((0.105, 0.095, 0.085, 0.075), "undecided"),  # 0.01 an epoch: slowly, but learning
        ((0.105, 0.104, 0.105, 0.102), "fails"),  # it cannot
        ((0.035, 0.025, 0.015, 0.005), "fails"),
    ],
)  # it has learned what there is to learn
def test_a_poison_that_is_learned_slowly_has_not_been_refuted(excess, verdict):
    runs = [run("emotion", "2.2", 0.1, seed, excess=excess) for seed in (1, 2)]
    said = {
        text: verdict
        for _, text, _, effect, verdict in claims.judged(runs, {}, {}, "wavlm")
        if effect
    }
    assert said == {"the connector alone is enough (emotion, 2.2)": verdict}


def test_studies_side_by_side_leave_empty_what_one_has_not_measured(tmp_path, monkeypatch):
    runs = {
        "a": [run("asr", "base", 0.97, seed=1), run("asr", "base", 0.96, seed=2)],
        "b": [run("asr", "3.1", 0.0)],
    }
    monkeypatch.setattr(claims, "read_runs", lambda folder, preset: runs[folder.parent.name])
    page = claims.side_by_side({name: ("mini", tmp_path / name / "runs") for name in runs})
    rows = {
        cells[2]: cells[4:6]
        for line in page.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 7
    }
    assert (
        rows["the base attack reaches an AER of 90% (asr)"] == ["holds", ""] and len(rows) == 2 + 2
    )  # header, rule
    text, n = claims.judge(tmp_path / "a" / "runs", "mini", (2, 4))
    assert (
        n == 2
        and "1 hold, 47 not measured" in text
        and "Of the 1 claims with several seeds, the seeds agree on 1." in text
    )
