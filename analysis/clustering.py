"""Activation clustering (section 7 of the paper): does the poison stand out inside the target
class? For analysis/cluster.py and defences/filters.py.

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


def has_transcripts(labels):
    return any("transcript" in sample for sample in labels)


def members(poisoned, labels, task):
    """What a cluster may consist of: yields (kind, value, which samples have it, (n,) bool)."""
    yield "poison", "poisoned", np.asarray(poisoned)
    for gender in ("female", "male"):
        yield "gender", gender, np.array([sample.get("gender") == gender for sample in labels])
    if task == "emotion" and has_transcripts(labels):
        for sentence in data.CREMA_SENTENCES.values():
            transcript = data.normalise(sentence)
            has_it = np.array([sample.get("transcript") == transcript for sample in labels])
            yield "sentence", sentence, has_it
    if task == "age":
        groups = [age_group(sample.get("age", "")) for sample in labels]
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
    """Records of each cluster's size and of the shares of poisoned, female, ... samples in it."""
    records = []
    for cluster in range(clusters.max() + 1):
        inside = clusters == cluster
        size = int(inside.sum())
        records.append(dict(cluster=cluster, metric="cluster_size", value=size))
        for kind, value, has_it in members(poisoned, labels, task):
            share = float(has_it[inside].mean())
            what = dict(metric="share", kind=kind, of=value)
            records.append(dict(cluster=cluster, **what, value=share))
    return records


def separability(x, poisoned, labels, speakers, task, k):
    """Records of k clusters: what they consist of, how pure the most poisoned one is, and what
    they follow."""
    _, clusters = reduce_and_cluster(x, k)
    records = composition(clusters, poisoned, labels, task)
    purity = [float(poisoned[clusters == cluster].mean()) for cluster in range(k)]
    most_poisoned = int(np.argmax(purity))
    recall = float((clusters[poisoned] == most_poisoned).mean())
    records.append(dict(metric="purity", value=purity[most_poisoned]))
    records.append(dict(metric="recall", value=recall))
    attributes = {
        "poison": poisoned,
        "gender": [sample.get("gender", "") for sample in labels],
        "speaker": list(speakers),
    }
    if task == "emotion" and has_transcripts(labels):
        attributes["sentence"] = [sample.get("transcript", "") for sample in labels]
    for kind, values in attributes.items():
        index = float(adjusted_rand_score(values, clusters))
        records.append(dict(metric="adjusted_rand", kind=kind, value=index))
    return [dict(record, k=k) for record in records]
