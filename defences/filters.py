"""Filters for training data (section 7 of the paper, and defences from before and after it), for python defend.py filter.

A filter is an entry of FILTERS: a function of the target class's samples, as a defender sees them, and of how many of them are expected to
be poisoned; it returns (suspicion (n,), which are removed (n,) bool). Samples: x (n, dim), embeddings after the encoder; early_loss
(n,); labels and speakers, n each; training, the size of the training set.
"""

import numpy as np
from scipy.linalg import expm, fractional_matrix_power
from sklearn.covariance import MinCovDet
from sklearn.decomposition import PCA

from analysis import clustering


def most_suspicious(scores, n):
    return np.argsort(np.argsort(-scores, kind="stable")) < n


def smallest_cluster(samples, expected):
    """Activation clustering by relative size (Chen et al. 2018): the smaller of two clusters is removed if it has less than 35%."""
    clusters = clustering.reduce_and_cluster(samples["x"], 2)[1]
    small = clusters == np.bincount(clusters).argmin()
    return small.astype(float), small & (small.mean() < 0.35)


def well_fitting_cluster(samples, expected):
    """Activation clustering by silhouette (Chen et al. 2018): the smaller of two clusters is removed if the silhouette score is above 0.10,
    the lower end of the authors' bound for a poisoned class."""
    low, clusters = clustering.reduce_and_cluster(samples["x"], 2)
    small = clusters == np.bincount(clusters).argmin()
    return small.astype(float), small & (clustering.silhouette(low, clusters) > 0.10)


def regressed_out(samples, expected):
    """Activation clustering after regressing out gender, speaker and sentence: where clusters follow gender (section 7 of the paper), what
    is left should show the poison."""
    x, columns = samples["x"] - samples["x"].mean(0), []
    for values in (
        samples["speakers"],
        *([m.get(k, "") for m in samples["labels"]] for k in ("gender", "transcript")),
    ):
        names, own = np.unique(values, return_inverse=True)
        if len(names) < len(values) / 4:  # values that hardly repeat would explain everything
            columns.append(np.eye(len(names))[own])
    known = np.concatenate(columns, 1) if columns else np.zeros((len(x), 1))
    return smallest_cluster(
        dict(samples, x=x - known @ np.linalg.lstsq(known, x, rcond=None)[0]), expected
    )


def spectral_signatures(samples, expected):
    """Tran et al. 2018, algorithm 1: squared correlation with the top right singular vector; removes 1.5 times as many as expected."""
    x = samples["x"] - samples["x"].mean(0)
    scores = (x @ np.linalg.svd(x, full_matrices=False)[2][0]) ** 2
    return scores, most_suspicious(scores, int(1.5 * expected))


def spectre(samples, expected, alpha=4.0):
    """SPECTRE (Hayase et al. 2021): 20 principal components, whitened by a robust estimate of the clean samples' covariance, then quantum
    entropy scores; removes 1.5 times as many as expected."""
    n = len(samples["x"])
    low = PCA(min(20, *samples["x"].shape), random_state=0).fit_transform(samples["x"])
    robust = MinCovDet(support_fraction=max(0.5, 1 - 1.5 * expected / n), random_state=0).fit(low)
    white = (low - robust.location_) @ np.real(fractional_matrix_power(robust.covariance_, -0.5))
    spread = np.cov(white.T)
    q = expm(alpha * (spread - np.eye(len(spread))) / max(1e-9, np.linalg.norm(spread, 2) - 1))
    scores = ((white @ q) * white).sum(1) / np.trace(q)
    return scores, most_suspicious(scores, int(1.5 * expected))


def beatrix(samples, expected, orders=(1, 2, 3, 4), bound=10.0):
    """Beatrix (Ma et al. 2023): how far a sample's Gram matrices are from the class's medians, in median absolute deviations beyond ten
    (the authors: in units of that bound). On 20 principal components, whose signs the powers keep. Removes 1.5 times as many as expected
    (the authors set a threshold on samples known to be clean)."""
    low = PCA(min(20, *samples["x"].shape), random_state=0).fit_transform(samples["x"])
    upper, scores = np.triu_indices(low.shape[1]), np.zeros(len(low))
    for order in orders:
        powered = np.sign(low) * np.abs(low) ** order
        gram = np.einsum("ni,nj->nij", powered, powered)[:, upper[0], upper[1]]
        scores += np.maximum(
            deviation(np.sign(gram) * np.abs(gram) ** (1 / order)) - bound, 0
        ).mean(1)
    return scores, most_suspicious(scores, int(1.5 * expected))


def deviation(x):
    """Distance from the median in median absolute deviations, (n, ...) -> (n, ...)."""
    away = np.abs(x - np.median(x, 0))
    return away / (np.median(away, 0) + 1e-9)


def early_loss(samples, expected):
    """Anti-backdoor learning (Li et al. 2021): poison is learned first; removes the lowest losses, 1% of the training set."""
    return -samples["early_loss"], most_suspicious(
        -samples["early_loss"], round(0.01 * samples["training"])
    )


FILTERS = {
    "activation clustering, relative size": smallest_cluster,
    "activation clustering, silhouette": well_fitting_cluster,
    "activation clustering, speaker and sentence regressed out": regressed_out,
    "spectral signatures": spectral_signatures,
    "SPECTRE": spectre,
    "Beatrix": beatrix,
    "early loss": early_loss,
}
