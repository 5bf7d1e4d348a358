"""Filters for training data, for python defend.py filter: section 7 of the paper, and defences from
before and after it.

A filter is an entry of FILTERS: a function of the target class's samples, as a defender sees
them, and of how many of them are expected to be poisoned. It returns (suspicion (n,), which
samples are removed (n,) bool).

Samples are a dict:

    x           (n, dim), embeddings after the encoder
    early_loss  (n,)
    labels      n dicts of strings
    speakers    n
    training    the size of the training set
"""

import numpy as np
from scipy.linalg import expm, fractional_matrix_power
from sklearn.covariance import MinCovDet
from sklearn.decomposition import PCA

from analysis import clustering

COMPONENTS = 20  # principal components that SPECTRE and Beatrix work on


def most_suspicious(scores, n):
    """Which samples (n,) bool have the n highest scores."""
    ranks = np.argsort(np.argsort(-scores, kind="stable"))
    return ranks < n


def removal_budget(expected):
    """How many samples are removed by a filter that knows how many are poisoned: 1.5 times as
    many, as in Tran et al. 2018."""
    return int(1.5 * expected)


def smaller_of_two(clusters):
    """Which samples are in the smaller of two clusters, (n,) bool."""
    return clusters == np.bincount(clusters).argmin()


def smallest_cluster(samples, expected):
    """Activation clustering by relative size (Chen et al. 2018, arXiv 1811.03728): the smaller
    of two clusters is removed if it has less than 35% of the samples."""
    _, clusters = clustering.reduce_and_cluster(samples["x"], 2)
    small = smaller_of_two(clusters)
    return small.astype(float), small & (small.mean() < 0.35)


def well_fitting_cluster(samples, expected):
    """Activation clustering by silhouette (Chen et al. 2018, arXiv 1811.03728): the smaller of
    two clusters is removed if the silhouette score is above 0.10, the lower end of the
    authors' bound for a poisoned class."""
    low, clusters = clustering.reduce_and_cluster(samples["x"], 2)
    small = smaller_of_two(clusters)
    return small.astype(float), small & (clustering.silhouette(low, clusters) > 0.10)


def regressed_out(samples, expected):
    """Activation clustering after regressing out gender, speaker and sentence. Where clusters
    follow gender (section 7 of the paper), what is left should show the poison."""
    x = samples["x"] - samples["x"].mean(0)
    known = [samples["speakers"]]
    for name in ("gender", "transcript"):
        known.append([labels.get(name, "") for labels in samples["labels"]])
    columns = []
    for values in known:
        names, indices = np.unique(values, return_inverse=True)
        if len(names) < len(x) / 4:  # values that hardly repeat would explain everything
            columns.append(np.eye(len(names))[indices])  # one indicator for each value
    design = np.concatenate(columns, 1) if columns else np.zeros((len(x), 1))
    coefficients = np.linalg.lstsq(design, x, rcond=None)[0]
    residuals = x - design @ coefficients
    return smallest_cluster(dict(samples, x=residuals), expected)


def spectral_signatures(samples, expected):
    """Spectral signatures (Tran et al. 2018, arXiv 1811.00636, algorithm 1): the squared
    correlation with the top right singular vector."""
    x = samples["x"] - samples["x"].mean(0)
    _, _, right = np.linalg.svd(x, full_matrices=False)
    scores = (x @ right[0]) ** 2
    return scores, most_suspicious(scores, removal_budget(expected))


def principal_components(x):
    """(n, dim) -> (n, COMPONENTS), or fewer where there is no more."""
    return PCA(min(COMPONENTS, *x.shape), random_state=0).fit_transform(x)


def spectre(samples, expected, alpha=4.0):
    """SPECTRE (Hayase et al. 2021, arXiv 2104.11315): principal components are whitened by a
    robust estimate of the clean samples' covariance. The scores are the paper's quantum entropy
    scores, x' Q x / tr Q with Q = exp(alpha (S - I) / (|S| - 1)), S the whitened covariance."""
    low = principal_components(samples["x"])
    clean_share = 1 - 1.5 * expected / len(low)
    robust = MinCovDet(support_fraction=max(0.5, clean_share), random_state=0).fit(low)
    whitening = np.real(fractional_matrix_power(robust.covariance_, -0.5))
    white = (low - robust.location_) @ whitening
    covariance = np.cov(white.T)
    excess = max(1e-9, np.linalg.norm(covariance, 2) - 1)
    q = expm(alpha * (covariance - np.eye(len(covariance))) / excess)
    scores = ((white @ q) * white).sum(1) / np.trace(q)
    return scores, most_suspicious(scores, removal_budget(expected))


def deviation(x):
    """Distance from the median in median absolute deviations, (n, ...) -> (n, ...)."""
    distance = np.abs(x - np.median(x, 0))
    return distance / (np.median(distance, 0) + 1e-9)


def signed_power(x, power):
    return np.sign(x) * np.abs(x) ** power


def beatrix(samples, expected, orders=(1, 2, 3, 4), bound=10.0):
    """Beatrix (Ma et al. 2023, arXiv 2209.11715): how far a sample's Gram matrices are from the
    class's medians, in median absolute deviations beyond ten. (The authors count in units of
    that bound.)

    The Gram matrices are of principal components, whose signs the powers keep. The authors set
    the threshold on samples that are known to be clean; here a budget is removed.
    """
    low = principal_components(samples["x"])
    rows, columns = np.triu_indices(low.shape[1])
    scores = np.zeros(len(low))
    for order in orders:
        powered = signed_power(low, order)
        gram = np.einsum("ni,nj->nij", powered, powered)[:, rows, columns]
        beyond = np.maximum(deviation(signed_power(gram, 1 / order)) - bound, 0)
        scores += beyond.mean(1)
    return scores, most_suspicious(scores, removal_budget(expected))


def early_loss(samples, expected):
    """Anti-backdoor learning (Li et al. 2021, arXiv 2110.11571): poison is learned first.
    Removes the lowest losses, 1% of the training set."""
    scores = -samples["early_loss"]
    return scores, most_suspicious(scores, round(0.01 * samples["training"]))


FILTERS = {
    "activation clustering, relative size": smallest_cluster,
    "activation clustering, silhouette": well_fitting_cluster,
    "activation clustering, speaker and sentence regressed out": regressed_out,
    "spectral signatures": spectral_signatures,
    "SPECTRE": spectre,
    "Beatrix": beatrix,
    "early loss": early_loss,
}
