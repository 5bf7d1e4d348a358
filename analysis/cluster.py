"""python analyze.py cluster: does the poison stand out in the target class (section 7, Figures 4
to 6)?"""

from utils import die

import runs
from analysis import clustering, plots
from analysis.shift import embeddings_of
from runs import number, over_seeds, select, show
from study import DEFAULT_ENCODER


def measure(folder, preset, ks):
    """Writes the records of each base attack's target class beside its embeddings, a file for each
    k."""
    for path, saved in embeddings_of(folder, preset):
        train, fields = saved["train"], dict(saved["fields"], source="cluster")
        poisoned = train["poisoned"].numpy()
        if fields["scenario"] != "base" or len(poisoned) <= max(ks) or len(set(poisoned)) < 2:
            continue
        x, task = train["encoder"].numpy(), fields["task"]
        whole = clustering.whole_class(x, poisoned)
        runs.write(path.parent / "records-cluster.jsonl", [dict(fields, **r) for r in whole])
        about = train["labels"], train["speakers"]
        for k in ks:
            found = clustering.separability(x, poisoned, *about, task, k)
            name = f"records-cluster-k{k}.jsonl"
            runs.write(path.parent / name, [dict(fields, **record) for record in found])


def followed(records):
    """What clusters follow: what has the largest adjusted Rand index with them, if it is 0.1 or
    more."""
    most = max(records, key=lambda record: record["value"])
    return most["kind"] if most["value"] >= 0.1 else "nothing"


def page(records, out, preset, ks=(2, 4), folder=None):
    records = select(runs.own(records, preset), source="cluster", encoder=DEFAULT_ENCODER[preset])
    have = [k for k in ks if select(records, k=k)]
    if not have:
        missing = ", ".join(map(str, ks))
        die(f"no clusters of k = {missing}: embed.py first")
    rows, followers = [], []
    for task in runs.tasks_of(records):
        own = select(records, task=task)
        first = select(own, seed=min(runs.distinct(own, "seed")))
        row = {"Task": task, "Seeds": len(runs.distinct(own, "seed"))}
        for column, metric in (("Samples", "class_size"), ("Poisoned", "class_poisoned")):
            row[f"{column}, first seed"] = number(select(first, metric=metric)[0]["value"], ".0f")
        for k in have:
            of_k = select(own, k=k)
            for metric in ("purity", "recall"):
                found = over_seeds(of_k, metric=metric)
                row[f"k = {k}, {metric}"] = number(found and found.mean, ".2f")
            rand = select(of_k, metric="adjusted_rand")
            for kind in ("poison", "gender") if k == have[0] else ():
                index = over_seeds(rand, kind=kind)
                row[f"k = {k}, Rand index with {kind}"] = show(index, ".2f")
            follows = {"Task": task, "k": k}
            for seed in sorted(runs.distinct(rand, "seed")):
                follows[f"Seed {seed}"] = followed(select(rand, seed=seed))
            followers.append(follows)
        for column, metric in (("Linear probe", "probe"), ("Silhouette, k = 2", "silhouette")):
            found = over_seeds(own, metric=metric)
            row[column] = number(found and found.mean, ".2f")
        rows.append(row)
    for k in have:
        shares = {}
        for task in runs.tasks_of(select(records, k=k)):
            own = select(records, task=task, k=k)
            shares[task] = select(own, seed=min(runs.distinct(own, "seed")))
        plots.cluster_shares(shares, k, out / f"clusters-k{k}.png")
        sentences = select(shares.get("emotion", []), kind="sentence", metric="share")
        if k == 4 and sentences:
            plots.sentences(sentences, out / "clusters-sentences.png")
    if folder:
        draw_classes(folder, preset, out)
    title = "Activation clustering: means over seeds, of the most poisoned cluster"
    return [(title, rows), ("What the clusters follow, seed by seed", followers)]


def draw_classes(folder, preset, out):
    """Figure 5 of the first seed of each base attack."""
    points = {}
    for _, saved in embeddings_of(folder, preset):
        task, train = saved["fields"]["task"], saved["train"]
        if saved["fields"]["scenario"] == "base" and task not in points and len(train["ids"]) > 2:
            low = clustering.reduce_and_cluster(train["encoder"].numpy(), 2)[0]
            points[task] = low, train["poisoned"].numpy()
    if points:
        plots.target_class(points, out / "target-class.png")
