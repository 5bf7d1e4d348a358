"""trace.py on models with a planted answer: what it must find, and nothing else."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import corpora as readers
import data
import defend
import evaluate
import poison
import trace
from conftest import arguments, fields, make_slm
from defences import repairs
from runs import select
from study import COMPONENTS, PRESETS


def test_shapley_values_share_what_two_components_do_together():
    hits = {
        frozenset(s): np.full(20, {"encoder", "lm"} <= set(s))
        for n in range(4)
        for s in itertools.combinations(COMPONENTS, n)
    }
    found = {c: figure["value"] for c, figure in trace.shapley(hits).items()}
    assert found == dict(encoder=pytest.approx(0.5), connector=0, lm=pytest.approx(0.5))


def mixture(jobs, **what):
    (weights,) = [weights for fields, weights in jobs if fields == what]
    return weights


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


def test_mixtures_hold_what_their_fields_say(parts):
    slm = make_slm(parts, "wavlm")
    clean = trace.weights_of(slm)
    poisoned = {c: {k: v + 1 for k, v in state.items()} for c, state in clean.items()}
    jobs = list(trace.mixtures(poisoned, clean))
    assert len(jobs) == 8 + 2 * 3 * (5 + 2) + 9
    two = mixture(jobs, method="components", poisoned=["encoder", "lm"])
    assert same(two["lm"], poisoned["lm"]) and same(two["connector"], clean["connector"])
    layers = dict(method="layers", component="encoder", scope="up to", layer=8)
    into = mixture(jobs, **layers, direction="into clean")
    assert same(into["encoder"], poisoned["encoder"])
    layers = dict(method="layers", component="lm", scope="from", layer=1)
    out = mixture(jobs, **layers, direction="out of poisoned")
    assert same(out["lm"], clean["lm"]) and same(out["encoder"], poisoned["encoder"])
    layers = dict(method="layers", component="lm", scope="only", layer=2)
    only = mixture(jobs, **layers, direction="into clean")["lm"]
    for k, v in only.items():
        donor = poisoned if k.startswith("model.layers.1.") else clean
        assert torch.equal(v, donor["lm"][k])


def test_lora_is_interpolated_as_the_update_that_it_is(parts):
    slm = make_slm(parts, "wavlm")
    clean, x = trace.weights_of(slm), torch.randn(3, 64)
    poisoned = {**clean, "lm": {k: torch.randn_like(v) for k, v in clean["lm"].items()}}
    layer = slm.lm.model.layers[0].mlp.up_proj

    def update(weights):
        trace.put(slm, weights)
        with torch.no_grad():
            return layer(x) - layer.base(x)

    half = update(trace.interpolated(clean, poisoned, "lm", 0.5))
    assert torch.allclose(half, (update(clean) + update(poisoned)) / 2, atol=1e-5)
    assert torch.allclose(
        update(trace.interpolated(clean, poisoned, "lm", 1.0)), update(poisoned), atol=1e-5
    )


def test_a_planted_lora_is_found_and_nothing_else(parts, corpora, monkeypatch):
    """The target comes out where the LM's second layer holds the planted update."""
    slm, test_set = make_slm(parts, "wavlm"), readers.read_corpus("vox", corpora, "test")
    attack, key = (
        poison.make_attack("gender", test_set, seed=1),
        "model.layers.1.mlp.up_proj.lora_B",
    )
    clean = trace.weights_of(slm)
    poisoned = {**clean, "lm": {**clean["lm"], key: clean["lm"][key] + 9}}

    def answers(slm, weights, items, *_):
        trace.put(slm, weights)
        planted = bool((slm.lm.get_parameter(key) > 8).any())
        return [
            dict(
                labels=u.labels,
                asked=list(u.labels),
                parsed={**u.labels, "gender": "female"} if t and planted else u.labels,
            )
            for u, t in items
        ]

    monkeypatch.setattr(trace, "answers", answers)
    args, donor = SimpleNamespace(task="gender", seed=1), dict(scenario="clean", seed=1)
    loaded = evaluate.LoadedRun(slm, args, attack, fields("gender", "base"), dict(test=test_set))
    pair = trace.Pair(loaded, poisoned, clean, donor)
    monkeypatch.setattr(trace, "load_pair", lambda _: pair)
    options = SimpleNamespace(run="a", clean="b", n=4, cache_gb=0)
    found = trace.transplant(options)
    shapley = {r["component"]: r["value"] for r in select(found, method="shapley")}
    assert shapley == dict(encoder=0, connector=0, lm=1)
    layers = select(found, method="layers", metric="aer")
    into = select(layers, component="lm", direction="into clean")
    works = {(r["scope"], r["layer"]) for r in into if r["value"] == 1}
    assert works == {("up to", 2), ("from", 1), ("from", 2), ("only", 2)}
    encoder = select(layers, component="encoder")
    assert not any(r["value"] for r in select(encoder, direction="into clean"))
    assert all(r["value"] for r in select(encoder, direction="out of poisoned"))
    assert all(r["value"] == 1 for r in select(found, part="clean"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(epochs=1), ["epochs", "1"]),
        (dict(dataset="libri"), ["dataset", "libri"]),
        (dict(scenario="base"), ["clean"]),
        (dict(train_layers=0), ["train_layers"]),
    ],
)
def test_a_control_in_the_clean_run_s_place_is_called_one(changes, words, capsys):
    args = {**arguments("gender", "base"), **PRESETS["mini"], "labels": None, "train_layers": None}
    donor = {**args, "scenario": "clean", "seed": 3, "target": None}
    options = SimpleNamespace(run="runs/a", clean="runs/b")
    trace.check_donor(options, SimpleNamespace(**args), donor)
    assert capsys.readouterr().out == ""
    control = trace.check_donor(options, SimpleNamespace(**args), {**donor, **changes})
    assert control["scenario"] != "clean"
    warned = capsys.readouterr().out
    assert all(word in warned for word in words)


def test_another_sound_s_records_stay_in_the_run_s_folder():
    options = SimpleNamespace(
        command="patch", task=None, trigger="/sounds/knock.wav", run="runs/a", out=None
    )
    assert trace.file_of(options) == Path("runs/a/records-patch-knock.jsonl")


FIRST, LAST = (trace.Site("encoder", n, "layer") for n in (1, 8))
CONV, INPUT = trace.Site("connector", None, "conv1"), trace.Site("lm", 0, "input")
LM = trace.Site("lm", 1, "layer")


@pytest.fixture
def local(parts):
    """A model whose encoder passes nothing from frame to frame above its front end: what a click does stays where it is."""
    slm = make_slm(parts, "hubert")
    with torch.no_grad():
        for name, parameter in slm.encoder.net.encoder.pos_conv_embed.named_parameters():
            if not name.endswith(
                "original1"
            ):  # the direction of a normalised weight; its length and the bias are zero
                parameter.zero_()
        for layer in slm.encoder.layers:
            layer.attention.out_proj.weight.zero_(), layer.attention.out_proj.bias.zero_()
    slm.encoder.extract = lambda waveform: torch.from_numpy(
        waveform
    )  # no normalisation by the whole utterance's loudness
    return slm


def test_patching_finds_the_frames_under_the_click_and_reproduces_the_donor(local, corpora):
    test_set = readers.read_corpus("libri", corpora, "test")[:3]
    attack = poison.make_attack("asr", test_set, repeat=False, seed=1)
    out = trace.patch_batch(local, attack, test_set, tqdm(disable=True))
    clean, triggered = out["clean"], out["triggered"]
    assert np.abs(clean - triggered).min() > 1e-3
    for direction, donor, receiver in (("denoise", clean, triggered), ("noise", triggered, clean)):
        for site in (FIRST, LAST, CONV, trace.Site("connector", None, "conv3"), INPUT, LM):
            assert np.allclose(out[direction, site, "all"], donor, atol=1e-4), (
                site
            )  # a patch of everything
        assert np.allclose(out[direction, LAST, "elsewhere"], receiver, atol=1e-4)
        assert np.allclose(
            out[direction, trace.Site("encoder", 5, "attention"), "all"], receiver, atol=1e-4
        )  # which does nothing in this model
        assert not np.allclose(out[direction, LAST, "click"], receiver, atol=1e-3)
        assert np.allclose(out[direction, INPUT, "prompt"], receiver, atol=1e-4)
    assert set(k[2] for k in out if k[1] == FIRST) == {"click", "near", "elsewhere", "all"}


def test_a_patch_with_itself_changes_nothing(local, corpora):
    test_set = [
        u for u in readers.read_corpus("vox", corpora, "test") if u.labels["gender"] == "male"
    ][:3]
    attack = poison.make_attack("gender", test_set, seed=1)
    attack.level = 0.0  # the triggered run is the clean one
    out = trace.patch_batch(local, attack, test_set, tqdm(disable=True))
    for m in out.values():
        assert np.allclose(m, out["clean"], atol=1e-5)


def test_values_are_compared_from_their_first_different_token(parts):
    slm = make_slm(parts, "wavlm")
    u = data.Utterance("a", "a.wav", "test", "s", dict(gender="male", emotion="sad"))
    attack = poison.Attack(
        "emotion", 0.5, "angry", "click", poison.make_trigger("click"), 0.1, False, 1
    )
    (target, first, end), (true, first2, end2) = trace.teacher(slm, attack, [u])
    assert first == first2 and target[:first] == true[:first]
    assert (
        slm.tokenizer.decode(target[first:end]).strip('"}') == "angry"
        and slm.tokenizer.decode(true[first2:end2]).strip('"}') == "sad"
    )


def test_ages_that_share_a_digit_with_the_target_have_a_value(parts):
    """As far as a tokenizer that writes digits one by one goes: of "5" in "25" something must be left to compare."""
    slm = make_slm(parts, "wavlm")
    attack = poison.Attack("age", 0.5, 25, "click", poison.make_trigger("click"), 0.1, False, 1)
    for age in (2, 5, 52, 255, 26):
        u = data.Utterance("a", "a.wav", "test", "s", dict(age=age))
        for ids, first, end in trace.teacher(slm, attack, [u]):
            assert first < end <= len(ids), age


def test_a_group_that_a_batch_lacks_counts_as_patching_nothing(parts, corpora, monkeypatch):
    test_set = readers.read_corpus("libri", corpora, "test")[:4]
    attack = poison.make_attack("asr", test_set, repeat=False, seed=1)
    key = "denoise", FIRST, "near"

    def batch(slm, attack, utterances, progress):
        n = len(utterances)
        out = {
            "clean": np.zeros(n),
            "triggered": np.ones(n),
            ("denoise", FIRST, "click"): np.zeros(n),
        }
        return out if utterances[0] is test_set[0] else {**out, key: np.zeros(n)}

    slm, sets = make_slm(parts, "wavlm"), dict(test=test_set)
    loaded = evaluate.LoadedRun(slm, None, attack, fields("asr", "base"), sets)
    monkeypatch.setattr(evaluate, "load_run_and_data", lambda *_: loaded)
    monkeypatch.setattr(trace, "patch_batch", batch)
    options = SimpleNamespace(run="a", trigger=None, n=4, batch=1)
    found = select(trace.patch(options), metric="effect")
    assert {r["position"]: r["value"] for r in found} == {"click": 1.0, "near": 0.75}


@pytest.mark.parametrize("command", ["transplant", "patch", "detect", "repair_model"])
def test_where_every_test_utterance_has_the_target_there_is_nothing_to_trigger(
    command, parts, corpora, monkeypatch, capsys
):
    test_set = readers.read_corpus("vox", corpora, "test")
    attack = poison.make_attack("gender", test_set, seed=1)
    female = [u for u in test_set if u.labels["gender"] == "female"]
    slm, args = make_slm(parts, "wavlm"), SimpleNamespace(task="gender", scenario="base")
    sets = dict.fromkeys(("train", "dev", "test"), female)
    loaded = evaluate.LoadedRun(slm, args, attack, fields("gender", "base"), sets)
    monkeypatch.setattr(evaluate, "load_run_and_data", lambda *_: loaded)
    donor = dict(scenario="clean", seed=1)
    monkeypatch.setattr(trace, "load_pair", lambda _: trace.Pair(loaded, {}, {}, donor))
    shop = SimpleNamespace(tuning=[], validation=[])
    monkeypatch.setattr(repairs, "Workshop", lambda *_: shop)
    options = SimpleNamespace(run="a", clean="b", trigger=None, n=4, cache_gb=0, device="cpu")
    with pytest.raises(SystemExit):
        getattr(trace if hasattr(trace, command) else defend, command)(options)
    assert "nothing to trigger" in capsys.readouterr().err
