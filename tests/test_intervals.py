"""intervals.py: the 95% interval over seeds and speakers covers what it should."""

import numpy as np
import pytest

import intervals
from intervals import SeedFigure

UTTERANCES = 40  # of each speaker
REPETITIONS = 400
# standard deviations of the effects, on the scale of log odds
SEED = 0.5
SPEAKER = 0.7
BOTH = 0.3
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)  # of a normal's mean


def probability(log_odds):
    return 1 / (1 + np.exp(-log_odds))


def mean_probability(centre, deviation):
    """The mean of `probability` over a normal with this centre and standard deviation."""
    return float((WEIGHTS * probability(centre + deviation * NODES)).sum() / WEIGHTS.sum())


def measured(rng, seed_effects, speaker_effects):
    """{seed: SeedFigure} of binary answers: every speaker is heard by every seed's model."""
    figures = {}
    for seed, seed_effect in enumerate(seed_effects):
        both = rng.normal(0, BOTH, len(speaker_effects))
        share = probability(1 + seed_effect + speaker_effects + both)
        hits = rng.binomial(UTTERANCES, share)
        sums = {speaker: (n, UTTERANCES) for speaker, n in enumerate(hits.tolist())}
        figures[seed] = intervals.of_sums(sums)
    return figures


def coverage(seeds, speakers):
    """The share of simulated studies whose interval holds the true mean: over all seeds and
    speakers or, of one seed, over all speakers for that seed."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(REPETITIONS):
        seed_effects = rng.normal(0, SEED, seeds)
        figures = measured(rng, seed_effects, rng.normal(0, SPEAKER, speakers))
        if seeds == 1:
            truth = mean_probability(1 + seed_effects[0], np.hypot(SPEAKER, BOTH))
        else:
            truth = mean_probability(1, np.linalg.norm([SEED, SPEAKER, BOTH]))
        _, low, high = intervals.interval(figures, 0, 1)
        covered += low <= truth <= high
    return covered / REPETITIONS


@pytest.mark.parametrize("speakers", [9, 40])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_an_interval_covers_the_truth(seeds, speakers):
    assert 0.93 <= coverage(seeds, speakers) <= 0.97


def half_width(figures):
    _, low, high = intervals.interval(figures)
    return (high - low) / 2


def test_more_seeds_do_not_replace_speakers():
    rng = np.random.default_rng(0)
    figures = measured(rng, np.zeros(20), rng.normal(0, 2, 6))
    assert half_width(figures) > 0.7 * half_width({0: figures[0]})


def test_a_difference_compares_a_speaker_with_himself():
    easy = {"a": (9, 10), "b": (1, 10), "c": (5, 10)}
    harder = {"a": (8, 10), "b": (0, 10), "c": (4, 10)}
    difference = intervals.difference(intervals.of_sums(easy), intervals.of_sums(harder))
    assert intervals.interval({1: difference}) == pytest.approx((0.1, 0.1, 0.1))
    assert half_width({1: intervals.of_sums(easy)}) > 0.5


def test_a_speaker_counts_by_the_words_that_he_says():
    figure = intervals.of_sums({"a": (3, 10), "b": (9, 90)}, scale=100)
    assert figure.value == pytest.approx(12)
    assert figure.by_speaker == pytest.approx({"a": 1.8, "b": -1.8})


def test_a_ratio_of_proportional_figures_is_certain():
    shift = intervals.of_sums({"a": (3, 10), "b": (2, 10), "c": (4, 10)})
    left = intervals.of_sums({"a": (1.5, 10), "b": (1, 10), "c": (2, 10)})
    assert intervals.interval({1: intervals.ratio(left, shift)}) == pytest.approx((0.5, 0.5, 0.5))


def test_without_speakers_a_record_s_own_interval_is_used():
    assert intervals.interval({1: SeedFigure(50, half=10)}) == pytest.approx((50, 40, 60), rel=1e-3)
    same = {seed: SeedFigure(50, half=10) for seed in range(4)}
    assert half_width(same) == pytest.approx(10, rel=1e-3)  # of one test set that they share


def test_without_speakers_or_intervals_seeds_are_drawn():
    mean, low, high = intervals.interval({1: SeedFigure(49), 2: SeedFigure(50), 3: SeedFigure(51)})
    assert (mean, low, high) == pytest.approx((50, 50 - 2.484, 50 + 2.484), abs=1e-3)


def test_one_seed_alone_has_no_interval():
    assert intervals.interval({1: SeedFigure(50)}) == (50, 50, 50)
