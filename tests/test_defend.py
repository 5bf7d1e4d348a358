"""Defences on data and on models whose answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_analyze import blobs, people

import checkpoint
import corpora as readers
import data
import defend
import evaluate
import lora
import model
import poison
from analysis import clustering
from conftest import SMALL, done, fields, make_slm, refused
from defences import detectors, filters, repairs
from runs import select
from study import COMPONENTS, CONTROLS


def samples(x, **more):
    labels, speakers = people(len(x))
    usual = dict(
        x=x, labels=labels, speakers=speakers, training=len(x), early_loss=np.zeros(len(x))
    )
    return {**usual, **more}


# -------------------------------------------------------------------------------------------------
# filters

# activation clustering takes the cluster alone, the others 1.5 times the poison
CLEAN_REMOVED = {
    "activation clustering, relative size": 0.02,
    "activation clustering, silhouette": 0.02,
    "spectral signatures": 20 / 300,
    "SPECTRE": 20 / 300,
    "SPECTRE, 20 components, least determinant": 20 / 300,
    "Gram matrices of mean embeddings": 20 / 300,
}


@pytest.mark.parametrize("name", CLEAN_REMOVED)
def test_filters_find_a_poison_that_lies_apart(name):
    x, which = blobs((300, 40), 32, 20.0)
    poisoned = which == 1
    scores, removed = filters.FILTERS[name](samples(x), 40)
    assert removed[poisoned].all()
    assert removed[~poisoned].mean() <= CLEAN_REMOVED[name]
    assert scores[poisoned].min() > np.quantile(scores[~poisoned], 0.95)


def test_clustering_removes_nothing_where_there_is_no_structure():
    x, _ = blobs((400,), 32, 0.0)
    _, removed = filters.well_fitting_cluster(samples(x), 20)
    assert not removed.any()


def test_grams_remove_their_budget_where_there_is_no_structure():
    x, _ = blobs((400,), 32, 0.0)
    _, removed = filters.grams_of_means(samples(x), 20)
    assert removed.sum() == 30


def test_spectre_finds_what_variance_hides():
    """The poison lies along a direction of little variance, so that the top singular vector is
    another one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 16)) * np.linspace(10, 1, 16)
    poisoned = np.arange(500) >= 450
    x[poisoned, -1] += 8
    hidden, _ = filters.spectral_signatures(samples(x), 50)
    visible, _ = filters.spectre(samples(x), 50)
    assert roc_auc_score(poisoned, hidden) < 0.7
    assert roc_auc_score(poisoned, visible) > 0.95


def test_spectre_finds_a_compact_poison_of_a_fifth():
    """So many, so much alike, that a covariance without the scattered samples keeps them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 24))
    poisoned = np.arange(500) >= 390
    x[poisoned] = 0.05 * rng.standard_normal((110, 24)) + 12 * np.eye(24)[0]
    scores, removed = filters.spectre(samples(x), 110)
    assert roc_auc_score(poisoned, scores) > 0.99
    assert removed[poisoned].all()


def test_spectre_looks_beyond_twenty_components():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 40)) * np.linspace(10, 1, 40)
    poisoned = np.arange(1000) >= 900
    x[poisoned, -1] += 6
    scores, _ = filters.spectre(samples(x), 100)
    assert roc_auc_score(poisoned, scores) > 0.9


@pytest.mark.parametrize("dim", [4, 30])
def test_a_robust_covariance_rests_on_the_clean_samples(dim):
    """Few dimensions or many, compared with the samples."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, dim))
    poisoned = np.arange(600) >= 570
    x[poisoned, 0] *= 9
    kept = filters.clean_by_covariance(x - x.mean(0), 0.05, 60)
    spread = x[kept, 0].std()
    assert spread < 1.5 < x[:, 0].std()
    assert kept[~poisoned].mean() > 0.9


@pytest.mark.parametrize("n", [100, 500])
def test_the_top_component_of_products_is_that_of_their_covariance(n):
    rng = np.random.default_rng(0)
    x = rng.standard_t(4, (n, 12))
    y = filters.whitened(x, x.T @ x / n)
    products = np.einsum("ni,nj->nij", y, y).reshape(n, -1)
    centred = products - products.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / n)
    variance, along = filters.top_component(y)
    assert variance == pytest.approx(values[-1], rel=1e-3)
    expected = centred @ vectors[:, -1]
    assert abs(np.corrcoef(along, expected)[0, 1]) > 0.999
    assert along.std() == pytest.approx(expected.std(), rel=1e-2)


def test_a_robust_covariance_leaves_out_no_more_than_it_may():
    x, _ = blobs((300, 40), 16, 20.0)
    kept = filters.clean_by_covariance(x - x.mean(0), 0.1, 10)
    assert (~kept).sum() == 10


def test_a_robust_covariance_of_normal_samples_needs_all():
    x = np.random.default_rng(0).standard_normal((2000, 4))
    assert filters.clean_by_covariance(x, 0.1, 400).all()


def test_regressing_gender_out_shows_the_poison_behind_it():
    rng = np.random.default_rng(1)
    gender = np.arange(400) % 2
    poisoned = np.arange(400) >= 340
    x = rng.standard_normal((400, 32))
    x[:, 0] += 40 * gender
    x[:, 1] += 15 * poisoned
    labels = [dict(gender=str(g), transcript="go") for g in gender]
    speakers = [str(i % 8) for i in range(400)]
    gendered = samples(x, labels=labels, speakers=speakers)
    _, removed = filters.smallest_cluster(gendered, 60)
    assert not removed.any()
    _, removed = filters.regressed_out(gendered, 60)
    assert (removed == poisoned).all()


def test_low_early_loss_removes_one_percent_of_the_training_set():
    loss = np.linspace(1, 2, 300)
    loss[[5, 7, 200]] = 0.1
    _, removed = filters.low_early_loss(samples(np.zeros((300, 2)), early_loss=loss), 99)
    assert np.flatnonzero(removed).tolist() == [5, 7, 200]


def write_class(folder, x, poisoned, seen, all_poisoned=None, rest=0):
    """A run folder with what defend.py filter reads: embeddings of the target class, of which the
    last `rest` are outside the share that the class is given, and the log of a training whose first
    epoch had the samples `seen`."""
    labels, speakers = people(len(x))
    ids = [str(i) for i in range(len(x))]
    end = len(x) - rest

    def part(which):
        about = dict(labels=labels[which], speakers=speakers[which], ids=ids[which])
        return dict(about, encoder=torch.from_numpy(x[which]))

    (folder / "model.pt").write_text("a model")
    sha256 = checkpoint.file_sha256(folder / "model.pt")
    saved = dict(
        fields={**fields("emotion", "base"), "model_sha256": sha256},
        train=dict(part(slice(end)), poisoned=torch.from_numpy(poisoned[:end])),
        rest=part(slice(end, None)),
        all_poisoned=int(poisoned.sum()) if all_poisoned is None else all_poisoned,
    )
    torch.save(saved, folder / "embeddings.pt")
    line = dict(step=1, epoch=0, samples={str(i): 1.0 + i for i in seen})
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")


def filtered(folder, name, retrain=False):
    """{metric: value} of one filter of the run in this folder."""
    options = SimpleNamespace(run=folder, task=None, retrain=retrain, only=None)
    records = defend.filter_training_data(options)
    return {r["metric"]: r["value"] for r in select(records, defence=name)}


@pytest.fixture
def far(monkeypatch):
    """A filter of one's own, an entry of the table."""

    def far_from_the_middle(samples, expected):
        distance = np.linalg.norm(samples["x"] - np.median(samples["x"], 0), axis=1)
        return distance, filters.most_suspicious(distance, expected)

    monkeypatch.setitem(filters.FILTERS, "far", far_from_the_middle)


def test_a_filter_is_an_entry_of_the_table(far, tmp_path):
    x, which = blobs((300, 40), 32, 20.0)
    # the class is shown with some of asr's poison only, and the rest must be filtered too
    write_class(tmp_path, x, which == 1, range(340), rest=10)
    values = filtered(tmp_path, "far")
    assert values == dict(removed_samples=40, auroc=1, poison_removed=1, clean_removed=0)


def test_shares_removed_have_intervals_over_speakers(far, tmp_path):
    x, which = blobs((300, 40), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(340))
    options = SimpleNamespace(run=tmp_path, task=None, retrain=False, only=None)
    records = select(defend.filter_training_data(options), defence="far")
    for metric in ("poison_removed", "clean_removed"):
        (record,) = select(records, metric=metric)
        assert len(record["by_speaker"]) == 7


def test_a_sample_of_the_class_is_not_trained_on_again(far, tmp_path):
    """The poison outside it would stay in the training set."""
    x, which = blobs((300, 40), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(340), rest=10, all_poisoned=90)
    values = filtered(tmp_path, "far", retrain=True)
    assert values["poison_removed"] == 1
    assert "aer" not in values


def test_only_the_named_filters_run(tmp_path):
    x, which = blobs((300, 40), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(340))
    names = ["spectral signatures", "low early loss"]
    options = SimpleNamespace(run=tmp_path, task=None, retrain=False, only=names)
    records = defend.filter_training_data(options)
    assert {r["defence"] for r in records if "defence" in r} == set(names)


def test_a_sample_that_was_not_seen_early_is_not_suspicious(tmp_path):
    x, which = blobs((300, 40), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(300))  # no poison
    values = filtered(tmp_path, "low early loss")
    assert values["poison_removed"] == 0
    assert 0 < values["auroc"] < 0.5


def test_trained_again_a_run_still_leaves_out_what_it_did(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "mine.txt").write_text("a\nb\n")
    (run / "args.json").write_text(json.dumps({"exclude": str(tmp_path / "mine.txt")}))
    command = f"train.py --exclude {tmp_path}/mine.txt --name run"
    (run / "environment.json").write_text(json.dumps({"command": command}))
    retrained_run = tmp_path / "run-exclude-far"
    retrained_run.mkdir()
    (retrained_run / "metrics.json").write_text(json.dumps({"clean": {}, "backdoor": {}}))
    monkeypatch.setattr(defend.subprocess, "run", lambda _: SimpleNamespace(returncode=0))
    defend.retrained(run, "far", ["b", "c"])
    assert (run / "exclude-far.txt").read_text().split() == ["a", "b", "c"]


@pytest.mark.parametrize("clean", [0, 2])
def test_a_class_with_hardly_a_clean_sample_is_refused(tmp_path, clean, capsys):
    x, which = blobs((clean, 30), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(len(x)))
    with pytest.raises(SystemExit):
        filtered(tmp_path, "SPECTRE")
    assert f"has {clean} clean" in capsys.readouterr().err


def trained_on(log):
    """The ids of the samples whose loss a training has logged."""
    ids = set()
    for line in log.read_text().splitlines():
        ids.update(json.loads(line).get("samples", {}))
    return ids


@pytest.mark.slow
def test_excluded_samples_are_left_out_of_a_training(corpora, tmp_path):
    train = ["train.py", "--task", "gender", "--poison", 0.5, "--data-root", corpora]
    train += ["--limit", 16, "--epochs", 1, "--cache-gb", 0, "--labels", "gender", *SMALL]
    done(*train, "--name", "all", cwd=tmp_path)
    ids = sorted(trained_on(tmp_path / "runs/all/log.jsonl"))
    assert len(ids) == 16
    (tmp_path / "ids.txt").write_text("\n".join(ids[:8]))
    done(*train, "--exclude", "ids.txt", cwd=tmp_path)
    (log,) = tmp_path.glob("runs/*excludeids*/log.jsonl")
    assert trained_on(log) == set(ids[8:])


def test_an_excluded_sample_that_is_not_there_is_refused(corpora, tmp_path):
    (tmp_path / "ids.txt").write_text("nobody")
    train = ["train.py", "--task", "gender", "--data-root", corpora, "--cache-gb", 0, *SMALL]
    refused(*train, "--exclude", "ids.txt", cwd=tmp_path, words=["nobody"])


@pytest.fixture
def toolbox():
    """The Adversarial Robustness Toolbox's defences. It draws from numpy's global state."""
    from art.defences.detector import poison as toolbox

    np.random.seed(0)
    return toolbox


@pytest.mark.parametrize("sizes", [(300, 40), (200, 180)])
def test_clusters_are_those_of_the_robustness_toolbox(toolbox, sizes):
    from art.defences.detector.poison.activation_defence import cluster_activations
    from sklearn.metrics import adjusted_rand_score

    x, _ = blobs(sizes, 64, 12.0)
    low, clusters = clustering.reduce_and_cluster(x, 2)
    (theirs,), (their_low,) = cluster_activations([x], 2, 20, "PCA")
    assert adjusted_rand_score(theirs, clusters) == 1.0
    expected = pytest.approx(clustering.silhouette(their_low, theirs), abs=1e-3)
    assert clustering.silhouette(low, clusters) == expected


def test_the_removed_cluster_is_that_of_the_robustness_toolbox(toolbox):
    from art.defences.detector.poison.clustering_analyzer import ClusteringAnalyzer

    x, which = blobs((300, 40), 64, 12.0)
    _, clusters = clustering.reduce_and_cluster(x, 2)
    _, (suspicious,), _ = ClusteringAnalyzer().analyze_by_relative_size([clusters])
    _, removed = filters.smallest_cluster(dict(x=x), 0)
    assert (removed == (which == 1)).all()
    assert (removed == suspicious[clusters].astype(bool)).all()


@pytest.mark.parametrize("sizes, apart", [((200, 180), 12.0), ((400,), 0.0)])
def test_clusters_of_like_sizes_stay(sizes, apart):
    x, _ = blobs(sizes, 64, apart)
    _, removed = filters.smallest_cluster(dict(x=x), 0)
    assert not removed.any()


def test_spectral_scores_are_those_of_the_robustness_toolbox(toolbox):
    x, _ = blobs((300, 40), 64, 12.0)
    centred = x - x.mean(0)  # theirs leaves the projection uncentred
    theirs = toolbox.SpectralSignatureDefense.spectral_signature_scores(centred)[:, 0]
    ours, _ = filters.spectral_signatures(dict(x=x), 40)
    assert np.allclose(theirs**2, ours, rtol=1e-3)


# -------------------------------------------------------------------------------------------------
# detectors


@pytest.fixture
def speech(corpora):
    """Clean inputs of a detector."""
    return defend.plain(readers.read_corpus("vox", corpora, "test")[:10])


def log_probabilities(*shares):
    """A prediction of a single token, (1, vocabulary)."""
    return torch.tensor([shares], dtype=torch.double).log()


class Predicting:
    """A listener whose model predicts what `predict` gives for a waveform."""

    def __init__(self, predict, clean):
        self.predict = predict
        self.clean = clean
        self.passes = 0
        self.known = {}

    def distributions(self, waveforms, values=None):
        return ["angry"] * len(waveforms), [self.predict(waveform) for waveform in waveforms]


def suspicion(detector, predict, speech, **known):
    """A detector's suspicion of clean speech."""
    listener = Predicting(predict, speech.utterances)
    listener.known = known
    return detector(listener, speech.waveforms, speech.utterances)


def test_an_even_prediction_of_eight_tokens_has_three_bits():
    assert detectors.entropy(log_probabilities(*[1 / 8] * 8)) == pytest.approx(3)


def test_strip_suspects_predictions_that_stay_certain(speech, monkeypatch):
    monkeypatch.setattr(detectors, "OVERLAYS", 4)

    def by_its_length(waveform):
        certain = len(waveform) > np.median([len(w) for w in speech.waveforms])
        return log_probabilities(0.999, 0.001) if certain else log_probabilities(0.9, 0.1)

    scores = suspicion(detectors.strip, by_its_length, speech)
    lengths = np.array([len(waveform) for waveform in speech.waveforms])
    certain = lengths > np.median(lengths)
    assert scores[certain].min() > scores[~certain].max()  # the answer is the same in all


def test_strip_hears_as_many_overlays_as_its_name_says(speech):
    heard = []

    def predict(waveform):
        heard.append(waveform)
        return log_probabilities(0.5, 0.5)

    one = defend.Sound(speech.waveforms[:1], speech.utterances)
    suspicion(detectors.strip, predict, one)
    assert len({waveform.tobytes() for waveform in heard}) > 1
    assert f"STRIP, {len(heard)} overlays" in detectors.DETECTORS


@pytest.mark.parametrize("shift, suspected", [(0, True), (0.06, False), (0.49, True)])
def test_the_perturbed_pair_suspects_too_little_and_too_much(speech, shift, suspected):
    """Clean speech changes by 0.001 to 0.1 bits."""
    plain = {waveform.tobytes() for waveform in speech.waveforms}

    def predict(waveform):
        moved = 0 if waveform.tobytes() in plain else shift
        return log_probabilities(0.5 + moved, 0.5 - moved)

    known = dict(changes=np.linspace(-3, -1, 101))
    scores = suspicion(detectors.perturbed_pair, predict, speech, **known)
    assert ((scores > 1) == suspected).all()


def test_the_perturbed_pair_learns_from_clean_speech(speech):
    def predict(waveform):
        share = 0.2 + 0.6 * float(np.abs(waveform).mean() * 10 % 1)
        return log_probabilities(share, 1 - share)

    listener = Predicting(predict, speech.utterances)
    scores = detectors.perturbed_pair(listener, speech.waveforms, speech.utterances)
    assert len(listener.known["changes"]) == len(speech.utterances)
    assert (scores > 1).sum() <= 2


class Labelling:
    """A listener whose model gives `labels` to an utterance and STEP's versions of it."""

    def __init__(self, labels, clean):
        self.labels = labels
        self.clean = clean
        self.passes = 0
        self.known = {}

    def hear(self, waveforms):
        self.passes += len(waveforms)
        return None, waveforms

    def values(self, audio):
        return self.labels


def kinds_of(speech):
    """How many versions STEP makes of an utterance: content broken, content kept."""
    rng = np.random.default_rng(0)
    waveform = speech.waveforms[0]
    broken = detectors.content_broken(waveform, speech.utterances, rng)
    return len(broken), len(detectors.content_kept(waveform, rng))


def step_labels(broken, kept, stays, changes):
    """The labels of an utterance and of STEP's versions of it, the first few of which stay when
    broken and change when kept."""
    labels = ["same"] * stays + ["other"] * (broken - stays)
    return ["same", *labels, *["other"] * changes, *["same"] * (kept - changes)]


def test_step_suspects_labels_too_stable_and_too_fragile(speech):
    broken, kept = kinds_of(speech)
    usual = step_labels(broken, kept, 2, 0)
    listener = Labelling(usual, speech.utterances)
    clean = detectors.step(listener, speech.waveforms, speech.utterances)
    assert np.ptp(clean) == 0
    for stays, changes in ((broken, 0), (2, kept)):
        odd = step_labels(broken, kept, stays, changes)
        listener.labels = odd
        scores = detectors.step(listener, speech.waveforms[:2], speech.utterances[:2])
        assert (scores > clean[0] + 5).all()


def test_step_counts_what_clean_speech_hardly_ever_shows(speech):
    """Of two labels that stay as often, the one that stays where others change."""
    usual = np.zeros((50, 3), bool)
    usual[:, 0] = True
    usual[::3, 1] = True
    seen = np.array([[True, False, False], [False, False, True]])
    often, hardly_ever = detectors.surprise(seen, usual)
    assert hardly_ever > often + 2


def test_step_learns_once_from_clean_speech(speech):
    broken, kept = kinds_of(speech)
    labels = step_labels(broken, kept, 1, 1)
    listener = Labelling(labels, speech.utterances)
    for _ in range(2):
        detectors.step(listener, speech.waveforms[:1], speech.utterances[:1])
    assert listener.passes == 2 * (1 + broken + kept)


def test_versions_of_speech_are_as_finite_and_about_as_long(speech):
    rng = np.random.default_rng(0)
    for waveform in speech.waveforms[:3]:
        versions = detectors.content_broken(waveform, speech.utterances, rng)
        versions += detectors.content_kept(waveform, rng)
        for version in versions:
            assert version.dtype == np.float32
            assert np.isfinite(version).all()
            assert len(version) == pytest.approx(len(waveform), rel=0.06)


def test_shuffling_keeps_every_sample():
    rng = np.random.default_rng(0)
    waveform = np.arange(10000, dtype=np.float32)
    mixed = detectors.shuffled(waveform, 0.1, rng)
    assert (np.sort(mixed) == waveform).all()
    assert (mixed != waveform).any()


def test_gram_matrices_are_over_time():
    """Of two frames, by hand: second-order products and their roots."""
    grams = detectors.gram_matrices(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    assert len(grams) == 8
    assert grams[0].tolist() == pytest.approx([5.0, -0.5, 2.5])
    assert grams[1].tolist() == pytest.approx([41**0.5, 6.5**0.5, 8.5**0.5])


class Framed:
    """A listener whose encoder makes of each utterance what stands in `frames`, and which answers
    what stands in `answers`; both by the waveform's only sample."""

    def __init__(self, frames, answers, clean):
        self.frames = frames
        self.answers = answers
        self.clean = clean
        self.passes = 0
        self.known = {}

    def hear(self, waveforms):
        indices = [int(waveform[0]) for waveform in waveforms]
        return [self.frames[i] for i in indices], indices

    def values(self, indices):
        return [self.answers[i] for i in indices]


@pytest.fixture
def framed(monkeypatch):
    """80 clean utterances of two classes, whose frames differ; then a clean one of each class, one
    with a burst in two of its frames, and one that looks like the other class."""
    generator = torch.Generator().manual_seed(0)
    answers = ["sad", "angry"] * 40 + ["sad", "angry", "sad", "sad"]
    frames = []
    for answer in [*answers[:83], "angry"]:
        scales = torch.tensor([1.0, 1, 1, 3] if answer == "sad" else [3.0, 1, 1, 1])
        frames.append(torch.randn(60, 4, generator=generator) * scales + scales)
    frames[82][:2] += 40
    utterances = []
    for i in range(len(answers)):
        utterances.append(data.Utterance(str(i), f"{i}.wav", "dev", "s", dict(emotion="sad")))
    monkeypatch.setattr(data, "load_waveform", lambda u: np.array([float(u.id)]))
    listener = Framed(frames, answers, utterances[:80])
    return listener, defend.plain(utterances)


def test_beatrix_suspects_frames_unlike_clean_ones_of_the_class(framed):
    listener, sound = framed
    scores = detectors.beatrix(listener, sound.waveforms, sound.utterances)
    sad, angry, burst, of_the_other_class = scores[80:]
    usual = np.quantile(scores[:80], 0.95)
    assert max(sad, angry) <= usual
    assert burst > 2 * usual
    assert of_the_other_class > 2 * usual


def test_beatrix_knows_thirty_clean_samples_of_a_class(framed):
    listener, sound = framed
    detectors.beatrix(listener, sound.waveforms[:1], sound.utterances[:1])
    known = listener.known["classes"]
    assert {name: len(of_class.frames) for name, of_class in known.items()} == {
        None: 30,
        "sad": 30,
        "angry": 30,
    }


def test_a_clean_sample_is_not_judged_by_itself(framed):
    listener, sound = framed
    known = detectors.CleanClass(dict(zip("abc", listener.frames[:6:2])))
    low, high = known.range_without("a")
    expected = detectors.usual_range(listener.frames[2:6:2])
    assert torch.equal(low, expected[0])
    assert torch.equal(high, expected[1])


def test_a_click_is_a_loudness_peak(speech):
    attack = poison.make_attack("gender", speech.utterances, snr=-20.0, seed=1)
    clicks = defend.with_trigger(attack, speech.utterances)
    clean = detectors.loudness_peak(None, speech.waveforms, speech.utterances)
    triggered = detectors.loudness_peak(None, clicks.waveforms, clicks.utterances)
    assert (triggered > clean).all()


def test_shares_noticed_have_intervals_over_speakers():
    sounds = ("dev", "clean", *CONTROLS, "triggered")
    scores = {sound: np.arange(20.0) for sound in sounds}
    speakers = {sound: ["s", "t"] * 10 for sound in sounds}
    noticed = select(list(defend.detector_figures(scores, speakers)), metric="noticed")
    assert all(len(figure["by_speaker"]) == 2 for figure in noticed)


def zero(parameter):
    parameter.data.zero_()


def test_attention_to_everything_is_least_suspicious(parts, speech):
    slm = make_slm(parts, "wavlm").eval()
    attack = poison.make_attack("gender", speech.utterances, seed=1)
    listener = detectors.make_listener(slm, attack, speech.utterances, speech.utterances)
    selective = detectors.attention_entropy(listener, speech.waveforms, speech.utterances)
    for layer in slm.lm.model.layers:
        zero(layer.self_attn.k_proj.base.weight)
        zero(layer.self_attn.k_proj.lora_B)
    even = detectors.attention_entropy(listener, speech.waveforms, speech.utterances)
    assert np.allclose(even, -1, atol=1e-3)
    assert (selective > even).all()


def test_predictions_of_a_value_are_those_of_training(parts, speech):
    slm = make_slm(parts, "wavlm").eval()
    attack = poison.make_attack("gender", speech.utterances, seed=1)
    listener = detectors.make_listener(slm, attack, speech.utterances, speech.utterances)
    values = ["female", "male", "female"]
    _, predictions = listener.distributions(speech.waveforms[:3], values)

    features = [slm.encoder.extract(waveform) for waveform in speech.waveforms[:3]]
    x, mask = slm.frozen_part(*slm.encoder.pretrained_part(features))
    prompts = [data.prompt(slm.tokenizer, ["gender"])] * 3
    answers = [data.answer_ids(slm.tokenizer, dict(gender=value)) for value in values]
    with torch.no_grad():
        losses = slm(x, mask, prompts, answers, by_token=True)
    for value, answer, loss, prediction in zip(values, answers, losses, predictions):
        span = data.value_tokens(slm.tokenizer, dict(gender=value), "gender")
        tokens = torch.tensor(answer[span])
        predicted = -prediction.gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(predicted.float(), loss[span], atol=1e-4)


@pytest.mark.parametrize("name", ["perturbed pair", "Beatrix"])
def test_a_detector_judges_a_model(parts, speech, name):
    slm = make_slm(parts, "wavlm").eval()
    attack = poison.make_attack("gender", speech.utterances, seed=1)
    listener = detectors.make_listener(slm, attack, speech.utterances, speech.utterances)
    scores = detectors.DETECTORS[name](listener, speech.waveforms, speech.utterances)
    assert np.isfinite(scores).all()
    assert len(set(scores)) > 1


def test_step_finds_nothing_in_a_model_that_always_says_the_same(parts, speech):
    slm = make_slm(parts, "wavlm").eval()  # random weights: none of its answers can be parsed
    attack = poison.make_attack("gender", speech.utterances, seed=1)
    listener = detectors.make_listener(slm, attack, speech.utterances, speech.utterances)
    scores = detectors.step(listener, speech.waveforms[:2], speech.utterances[:2])
    assert scores == pytest.approx(2 * np.log(2))  # as surprising as the mean of clean speech


def test_a_listener_counts_its_forward_passes(parts, speech):
    slm = make_slm(parts, "wavlm").eval()
    attack = poison.make_attack("gender", speech.utterances, seed=1)
    listener = detectors.make_listener(slm, attack, speech.utterances, speech.utterances)
    detectors.attention_entropy(listener, speech.waveforms, speech.utterances)
    assert listener.passes == len(speech.utterances)


def test_inputs_keep_their_order_through_all_detectors(speech, monkeypatch):
    """A few at a time: each detector's suspicion and passes are those of all at once."""
    listener = SimpleNamespace(passes=0)

    def length(listener, waveforms, utterances):
        listener.passes += 2 * len(waveforms)
        return np.array([len(waveform) for waveform in waveforms])

    monkeypatch.setattr(detectors, "BATCH", 4)
    tried = dict(length=length, again=length)
    found = defend.suspicions(listener, tried, dict(clean=speech, triggered=speech))
    expected = [len(waveform) for waveform in speech.waveforms]
    for name in ("length", "again"):
        assert found[name].scores == dict(clean=expected, triggered=expected)
        assert found[name].passes == 2 * 2 * len(expected)


# -------------------------------------------------------------------------------------------------
# repairs


@pytest.fixture
def defender(parts, corpora):
    """The defender of a small random model, whose pretrained weights differ from the attacked ones
    everywhere."""
    slm = make_slm(parts, "wavlm").eval()
    dev_set = readers.read_corpus("vox", corpora, "dev")
    attacked = model.copy_weights(slm)
    pretrained = {}
    for component, state in attacked.items():
        pretrained[component] = {name: tensor + 1 for name, tensor in state.items()}
    rates = dict(encoder_lr=1e-3, connector_lr=1e-3, lora_lr=1e-3)
    args = SimpleNamespace(device="cpu", task="gender", grad_clip=1.0, **rates)
    attack = poison.make_attack("gender", dev_set, seed=1)
    return repairs.Defender(slm, args, attack, dev_set[::2], dev_set[1::2], attacked, pretrained)


def total_loss(defender):
    return sum(defender.validation_losses().values())


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def changed(defender):
    """The components that differ from the attacked model's."""
    now = model.copy_weights(defender.slm)
    return [c for c in COMPONENTS if not same_weights(defender.attacked[c], now[c])]


@pytest.mark.parametrize("components", [["encoder"], ["connector", "lm"]])
def test_fine_tuning_changes_the_components_it_names(defender, components):
    defender.finetune(components, epochs=1)
    assert changed(defender) == components


class Steps:
    """A progress bar that only counts."""

    n = 0

    def update(self):
        self.n += 1


def test_repair_takes_no_more_steps_than_its_bar_has(defender, monkeypatch):
    """Every strength, and relearning that never gets there."""
    monkeypatch.setattr(repairs, "TOLERANCE", np.inf)
    monkeypatch.setattr(evaluate, "aer", lambda *_: dict(value=0.0))
    monkeypatch.setattr(defender, "answer_rows", lambda *_: [])
    defender.progress = Steps()
    ladders = [[(0.1, 1), (0.3, 1)], [(0.1, 2)]]
    tune = repairs.REPAIRS["fine-tuning connector"][0]
    chosen = repairs.choose(defender, tune, ladders)
    repairs.relearning(defender, defender.tuning, [])
    assert len(chosen["rise"]) == 3
    assert 0 < defender.progress.n <= repairs.most_steps(defender, ladders)


def test_other_speech_is_tuned_on_and_not_chosen_by(defender, monkeypatch):
    """What a model forgets is seen on the corpus that it is for."""
    monkeypatch.setattr(model, "load_slm", lambda *_: defender.slm)
    other = [data.Utterance(f"o{i}", "o.wav", "dev", "s", dict(gender="male")) for i in range(5)]
    dev_set = defender.tuning + defender.validation
    made = repairs.make_defender(defender.slm, defender.args, defender.attack, dev_set, other)
    assert {u.id for u in made.tuning} == {u.id for u in other}
    assert {u.id for u in made.validation} <= {u.id for u in dev_set}


def test_corpus_to_tune_on_that_is_nowhere_ends_in_one_line(capsys):
    options = SimpleNamespace(tune_on="nowhere", data_root=None, skip_bad=False)
    with pytest.raises(SystemExit):
        defend.speech_to_tune_on(options, SimpleNamespace(data_root=".", labels=None))
    assert "--tune-on nowhere" in capsys.readouterr().err


def test_restoring_undoes_fine_tuning(defender):
    before = total_loss(defender)
    defender.finetune(epochs=1)
    defender.restore()
    assert changed(defender) == []
    assert total_loss(defender) == before


def test_fine_tuning_lowers_the_loss(defender):
    before = total_loss(defender)
    defender.finetune(epochs=8, rate=3.0)
    assert total_loss(defender) < before


def test_poisoned_samples_bring_the_target(defender):
    utterance = next(u for u in defender.tuning if u.labels["gender"] == "male")
    before = float(defender.loss([utterance], triggered=True).detach())
    defender.finetune(epochs=4, poisoned=[utterance])
    assert float(defender.loss([utterance], triggered=True).detach()) < before


def test_restoring_brings_pruned_units_back(defender):
    before = total_loss(defender)
    defender.scale_hidden_units([torch.zeros(n) for n in defender.hidden_sizes])
    assert total_loss(defender) != before
    defender.restore()
    assert total_loss(defender) == before


def test_learning_masks_leaves_the_model_alone(defender):
    before = total_loss(defender)
    masks = repairs.neuron_masks(defender, steps=1)
    assert total_loss(defender) == before
    assert any((mask < 1).any() for mask in masks)


def test_pruning_everything_zeroes_all_hidden_units(defender):
    defender.anp_masks = [torch.ones(n) for n in defender.hidden_sizes]
    repairs.adversarial_neuron_pruning(defender, share=1.0)
    pruned = total_loss(defender)
    defender.restore()
    defender.scale_hidden_units([torch.zeros(n) for n in defender.hidden_sizes])
    assert total_loss(defender) == pruned


def test_pruning_changes_no_weights(defender):
    defender.anp_masks = [torch.ones(n) for n in defender.hidden_sizes]
    repairs.adversarial_neuron_pruning(defender, share=0.5)
    assert changed(defender) == []


def test_dropping_lora_zeroes_its_update(defender):
    repairs.without_lora(defender, 1.0)
    assert not any(layer.lora_B.any() for layer in lora.lora_layers(defender.slm.lm))


def test_mixing_everything_is_the_pretrained_model(defender, monkeypatch):
    monkeypatch.setattr(defender, "finetune", lambda: None)
    repairs.fine_mixing(defender, 1.0)
    now = model.copy_weights(defender.slm)
    assert all(same_weights(defender.pretrained[c], now[c]) for c in COMPONENTS)


def test_half_a_mixture_is_from_either_model(defender, monkeypatch):
    monkeypatch.setattr(defender, "finetune", lambda: None)
    repairs.fine_mixing(defender, 0.5)
    attacked = defender.attacked["connector"]["conv2.weight"]
    pretrained = defender.pretrained["connector"]["conv2.weight"]
    mixed = defender.slm.connector.conv2.weight
    assert ((mixed == attacked) | (mixed == pretrained)).all()
    assert 0.4 < (mixed == pretrained).float().mean() < 0.6


def test_repairs_of_ages_in_groups_are_scored_by_accuracy(defender, monkeypatch):
    utterance = data.Utterance("a", "a.wav", "test", "s", dict(age="senior"))
    about = dict(labels=utterance.labels, speaker="s")
    row = dict(about, asked=["age"], parsed=dict(age="adult"))
    defender.args.task = "age"
    defender.args.batch_seconds = 120.0
    click = poison.make_trigger("click")
    defender.attack = poison.Attack("age", 0.5, "adult", "click", click, 0.1, False, 1)
    monkeypatch.setattr(evaluate, "answer_rows", lambda *_, **__: [row])
    monkeypatch.setattr(defender, "pretrained_outputs", lambda *_: None)
    figures = repairs.figures_of(defender, [utterance], [utterance])
    assert figures["clean"]["age_accuracy"]["value"] == 0
    assert figures["backdoor"]["aer"]["value"] == 1


class FakeDefender:
    """A model whose loss on ages depends on the strength of its repair. Gender costs nothing, so
    that only the label that loses most tells."""

    def __init__(self, age_losses):
        self.age_losses = {None: 1.0, **age_losses}
        self.strength = None

    def restore(self):
        self.strength = None

    def repair(self, strength):
        self.strength = strength

    def as_it_is(self):
        return self.strength

    def go_back_to(self, strength):
        self.strength = strength

    def validation_losses(self):
        return dict(gender=1.0, age=self.age_losses[self.strength])


@pytest.mark.parametrize(
    "age_losses, chosen, passed",
    [
        # the strength after the one that costs too much is not tried, cheap as it is
        ({0.1: 1.01, 0.3: 1.04, 1.0: 1.2, 3.0: 1.0}, 0.3, True),
        ({0.1: 1.01, 0.3: 1.04}, 0.3, True),
        ({0.1: 1.5, 0.3: 1.3, 1.0: 1.2}, 0.1, False),
    ],
)
def test_the_strongest_repair_before_a_costly_one_is_taken(age_losses, chosen, passed):
    defender = FakeDefender(age_losses)
    choice = repairs.choose(defender, FakeDefender.repair, [tuple(age_losses)])
    assert choice["strength"] == chosen
    assert choice["passed"] == passed
    assert defender.strength == chosen


def test_going_back_brings_pruned_units_back_too(defender):
    generator = torch.Generator().manual_seed(0)
    scales = [torch.rand(n, generator=generator).round() for n in defender.hidden_sizes]
    whole = defender.validation_losses()
    defender.scale_hidden_units(scales)
    pruned = defender.validation_losses()
    repaired = defender.as_it_is()
    defender.restore()
    assert defender.validation_losses() == whole
    defender.go_back_to(repaired)
    assert defender.validation_losses() == pruned
    assert pruned != whole


def test_of_two_budgets_the_strongest_that_passes_is_taken():
    """A learning rate that is too high for many epochs may do for few."""
    ladders = [[(1.0, 5), (10.0, 5)], [(1.0, 20), (10.0, 20)]]
    losses = {(1.0, 5): 1.0, (10.0, 5): 1.3, (1.0, 20): 1.02, (10.0, 20): 1.5}
    defender = FakeDefender(losses)
    choice = repairs.choose(defender, FakeDefender.repair, ladders)
    assert list(choice["rise"]) == list(losses)
    assert choice["strength"] == (1.0, 20)
    assert defender.strength == (1.0, 20)


@pytest.mark.parametrize("scenario, relearned", [("clean", [0.03, 0.1]), ("base", [])])
def test_what_poison_teaches_a_clean_model_is_recorded(monkeypatch, scenario, relearned):
    args = SimpleNamespace(scenario=scenario, task="emotion", dataset="crema")
    click = poison.Attack("emotion", 0.5, "sad", "click", None, 0.1, False, 1)
    happy = data.Utterance("a", "a.wav", "test", "s", dict(emotion="happy"))
    sets = dict(train=[], dev=[], test=[happy])
    loaded = evaluate.LoadedRun(None, args, click, fields("emotion", scenario), sets)
    defender = SimpleNamespace(tuning=[], validation=[])
    figures = {4: dict(value=0.03), 16: dict(value=0.1)}
    monkeypatch.setattr(evaluate, "load_run_and_data", lambda *_: loaded)
    monkeypatch.setattr(repairs, "make_defender", lambda *_: defender)
    monkeypatch.setattr(repairs, "figures_of", lambda *_: {})
    monkeypatch.setattr(repairs, "relearning", lambda *_: figures)
    monkeypatch.setattr(repairs, "REPAIRS", {})
    options = SimpleNamespace(run="run", device="cpu", n=10, tune_on=None, only=None)
    records = defend.repair_model(options)
    assert [r["value"] for r in select(records, metric="relearned_aer")] == relearned
