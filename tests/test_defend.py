"""Defences on data and models whose answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_analyze import blobs, people

import checkpoint
import corpora as readers
import data
import defend
import lora
import poison
import trace
from analysis import clustering
from conftest import SMALL, done, fields, make_slm, refused
from defences import detectors, filters, repairs
from runs import select
from study import COMPONENTS


def samples(x, **more):
    labels, speakers = people(len(x))
    return dict(
        dict(x=x, labels=labels, speakers=speakers, training=len(x), early_loss=np.zeros(len(x))),
        **more,
    )


def test_filters_find_a_poison_that_lies_apart():
    x, which = blobs((300, 40), 32, 20.0)
    poisoned = which == 1
    for name in (
        "activation clustering, relative size",
        "activation clustering, silhouette",
        "spectral signatures",
        "SPECTRE",
        "Beatrix",
    ):
        scores, removed = filters.FILTERS[name](samples(x), 40)
        assert removed[poisoned].all(), name
        assert removed[~poisoned].mean() <= (0.02 if name[:10] == "activation" else 20 / 300), (
            name
        )  # the others take 1.5 times the poison
        assert scores[poisoned].min() > np.quantile(scores[~poisoned], 0.95), name


def test_filters_take_nothing_or_their_budget_where_there_is_no_structure():
    x, _ = blobs((400,), 32, 0.0)
    assert not filters.well_fitting_cluster(samples(x), 20)[1].any()
    assert filters.beatrix(samples(x), 20)[1].sum() == 30


def test_spectre_finds_what_variance_hides():
    """A poison along a direction of little variance: the top singular vector is another one's."""
    rng = np.random.default_rng(0)
    x, poisoned = rng.standard_normal((500, 16)) * np.linspace(10, 1, 16), np.arange(500) >= 450
    x[poisoned, -1] += 8
    auroc = {
        name: defend.roc_auc_score(poisoned, filters.FILTERS[name](samples(x), 50)[0])
        for name in ("spectral signatures", "SPECTRE")
    }
    assert auroc["SPECTRE"] > 0.95 and auroc["spectral signatures"] < 0.7


def test_regressing_gender_out_shows_the_poison_behind_it():
    rng = np.random.default_rng(1)
    gender, poisoned = np.arange(400) % 2, np.arange(400) >= 340
    x = rng.standard_normal((400, 32))
    x[:, 0] += 40 * gender
    x[:, 1] += 15 * poisoned
    of = samples(
        x,
        labels=[dict(gender=str(g), transcript="go") for g in gender],
        speakers=[str(i % 8) for i in range(400)],
    )
    assert not filters.smallest_cluster(of, 60)[1].any()
    assert (filters.regressed_out(of, 60)[1] == poisoned).all()


def test_early_loss_removes_one_percent_of_the_training_set():
    loss = np.linspace(1, 2, 300)
    loss[[5, 7, 200]] = 0.1
    assert np.flatnonzero(
        filters.early_loss(samples(np.zeros((300, 2)), early_loss=loss), 99)[1]
    ).tolist() == [5, 7, 200]


def write_class(folder, x, poisoned, seen, all_poisoned=None, rest=0):
    """A run folder with what defend.py filter reads: embeddings of the target class, and the log of a training that has seen
    these samples in its first epoch."""
    labels, speakers = people(len(x))
    ids, at = [str(i) for i in range(len(x))], len(x) - rest

    def part(a, b):
        about = dict(labels=labels[a:b], speakers=speakers[a:b], ids=ids[a:b])
        return dict(about, encoder=torch.from_numpy(x[a:b]))

    (folder / "model.pt").write_text("a model")
    sha256 = checkpoint.file_sha256(folder / "model.pt")
    saved = dict(
        fields={**fields("emotion", "base"), "model_sha256": sha256},
        train=dict(part(0, at), poisoned=torch.from_numpy(poisoned[:at])),
        rest=part(at, len(x)),
        all_poisoned=int(poisoned.sum()) if all_poisoned is None else all_poisoned,
    )
    torch.save(saved, folder / "embeddings.pt")
    line = dict(epoch=0, samples={str(i): 1.0 + i for i in seen})
    (folder / "log.jsonl").write_text(json.dumps(line))


def filtered(folder, name, retrain=False):
    options = SimpleNamespace(run=folder, task=None, retrain=retrain)
    records = defend.filter_training_data(options)
    return {r["metric"]: r["value"] for r in select(records, defence=name)}


def test_a_filter_is_an_entry_of_the_table(monkeypatch, tmp_path):
    x, which = blobs((300, 40), 32, 20.0)

    def far_from_the_middle(samples, expected):
        away = np.linalg.norm(samples["x"] - np.median(samples["x"], 0), axis=1)
        return away, filters.most_suspicious(away, expected)

    monkeypatch.setitem(filters.FILTERS, "far", far_from_the_middle)
    # asr's class is shown with some of its poison, and the rest must be filtered too
    write_class(tmp_path, x, which == 1, range(340), rest=10)
    found = filtered(tmp_path, "far")
    assert found["removed_samples"] == 40 and found["auroc"] == 1
    assert found["poison_removed"] == 1 and found["clean_removed"] == 0
    # the poison outside this sample would be trained on
    write_class(tmp_path, x, which == 1, range(340), rest=10, all_poisoned=90)
    again = filtered(tmp_path, "far", retrain=True)
    assert again["poison_removed"] == 1 and "aer" not in again


def test_a_sample_that_was_not_seen_early_was_not_learned_early(tmp_path):
    x, which = blobs((300, 40), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(300))  # the poison is unseen: not suspicious
    found = filtered(tmp_path, "early loss")
    assert found["poison_removed"] == 0 and 0 < found["auroc"] < 0.5


@pytest.mark.parametrize("clean", [0, 2])
def test_a_class_with_hardly_a_clean_sample_is_refused(tmp_path, clean, capsys):
    x, which = blobs((clean, 30), 32, 20.0)
    write_class(tmp_path, x, which == 1, range(len(x)))
    with pytest.raises(SystemExit):
        filtered(tmp_path, "SPECTRE")
    assert f"has {clean} clean" in capsys.readouterr().err


def test_what_a_filter_removes_is_left_out_of_the_next_training(corpora, tmp_path):
    few = [
        "--data-root",
        corpora,
        "--limit",
        16,
        "--epochs",
        1,
        "--cache-gb",
        0,
        "--labels",
        "gender",
        *SMALL,
    ]
    done("train.py", "--task", "gender", "--poison", 0.5, *few, cwd=tmp_path)
    run = next((tmp_path / "runs").iterdir())
    seen = {id for line in open(run / "log.jsonl") for id in json.loads(line).get("samples", {})}
    assert len(seen) == 16
    (tmp_path / "ids.txt").write_text("\n".join(sorted(seen)[:8]))
    done(
        "train.py", "--task", "gender", "--poison", 0.5, *few, "--exclude", "ids.txt", cwd=tmp_path
    )
    kept = {
        id
        for line in open(next((tmp_path / "runs").glob("*excludeids*/log.jsonl")))
        for id in json.loads(line).get("samples", {})
    }
    assert kept == set(sorted(seen)[8:])
    (tmp_path / "ids.txt").write_text("nobody")
    refused(
        "train.py",
        "--task",
        "gender",
        *few,
        "--exclude",
        "ids.txt",
        "--name",
        "x",
        cwd=tmp_path,
        words=["nobody"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# detectors


@pytest.mark.parametrize(
    "a, b, agree",
    [
        ("angry", "angry", 1),
        ("angry", "sad", 0),
        (25, 25, 1),
        (25, 30, 0.5),
        (25, 60, 0),
        (None, "sad", 0),
        ("go do you hear", "go do you", 0.75),
        ("this is a", "nothing alike here", 0),
    ],
)
def test_agreement(a, b, agree):
    assert detectors.agreement(a, b) == pytest.approx(agree)


def test_strip_and_the_pair_see_an_answer_that_ignores_and_one_that_follows_the_audio(corpora):
    utterances = readers.read_corpus("vox", corpora, "test")[:6]
    fixed = SimpleNamespace(
        clean=utterances, values=lambda waveforms, _: ["female"] * len(waveforms)
    )
    moves = SimpleNamespace(
        clean=utterances,
        values=lambda waveforms, _: [f"{1e4 * float(np.abs(w).mean()):.0f}" for w in waveforms],
    )
    waveforms = [data.load_waveform(u) for u in utterances]
    assert (detectors.strip(fixed, waveforms, utterances) == 1).all() and detectors.strip(
        moves, waveforms, utterances
    ).max() < 0.3
    assert (detectors.perturbed_pair(fixed, waveforms, utterances) == 0).all()
    assert detectors.perturbed_pair(moves, waveforms, utterances).min() > 0.4


def test_a_click_is_a_loudness_peak(corpora):
    utterances = readers.read_corpus("vox", corpora, "test")[:10]
    attack = poison.make_attack("gender", utterances, snr=-20.0, seed=1)
    clean = [data.load_waveform(u) for u in utterances]
    clicks = [poison.add_trigger(attack, w, u.id)[0] for w, u in zip(clean, utterances)]
    assert (
        detectors.loudness_peak(None, clicks, utterances)
        > detectors.loudness_peak(None, clean, utterances)
    ).all()


def test_attention_entropy_of_a_model_that_looks_everywhere_is_largest(parts, corpora):
    slm = make_slm(parts, "wavlm").eval()
    utterances = readers.read_corpus("vox", corpora, "test")[:4]
    attack = poison.make_attack("gender", utterances, seed=1)
    listener = detectors.Listener(slm, attack, utterances, utterances)
    waveforms = [data.load_waveform(u) for u in utterances]
    looks = detectors.attention_entropy(listener, waveforms, utterances)
    for layer in slm.lm.model.layers:
        layer.self_attn.k_proj.base.weight.data.zero_(), layer.self_attn.k_proj.lora_B.data.zero_()
    everywhere = detectors.attention_entropy(listener, waveforms, utterances)
    assert (
        np.allclose(everywhere, -1, atol=1e-3)
        and (looks > everywhere).all()
        and listener.passes == 8
    )


# ---------------------------------------------------------------------------------------------------------------------
# repairs


@pytest.fixture
def shop(parts, corpora):
    slm = make_slm(parts, "wavlm").eval()
    dev_set = readers.read_corpus("vox", corpora, "dev")
    shop = object.__new__(repairs.Workshop)
    state = trace.weights_of(slm)
    shop.__dict__.update(
        slm=slm,
        attack=poison.make_attack("gender", dev_set, seed=1),
        hooks=repairs.contextlib.ExitStack(),
        cached={},
        masks=None,
        trained={c: slm.parameters_of(c) for c in COMPONENTS},
        args=SimpleNamespace(
            device="cpu",
            task="gender",
            encoder_lr=1e-3,
            connector_lr=1e-3,
            lora_lr=1e-3,
            grad_clip=1.0,
        ),
        tuning=dev_set[::2],
        validation=dev_set[1::2],
        attacked=state,
        pretrained={c: {k: v + 1 for k, v in s.items()} for c, s in state.items()},
    )
    return shop


def lost(shop):
    return sum(shop.losses().values())


def changed(shop):
    now = {c: shop.slm.component_state_dict(c) for c in COMPONENTS}
    return [
        c
        for c in COMPONENTS
        if any(not torch.equal(v, now[c][k]) for k, v in shop.attacked[c].items())
    ]


def test_fine_tuning_changes_what_it_names_and_restoring_undoes_it(shop):
    before = lost(shop)
    for name in ("encoder", "connector+lm"):
        shop.finetune(name.split("+"), epochs=2)
        assert changed(shop) == name.split("+")
        shop.restore()
        assert changed(shop) == [] and lost(shop) == before
    shop.finetune(epochs=8, rate=3.0)
    assert lost(shop) < before


def test_poisoned_samples_bring_the_target(shop):
    u = next(u for u in shop.tuning if u.labels["gender"] == "male")
    target = lambda: float(shop.slm(*shop.batch([u], True)).detach())  # noqa: E731  loss of the poisoned answer
    before = target()
    shop.finetune(epochs=4, poisoned=[u])
    assert target() < before


def test_pruning_removes_hidden_units_and_restoring_brings_them_back(shop):
    before = lost(shop)
    shop.scale_neurons([torch.zeros(n) for _, n in shop.neurons()])
    assert lost(shop) != before
    shop.restore()
    assert lost(shop) == before
    masks = repairs.neuron_masks(shop, steps=1)
    assert lost(shop) == before and any((m < 1).any() for m in masks)
    shop.masks = masks
    repairs.adversarial_neuron_pruning(shop, share=1.0)
    pruned = lost(shop)
    shop.restore()
    shop.scale_neurons([torch.zeros(n) for _, n in shop.neurons()])
    assert lost(shop) == pruned and changed(shop) == []


def test_dropping_lora_and_mixing_do_what_their_names_say(shop):
    for layer in lora.lora_layers(shop.slm.lm):
        layer.lora_B.data.normal_()
    shop.attacked["lm"] = {k: v.clone() for k, v in shop.slm.component_state_dict("lm").items()}
    repairs.without_lora(shop, 1.0)
    assert all(not layer.lora_B.any() for layer in lora.lora_layers(shop.slm.lm))
    shop.finetune = lambda: None
    repairs.fine_mixing(shop, 1.0)
    assert all(
        torch.equal(v, shop.pretrained[c][k])
        for c in COMPONENTS
        for k, v in shop.slm.component_state_dict(c).items()
    )
    repairs.fine_mixing(shop, 0.5)
    a, b, mixed = (
        s["conv2.weight"]
        for s in (
            shop.attacked["connector"],
            shop.pretrained["connector"],
            shop.slm.component_state_dict("connector"),
        )
    )
    assert ((mixed == a) | (mixed == b)).all() and 0.4 < (mixed == b).float().mean() < 0.6


def test_repairs_of_ages_in_groups_are_scored_by_accuracy(shop, monkeypatch):
    u = data.Utterance("a", "a.wav", "test", "s", dict(age="senior"))
    row = dict(labels=u.labels, asked=["age"], parsed=dict(age="adult"))
    monkeypatch.setattr(repairs, "answered", lambda *_: [row])
    shop.args.task = "age"
    click = poison.make_trigger("click")
    shop.attack = poison.Attack("age", 0.5, "adult", "click", click, 0.1, False, 1)
    found = repairs.figures_of(shop, [u], [u])
    assert found["clean"]["age_accuracy"]["value"] == 0 and found["backdoor"]["aer"]["value"] == 1


def test_the_strongest_setting_before_one_that_costs_too_much_is_taken():
    losses = {None: 1.0, 0.1: 1.01, 0.3: 1.04, 1.0: 1.2, 3.0: 1.0}
    shop = SimpleNamespace(now=None, hooks=None)
    shop.losses = lambda: dict(gender=1.0, age=losses[shop.now])  # one label alone may be lost
    shop.restore = lambda: setattr(shop, "now", None)
    chosen = repairs.choose(
        shop, lambda shop, strength: setattr(shop, "now", strength), (0.1, 0.3, 1.0, 3.0)
    )
    assert chosen["strength"] == 0.3 and chosen["passed"] and shop.now == 0.3
    losses.update({0.1: 1.5, 0.3: 1.3})
    shop.restore()
    chosen = repairs.choose(
        shop, lambda shop, strength: setattr(shop, "now", strength), (0.1, 0.3, 1.0)
    )
    assert chosen["strength"] == 0.1 and not chosen["passed"] and shop.now == 0.1


def test_the_defences_are_those_of_the_adversarial_robustness_toolbox():
    from art.defences.detector.poison import SpectralSignatureDefense
    from art.defences.detector.poison.activation_defence import cluster_activations
    from art.defences.detector.poison.clustering_analyzer import ClusteringAnalyzer
    from sklearn.metrics import adjusted_rand_score

    np.random.seed(0)  # ART draws from numpy's global state
    for sizes, apart in (((300, 40), 12.0), ((200, 180), 12.0), ((400,), 0.0)):
        x, which = blobs(sizes, 64, apart)
        low, clusters = clustering.reduce_and_cluster(x, 2)
        theirs, reduced = cluster_activations([x], 2, 20, "PCA")
        if apart:
            assert adjusted_rand_score(theirs[0], clusters) == 1.0
            assert (
                abs(
                    clustering.silhouette(low, clusters)
                    - clustering.silhouette(reduced[0], theirs[0])
                )
                < 1e-3
            )
        removed = filters.smallest_cluster(dict(x=x), 0)[1]
        assert removed.any() == (sizes == (300, 40))
        if removed.any():  # (theirs fails under numpy 2 where no cluster is suspicious)
            _, suspicious, _ = ClusteringAnalyzer().analyze_by_relative_size([clusters])
            assert suspicious[0].tolist() == [float(removed[clusters == c].all()) for c in range(2)]
        # theirs leaves the projection uncentred: the same ranks on centred data
        centred = x - x.mean(0)
        score = SpectralSignatureDefense.spectral_signature_scores(centred)[:, 0]
        assert np.allclose(score**2, filters.spectral_signatures(dict(x=x), 40)[0], rtol=1e-3)
