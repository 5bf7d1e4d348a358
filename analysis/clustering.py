"""Activation clustering (section 7 of the paper): does the poison stand out inside the target
class? For analyze.py and defences/filters.py.

Embeddings x (n, dim) of the training samples of the target class, after the encoder; poisoned (n,)
bool; labels, one dict of strings a sample; speakers (n,).
"""

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data

FEWEST = 5  # samples of either kind that the linear probe needs for its five folds


def reduce_and_cluster(x, k, components=20):
    """(n, dim) -> (PCA (n, components), clusters (n,)); k-means with ten starts, seed 0."""
    low = PCA(min(components, *x.shape), random_state=0).fit_transform(x)
    return low, KMeans(k, n_init=10, random_state=0).fit_predict(low)


def silhouette(low, clusters):
    """How well the clusters fit (Chen et al. 2018), from -1 to 1."""
    return float(silhouette_score(low, clusters, sample_size=min(len(low), 4000), random_state=0))


def probe(x, poisoned):
    """How well a linear classifier tells the poison from the rest: balanced accuracy over five
    folds."""
    classifier = LogisticRegression(max_iter=1000, C=0.1, class_weight="balanced")
    pipeline = make_pipeline(StandardScaler(), classifier)
    return float(cross_val_score(pipeline, x, poisoned, cv=5, scoring="balanced_accuracy").mean())


def members(poisoned, labels, task):
    """Yields (kind, value, which samples have it (n,) bool) of what a cluster may be made of."""
    yield "poison", "poisoned", np.asarray(poisoned)
    for gender in ("female", "male"):
        yield "gender", gender, np.array([m.get("gender") == gender for m in labels])
    if task == "emotion" and any("transcript" in m for m in labels):
        for sentence in data.CREMA_SENTENCES.values():
            said = data.normalise(sentence)
            yield "sentence", sentence, np.array([m.get("transcript") == said for m in labels])
    if task == "age":
        groups = [age_group(m.get("age", "")) for m in labels]
        for group in sorted(set(groups) - {""}):
            yield "age", group, np.array([other == group for other in groups])


def age_group(age):
    """The decade of an age in years ("25" -> "20 to 29"); a group of ages as it is."""
    if not age.isdigit():
        return age
    decade = int(age) // 10 * 10
    return f"{decade} to {decade + 9}"


def whole_class(x, poisoned):
    """Records about the target class as a whole."""
    figures = dict(
        class_size=len(x),
        class_poisoned=int(poisoned.sum()),
        silhouette=silhouette(*reduce_and_cluster(x, 2)),
    )
    if min(poisoned.sum(), (~poisoned).sum()) >= FEWEST:
        figures["probe"] = probe(x, poisoned)
    return [dict(metric=metric, value=value) for metric, value in figures.items()]


def composition(clusters, poisoned, labels, task):
    """Records of each cluster's size and of what shares of it are what."""
    records = []
    for c in range(clusters.max() + 1):
        inside = clusters == c
        records.append(dict(cluster=c, metric="cluster_size", value=int(inside.sum())))
        for kind, value, which in members(poisoned, labels, task):
            share = float(which[inside].mean())
            records.append(dict(cluster=c, metric="share", kind=kind, of=value, value=share))
    return records


def separability(x, poisoned, labels, speakers, task, k):
    """Records of k clusters: what they are made of, how pure the most poisoned one is, and what
    they follow."""
    clusters = reduce_and_cluster(x, k)[1]
    records = composition(clusters, poisoned, labels, task)
    purity = [float(poisoned[clusters == c].mean()) for c in range(k)]
    worst = int(np.argmax(purity))
    recall = float((clusters[poisoned] == worst).mean())
    records.append(dict(metric="purity", value=purity[worst]))
    records.append(dict(metric="recall", value=recall))
    kinds = dict(
        poison=poisoned, gender=[m.get("gender", "") for m in labels], speaker=list(speakers)
    )
    if task == "emotion" and any("transcript" in m for m in labels):
        kinds["sentence"] = [m.get("transcript", "") for m in labels]
    for kind, values in kinds.items():
        index = float(adjusted_rand_score(values, clusters))
        records.append(dict(metric="adjusted_rand", kind=kind, value=index))
    return [dict(record, k=k) for record in records]
