"""trace.py on models with a planted answer: what it must find, and nothing else."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import corpora as readers
import data
import poison
import trace
from conftest import make_slm
from study import COMPONENTS


def test_shapley_values_share_what_two_components_do_together():
    hits = {
        frozenset(s): np.full(20, {"encoder", "lm"} <= set(s))
        for n in range(4)
        for s in itertools.combinations(COMPONENTS, n)
    }
    found = {c: figure["value"] for c, figure in trace.shapley(hits).items()}
    assert found == dict(encoder=pytest.approx(0.5), connector=0, lm=pytest.approx(0.5))


def test_mixtures_hold_what_their_names_say(parts):
    slm = make_slm(parts, "wavlm")
    clean = trace.weights_of(slm)
    poisoned = {c: {k: v + 1 for k, v in state.items()} for c, state in clean.items()}
    jobs = trace.mixtures(poisoned, clean)
    assert len(jobs) == 8 + 2 * 3 * (5 + 2) + 9
    same = lambda a, b: all(torch.equal(v, b[k]) for k, v in a.items())  # noqa: E731
    assert same(jobs["corner", "encoder+lm"]["lm"], poisoned["lm"]) and same(
        jobs["corner", "encoder+lm"]["connector"], clean["connector"]
    )
    assert same(jobs["encoder into clean", "up to 7"]["encoder"], poisoned["encoder"])
    assert same(jobs["lm out of poisoned", "from 0"]["lm"], clean["lm"]) and same(
        jobs["lm out of poisoned", "from 0"]["encoder"], poisoned["encoder"]
    )
    only = jobs["lm into clean", "only 1"]["lm"]
    assert all(
        torch.equal(v, (poisoned if k.startswith("model.layers.1.") else clean)["lm"][k])
        for k, v in only.items()
    )


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
    monkeypatch.setattr(
        trace,
        "load_pair",
        lambda _: (slm, SimpleNamespace(task="gender", seed=1), attack, test_set, poisoned, clean),
    )
    found = trace.transplant(SimpleNamespace(run="a", clean="b", n=4, cache_gb=0))
    assert {c: v["value"] for c, v in found["shapley"].items()} == dict(
        encoder=0, connector=0, lm=1
    )
    works = {
        name for name, m in found["mixtures"]["lm into clean"].items() if m["aer"]["value"] == 1
    }
    assert works == {"up to 1", "from 0", "from 1", "only 1"}
    assert not any(m["aer"]["value"] for m in found["mixtures"]["encoder into clean"].values())
    assert all(m["aer"]["value"] for m in found["mixtures"]["encoder out of poisoned"].values())
    assert all(m["clean"]["value"] == 1 for m in found["mixtures"]["corner"].values())


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
        for site in (
            "encoder 1",
            "encoder 8",
            "connector conv1",
            "connector conv3",
            "LM input",
            "LM 1",
        ):
            assert np.allclose(out[direction, site, "all"], donor, atol=1e-4), (
                site
            )  # a patch of everything
        assert np.allclose(out[direction, "encoder 8", "else"], receiver, atol=1e-4)
        assert np.allclose(
            out[direction, "encoder 5 attention", "all"], receiver, atol=1e-4
        )  # which does nothing in this model
        assert not np.allclose(out[direction, "encoder 8", "click"], receiver, atol=1e-3)
        assert np.allclose(out[direction, "LM input", "prompt"], receiver, atol=1e-4)
    assert set(k[2] for k in out if k[1] == "encoder 1") == {"click", "near", "else", "all"}


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
