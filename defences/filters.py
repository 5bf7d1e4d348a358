"""Filters for training data, for python defend.py filter: section 7 of the paper, and defences from
before and after it.

A filter is an entry of FILTERS: a function of the target class's samples, as a defender sees
them, and of how many of them are expected to be poisoned. It returns (suspicion (n,), which
samples are removed (n,) bool).

Where a filter is not what its authors published, its docstring says so, and its name where the
difference is large. Settings are the authors', except for what they do not have. ABL (Li et al.
2021) and Beatrix (Ma et al. 2023) are here as variants only: see `low_early_loss` and
`grams_of_means`.

Samples are a dict:

    x           (n, dim), embeddings after the encoder
    early_loss  (n,)
    labels      n dicts of strings
    speakers    n
    training    the size of the training set
"""

import numpy as np
from scipy.linalg import expm
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.covariance import MinCovDet
from sklearn.decomposition import PCA

from analysis import clustering

# numbers of principal components that SPECTRE chooses from: (1, 2, ... 10) squared
CANDIDATES = (1, 4, 9, 16, 25, 36, 49, 64, 81, 100)


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
    of two clusters is removed if it has less than 35% of the samples.

    As published but for the reduction: 20 principal components, as in section 7 of the paper,
    instead of ten independent ones."""
    _, clusters = clustering.reduce_and_cluster(samples["x"], 2)
    small = smaller_of_two(clusters)
    return small.astype(float), small & (small.mean() < 0.35)


def well_fitting_cluster(samples, expected):
    """Activation clustering by silhouette (Chen et al. 2018, arXiv 1811.03728): the smaller of
    two clusters is removed if the silhouette score is above 0.10, the lower end of the
    authors' bound for a poisoned class. The reduction is that of `smallest_cluster`."""
    low, clusters = clustering.reduce_and_cluster(samples["x"], 2)
    small = smaller_of_two(clusters)
    return small.astype(float), small & (clustering.silhouette(low, clusters) > 0.10)


def regressed_out(samples, expected):
    """A variant of `smallest_cluster`, ours: gender, speaker and sentence are regressed out first.
    Where clusters follow gender (section 7 of the paper), what is left should show the poison."""
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
    correlation with the top right singular vector, as published."""
    x = samples["x"] - samples["x"].mean(0)
    _, _, right = np.linalg.svd(x, full_matrices=False)
    scores = (x @ right[0]) ** 2
    return scores, most_suspicious(scores, removal_budget(expected))


def principal_components(x, n):
    """(samples, dim) -> (samples, n)"""
    return PCA(n, random_state=0).fit_transform(x)


# -------------------------------------------------------------------------------------------------
# SPECTRE


def whitened(x, covariance):
    """x (n, dim) in units in which a covariance (dim, dim) is the identity. Directions that hardly
    vary count as varying by a millionth of the largest standard deviation."""
    variances, directions = np.linalg.eigh(np.atleast_2d(covariance))
    variances = np.maximum(variances, 1e-12 * variances.max())
    return x @ (directions / np.sqrt(variances))


def entropy_weights(covariance, alpha=4.0):
    """The matrix of the quantum entropy scores, exp(alpha (S - I) / (|S| - 1)), of trace 1: it
    weighs the directions in which a whitened covariance S (dim, dim) exceeds the identity."""
    excess = max(1e-9, np.linalg.norm(covariance, 2) - 1)
    weights = expm(alpha * (covariance - np.eye(len(covariance))) / excess)
    return weights / np.trace(weights)


def entropy_scores(white):
    """The quantum entropy scores x' Q x (n,) of samples (n, dim) that are whitened."""
    weights = entropy_weights(np.atleast_2d(np.cov(white.T)))
    return ((white @ weights) * white).sum(1)


def top_component(y):
    """The first principal component of the products y y' of samples y (n, dim), whose own second
    moment is the identity, so that it is the products' mean: its variance, and where the samples
    are along it, (n,)."""
    n, dim = y.shape
    lengths = (y**2).sum(1)
    if dim == 1:
        return lengths.var(), lengths - 1
    if n < dim**2:  # by inner products between samples
        kernel = (y @ y.T) ** 2 - lengths - lengths[:, None] + dim
        values, vectors = eigsh(kernel / n, 1, v0=lengths, tol=1e-3)
        return values[0], vectors[:, 0] * np.sqrt(n * values[0])

    def covariance_times(vector):
        matrix = vector.reshape(dim, dim)
        along = ((y @ matrix) * y).sum(1)  # (n,)
        return ((y.T * along) @ y / n - np.trace(matrix) * np.eye(dim)).ravel()

    operator = LinearOperator((dim**2, dim**2), covariance_times, dtype=float)
    values, vectors = eigsh(operator, 1, v0=np.ones(dim**2), tol=1e-3)
    direction = vectors[:, 0].reshape(dim, dim)
    return values[0], ((y @ direction) * y).sum(1) - np.trace(direction)


def inside_one_round(x, share, limit):
    """One round of `clean_by_covariance`: which samples (n,) bool stay, all but at most `limit`.
    x (n, dim) is centred."""
    n, dim = x.shape
    y = whitened(x, x.T @ x / n)
    distances = (y**2).sum(1)
    far = distances >= 10 * dim * np.log(n / 0.1)
    if far.any():
        return ~(far & most_suspicious(distances, limit))
    variance, along = top_component(y)
    if variance <= 1 + 10 * share * np.log(share) ** 2:
        return np.ones(n, bool)  # fourth moments are those of normal samples
    distances = np.abs(along - np.median(along)) / np.sqrt(2)
    # the authors remove what lies beyond the first distance, three having been taken off, that
    # their bound on the tail of normal samples excludes, or else beyond the last one
    bounds = np.sort(distances) - 3
    bounds = bounds[bounds > 0]
    if not len(bounds):
        return np.ones(n, bool)
    excluded = bounds[bounds > -10 * np.log(share)]
    bound = excluded[0] if len(excluded) else bounds[-1]
    return ~((distances > bound) & most_suspicious(distances, limit))


def clean_by_covariance(x, share, limit):
    """Which samples (n,) bool a robust estimate of the covariance of x (n, dim), centred, rests on:
    the filter of Diakonikolas et al. 2017 (arXiv 1703.00893), round by round, until the fourth
    moments are those of normal samples or `limit` samples are gone. share: of the poison."""
    kept = np.arange(len(x))
    while limit > 0:
        inside = inside_one_round(x[kept], share, limit)
        if inside.all():
            break
        limit -= int((~inside).sum())
        kept = kept[inside]
    return np.isin(np.arange(len(x)), kept)


def quantum_entropy_scores(x, expected):
    """SPECTRE's scores (n,) of samples x (n, k), centred, whitened by the robust covariance."""
    share = min(0.5, expected / len(x))
    limit = min(2 * expected, len(x) // 2)
    clean = clean_by_covariance(x, share, limit)
    return entropy_scores(whitened(x, np.cov(x[clean].T, bias=True)))


def separation(x, removed):
    """How far the removed samples stand out from the rest, by which SPECTRE chooses: the quantum
    entropy score of all samples x (n, dim), whitened by those that stay."""
    white = whitened(x, np.cov(x[~removed].T))
    covariance = np.atleast_2d(np.cov(white.T))
    return np.trace(covariance @ entropy_weights(covariance))


def spectre(samples, expected):
    """SPECTRE (Hayase et al. 2021, arXiv 2104.11315, algorithms 1 to 3, and the authors' code): k
    principal components are whitened by a robust estimate of the clean samples' covariance, and
    quantum entropy scores tell what still stands out; the k is taken, of CANDIDATES, for which the
    removed samples do so most among 100 components.

    As published, but that there are fewer components where there are few samples or dimensions,
    and that the robust estimate keeps at least half of the samples."""
    x = samples["x"].astype(float)
    budget = removal_budget(expected)
    most = min(CANDIDATES[-1], x.shape[1], (len(x) - budget) // 2)
    if most < 1:
        raise ValueError("hardly any would be left")
    low = principal_components(x, most)
    best = -np.inf
    for k in CANDIDATES:
        if k > most:
            break
        scores = quantum_entropy_scores(low[:, :k], expected)
        removed = most_suspicious(scores, budget)
        separated = separation(low, removed)
        if separated > best:
            best = separated
            best_scores = scores
    return best_scores, most_suspicious(best_scores, budget)


# -------------------------------------------------------------------------------------------------
# variants of SPECTRE, Beatrix and ABL


def spectre_of_twenty(samples, expected, components=20):
    """A variant of SPECTRE: 20 principal components instead of a number that is chosen, and the
    minimum covariance determinant (Rousseeuw 1984) of as many samples as should be clean instead of
    a filter. It tells what these two are worth."""
    low = principal_components(samples["x"], min(components, *samples["x"].shape))
    clean_share = 1 - 1.5 * expected / len(low)
    robust = MinCovDet(support_fraction=max(0.5, clean_share), random_state=0).fit(low)
    scores = entropy_scores(whitened(low - robust.location_, robust.covariance_))
    return scores, most_suspicious(scores, removal_budget(expected))


def deviation(x):
    """Distance from the median in median absolute deviations, (n, ...) -> (n, ...)."""
    distance = np.abs(x - np.median(x, 0))
    return distance / (np.median(distance, 0) + 1e-9)


def signed_power(x, power):
    return np.sign(x) * np.abs(x) ** power


def grams_of_means(samples, expected, orders=(1, 2, 3, 4), bound=10.0, components=20):
    """A variant of Beatrix (Ma et al. 2023, arXiv 2209.11715) for embeddings that are means over
    time: how far a sample's Gram matrices are from the class's medians, in median absolute
    deviations beyond ten.

    Published are Gram matrices over positions, orders 1 to 8, medians and thresholds of samples
    that are known to be clean: that is the detector "Beatrix" (detectors.py). Here a Gram matrix is
    of a single vector, 20 principal components whose signs the powers keep; medians are those of
    the class with its poison, and a budget is removed.
    """
    low = principal_components(samples["x"], min(components, *samples["x"].shape))
    rows, columns = np.triu_indices(low.shape[1])
    scores = np.zeros(len(low))
    for order in orders:
        powered = signed_power(low, order)
        gram = np.einsum("ni,nj->nij", powered, powered)[:, rows, columns]
        beyond = np.maximum(deviation(signed_power(gram, 1 / order)) - bound, 0)
        scores += beyond.mean(1)
    return scores, most_suspicious(scores, removal_budget(expected))


def low_early_loss(samples, expected):
    """The idea behind anti-backdoor learning (ABL, Li et al. 2021, arXiv 2110.11571), that poison
    is learned first: removes the lowest losses, 1% of the training set, which is ABL's share.

    This is not ABL. ABL isolates those samples after a training of its own, 10 to 20 epochs in
    which the gradient's sign is turned where the loss is below 0.5 (local gradient ascent), or in
    which the loss is kept around 0.5 (flooding), so that clean samples stay at that loss while
    poison falls below; then it trains on and unlearns the isolated samples by gradient ascent. That
    takes a training loop, and a bound in nats of the attacked label's tokens. Here the loss is that
    of the whole answer, of which the target may be a few tokens, in the first quarter of an
    ordinary training, as log.jsonl has it for each sample."""
    scores = -samples["early_loss"]
    return scores, most_suspicious(scores, round(0.01 * samples["training"]))


FILTERS = {
    "activation clustering, relative size": smallest_cluster,
    "activation clustering, silhouette": well_fitting_cluster,
    "activation clustering, speaker and sentence regressed out": regressed_out,
    "spectral signatures": spectral_signatures,
    "SPECTRE": spectre,
    "SPECTRE, 20 components, least determinant": spectre_of_twenty,
    "Gram matrices of mean embeddings": grams_of_means,
    "low early loss": low_early_loss,
}
