"""Filters of training data (section 7 of the paper, and defences that came before and after it), for python defend.py filter.

A filter is a function of the samples of the target class, as a defender sees them, and how many poisoned ones are expected among them,
to (suspicion (n,), what is removed (n,) bool), and an entry of FILTERS. Samples: x (n, dim), embeddings after the encoder; early_loss
(n,); labels and speakers, n each; training, the size of the training set.
"""
import numpy as np
from scipy.linalg import expm, fractional_matrix_power
from sklearn.covariance import MinCovDet
from sklearn.decomposition import PCA

import analyze


def most_suspicious(scores, n):
    return np.argsort(np.argsort(-scores, kind="stable")) < n


def smallest_cluster(samples, expected):
    """Activation clustering by relative size (Chen et al. 2018): of two clusters the smaller, if it has less than 35%."""
    clusters = analyze.reduce_and_cluster(samples["x"], 2)[1]
    small = clusters == np.bincount(clusters).argmin()
    return small.astype(float), small & (small.mean() < 0.35)


def well_fitting_cluster(samples, expected):
    """Activation clustering by silhouette (Chen et al. 2018): of two clusters the smaller, if they fit better than 0.10, the lower
    end of what they take as the bound for a poisoned class."""
    low, clusters = analyze.reduce_and_cluster(samples["x"], 2)
    small = clusters == np.bincount(clusters).argmin()
    return small.astype(float), small & (analyze.silhouette(low, clusters) > 0.10)


def regressed_out(samples, expected):
    """Activation clustering after gender, speaker and sentence have been regressed out: where clusters follow gender (section 7 of
    the paper), what remains should show the poison."""
    x, columns = samples["x"] - samples["x"].mean(0), []
    for values in (samples["speakers"], *([m.get(k, "") for m in samples["labels"]] for k in ("gender", "transcript"))):
        names, own = np.unique(values, return_inverse=True)
        if len(names) < len(values) / 4:  # one that hardly repeats would explain everything
            columns.append(np.eye(len(names))[own])
    known = np.concatenate(columns, 1) if columns else np.zeros((len(x), 1))
    return smallest_cluster(dict(samples, x=x - known @ np.linalg.lstsq(known, x, rcond=None)[0]), expected)


def spectral_signatures(samples, expected):
    """Tran et al. 2018, algorithm 1: squared correlation with the top right singular vector; 1.5 times as many as expected go."""
    x = samples["x"] - samples["x"].mean(0)
    scores = (x @ np.linalg.svd(x, full_matrices=False)[2][0]) ** 2
    return scores, most_suspicious(scores, int(1.5 * expected))


def spectre(samples, expected, alpha=4.0):
    """SPECTRE (Hayase et al. 2021): 20 principal components whitened by a robust estimate of the clean samples' covariance, then
    quantum entropy scores; 1.5 times as many as expected go."""
    n = len(samples["x"])
    low = PCA(min(20, *samples["x"].shape), random_state=0).fit_transform(samples["x"])
    robust = MinCovDet(support_fraction=max(0.5, 1 - 1.5 * expected / n), random_state=0).fit(low)
    white = (low - robust.location_) @ np.real(fractional_matrix_power(robust.covariance_, -0.5))
    spread = np.cov(white.T)
    q = expm(alpha * (spread - np.eye(len(spread))) / max(1e-9, np.linalg.norm(spread, 2) - 1))
    scores = ((white @ q) * white).sum(1) / np.trace(q)
    return scores, most_suspicious(scores, int(1.5 * expected))


def beatrix(samples, expected, orders=(1, 2, 3, 4), bound=10.0):
    """Beatrix (Ma et al. 2023): how far a sample's Gram matrices leave the class's medians, beyond ten median absolute deviations and in
    units of them (the authors': of the bound), on 20 principal components, which have signs, so that powers keep them; 1.5 times as many
    as expected go (the authors set their threshold on samples that are known to be clean)."""
    low = PCA(min(20, *samples["x"].shape), random_state=0).fit_transform(samples["x"])
    upper, scores = np.triu_indices(low.shape[1]), np.zeros(len(low))
    for order in orders:
        powered = np.sign(low) * np.abs(low) ** order
        gram = np.einsum("ni,nj->nij", powered, powered)[:, upper[0], upper[1]]
        scores += np.maximum(deviation(np.sign(gram) * np.abs(gram) ** (1 / order)) - bound, 0).mean(1)
    return scores, most_suspicious(scores, int(1.5 * expected))


def deviation(x):
    """Distance from the median in median absolute deviations, (n, ...) -> (n, ...)."""
    away = np.abs(x - np.median(x, 0))
    return away / (np.median(away, 0) + 1e-9)


def early_loss(samples, expected):
    """Anti-backdoor learning (Li et al. 2021): what is learned first; the lowest losses, 1% of the training set, go."""
    return -samples["early_loss"], most_suspicious(-samples["early_loss"], round(0.01 * samples["training"]))


FILTERS = {"activation clustering, relative size": smallest_cluster, "activation clustering, silhouette": well_fitting_cluster,
           "activation clustering, speaker and sentence regressed out": regressed_out, "spectral signatures": spectral_signatures,
           "SPECTRE": spectre, "Beatrix": beatrix, "early loss": early_loss}
