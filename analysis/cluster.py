"""python analyze.py cluster: does the poison stand out in the target class (section 7, Figures 4
to 6)?"""

from utils import die

import runs
from analysis import clustering, plots
from analysis.shift import embeddings_of
from runs import mean_of, number, over_seeds, select, show
from study import DEFAULT_ENCODER

FOLLOWED = 0.1  # the least adjusted Rand index with what clusters are said to follow


def measure(folder, preset, ks):
    """Writes the records of each base attack's target class beside its embeddings, those of each k
    to a file of their own."""
    for path, saved in embeddings_of(folder, preset):
        train = saved["train"]
        fields = {**saved["fields"], "source": "cluster"}
        if fields["scenario"] != "base":
            continue
        x = train["encoder"].numpy()
        poisoned = train["poisoned"].numpy()
        if len(poisoned) <= max(ks) or len(set(poisoned)) < 2:
            continue
        records = [dict(fields, **record) for record in clustering.whole_class(x, poisoned)]
        runs.write(path.parent / "records-cluster.jsonl", records)
        for k in ks:
            clusters = clustering.separability(
                x, poisoned, train["labels"], train["speakers"], fields["task"], k
            )
            records = [dict(fields, **record) for record in clusters]
            runs.write(path.parent / f"records-cluster-k{k}.jsonl", records)


def page(records, out, preset, ks=(2, 4)):
    """What the clusters of each task's target class consist of; draws them."""
    records = runs.study_records(records, preset)
    records = select(records, source="cluster", encoder=DEFAULT_ENCODER[preset])
    measured = [k for k in ks if select(records, k=k)]
    if not measured:
        wanted = ", ".join(str(k) for k in ks)
        die(f"no clusters of k = {wanted}: embed.py first")
    rows = []
    followers = []
    for task in runs.tasks_of(records):
        of_task = select(records, task=task)
        rows.append(task_row(of_task, task, measured))
        for k in measured:
            followers.append(follower_row(of_task, task, k))
    for k in measured:
        draw_shares(select(records, k=k), k, out)
    title = "Activation clustering: means over seeds, of the most poisoned cluster"
    return [(title, rows), ("What the clusters follow, seed by seed", followers)]


def task_row(records, task, ks):
    """How far the poison of one task stands out, for each k."""
    first = runs.first_seed(records)
    size = select(first, metric="class_size")[0]["value"]
    poisoned = select(first, metric="class_poisoned")[0]["value"]
    row = {"Task": task, "Seeds": len(runs.distinct(records, "seed"))}
    row["Samples, first seed"] = number(size, ".0f")
    row["Poisoned, first seed"] = number(poisoned, ".0f")
    for k in ks:
        of_k = select(records, k=k)
        for metric in ("purity", "recall"):
            row[f"k = {k}, {metric}"] = number(mean_of(over_seeds(of_k, metric=metric)), ".2f")
        if k == ks[0]:
            for kind in ("poison", "gender"):
                index = over_seeds(of_k, metric="adjusted_rand", kind=kind)
                row[f"k = {k}, Rand index with {kind}"] = show(index, ".2f")
    row["Linear probe"] = number(mean_of(over_seeds(records, metric="probe")), ".2f")
    row["Silhouette, k = 2"] = number(mean_of(over_seeds(records, metric="silhouette")), ".2f")
    return row


def follower_row(records, task, k):
    """What k clusters follow in each seed: the attribute with the largest adjusted Rand index."""
    indices = select(records, k=k, metric="adjusted_rand")
    row = {"Task": task, "k": k}
    for seed in sorted(runs.distinct(indices, "seed")):
        closest = max(select(indices, seed=seed), key=lambda record: record["value"])
        row[f"Seed {seed}"] = closest["kind"] if closest["value"] >= FOLLOWED else "nothing"
    return row


def draw_shares(records, k, out):
    """Figures 4 and 6: what each cluster consists of, in the first seed of each task."""
    by_task = runs.first_seed_by_task(records)
    plots.cluster_shares(by_task, k, out / f"clusters-k{k}.png")
    sentences = select(by_task.get("emotion", []), kind="sentence", metric="share")
    if k == 4 and sentences:
        plots.sentences(sentences, out / "clusters-sentences.png")


def draw_classes(folder, preset, out):
    """Figure 5, of the first seed of each base attack."""
    points = {}
    for _, saved in embeddings_of(folder, preset):
        task = saved["fields"]["task"]
        train = saved["train"]
        if saved["fields"]["scenario"] != "base" or task in points or len(train["ids"]) <= 2:
            continue
        low, _ = clustering.reduce_and_cluster(train["encoder"].numpy(), 2)
        points[task] = low, train["poisoned"].numpy()
    if points:
        plots.target_class(points, out / "target-class.png")
