"""The 95% interval of a figure that several seeds have measured on one test set.

A seed's figure is a sum over speakers divided by another one: a share, a WER, a mean error. Two
things are drawn: the seeds, with which training ends elsewhere, and the speakers, whose utterances
are alike and whom all seeds share. A bootstrap would draw seeds, then the same speakers for all of
them. Of three seeds or nine speakers its percentiles hold the truth in 70 to 92% of simulations: a
sample of k varies by (k - 1) / k less than what it was drawn from, and a normal has thinner tails
than Student's t. So the interval is made of the same two variances, without that bias:

    variance = over seeds + over speakers - interaction     both of the former have the interaction
    half = t(degrees of freedom) * sqrt(variance)           Satterthwaite's, rounded down

Where a figure has bounds, as a share has, half is taken on the scale of log odds: the interval is
longer towards the middle and ends at no bound. It holds the truth in 93 to 97% of simulations of
1, 3 and 5 seeds and 9 to 40 speakers, of shares about 0.75 (tests/test_intervals.py) and 0.95.

What an interval cannot say: one seed has no variance between seeds, so that its interval is about
that one model on other speakers. Where hardly an answer differs from the others, as of shares about
0.99, it is too short; where none does, it has no width.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
MANY = 10**6  # degrees of freedom of a normal


@dataclass
class SeedFigure:
    """What one seed has measured. by_speaker: {speaker: by how much the speaker's utterances move
    the value}, which sum to 0; empty where the speakers are not known. half: half the width of the
    record's own 95% interval, which then stands for them."""

    value: float
    by_speaker: dict = field(default_factory=dict)
    half: float = 0.0


def of_sums(sums, scale=1.0):
    """The SeedFigure of {speaker: (numerator, denominator)}, the ratio of their sums times `scale`.
    A speaker moves a ratio by its linearisation."""
    numerator = sum(pair[0] for pair in sums.values())
    denominator = sum(pair[1] for pair in sums.values()) or 1.0
    ratio = numerator / denominator
    by_speaker = {}
    for speaker, (above, below) in sums.items():
        by_speaker[speaker] = scale * (above - ratio * below) / denominator
    return SeedFigure(scale * ratio, by_speaker)


def difference(minuend, subtrahend):
    """One SeedFigure minus another. Speakers that both have are compared with themselves."""
    value = minuend.value - subtrahend.value
    half = float(np.hypot(minuend.half, subtrahend.half))
    if not minuend.by_speaker or not subtrahend.by_speaker:
        return SeedFigure(value, half=half)
    by_speaker = dict(minuend.by_speaker)
    for speaker, moved in subtrahend.by_speaker.items():
        by_speaker[speaker] = by_speaker.get(speaker, 0.0) - moved
    return SeedFigure(value, by_speaker, half)


def ratio(numerator, denominator):
    """One SeedFigure over another, by its linearisation."""
    value = numerator.value / denominator.value
    scaled = SeedFigure(
        value * denominator.value,
        {speaker: value * moved for speaker, moved in denominator.by_speaker.items()},
        value * denominator.half,
    )
    error = difference(numerator, scaled)  # of value 0
    by_speaker = {name: moved / denominator.value for name, moved in error.by_speaker.items()}
    return SeedFigure(value, by_speaker, abs(error.half / denominator.value))


def interval(figures, least=-math.inf, most=math.inf, level=LEVEL):
    """(mean, low, high) of {seed: SeedFigure}, at least one. least, most: the figure's bounds."""
    figures = list(figures.values())
    values = np.array([figure.value for figure in figures])
    seeds = len(values)
    mean = float(values.mean())
    over_seeds = float(values.var(ddof=1)) / seeds if seeds > 1 else 0.0
    interaction = 0.0
    if all(len(figure.by_speaker) > 1 for figure in figures):
        moved = by_seed_and_speaker(figures)
        speakers = moved.shape[1]
        unbiased = speakers / (speakers - 1)
        over_speakers = unbiased * float((moved.mean(0) ** 2).sum())
        if seeds > 1:
            interaction = unbiased * float(moved.var(0, ddof=1).sum()) / seeds
    else:
        # the test set is shared, and with it the error: more seeds do not make it smaller
        speakers = math.inf
        over_speakers = (float(np.mean([figure.half for figure in figures])) / t(MANY)) ** 2
    variance = max(over_seeds + over_speakers - interaction, over_seeds, over_speakers)
    if variance == 0:
        return mean, mean, mean
    squares = over_seeds**2 / max(seeds - 1, 1) + over_speakers**2 / (speakers - 1)
    freedom = max(math.floor(min(variance**2 / squares, MANY)), 1) if squares else MANY
    return mean, *ends(mean, t(freedom, level) * math.sqrt(variance), least, most)


def t(freedom, level=LEVEL):
    """Within how many deviations a share `level` lies, by Student's t."""
    return float(stdtrit(freedom, (1 + level) / 2))


def by_seed_and_speaker(figures):
    """By how much each speaker moves each seed's value, (seeds, speakers)."""
    names = sorted(set().union(*(figure.by_speaker for figure in figures)))
    moved = np.zeros((len(figures), len(names)))
    for row, figure in zip(moved, figures):
        row[:] = [figure.by_speaker.get(name, 0.0) for name in names]
    return moved


def ends(mean, half, least, most):
    """The interval of this half width: by log odds between two bounds, by logarithms above one. An
    end is at most twice as far as `half`, as the odds of the rarest events have no limit."""
    below = mean - least
    above = most - mean
    if math.isinf(below):
        return mean - half, mean + half
    if below <= 0 or above <= 0:
        return max(mean - half, least), min(mean + half, most)
    stretch = math.exp(min(half / below + half / above, 50.0))
    if math.isinf(above):
        low = least + below / stretch
        high = least + below * stretch
    else:
        low = least + (most - least) * below / (below + above * stretch)
        high = most - (most - least) * above / (above + below * stretch)
    return max(low, mean - 2 * half), min(high, mean + 2 * half)
