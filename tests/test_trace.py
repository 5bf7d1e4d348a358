"""trace.py on models whose answer is planted: it must find that answer and nothing else."""

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
import model
import poison
import trace
from conftest import arguments, fields, make_slm
from runs import select
from study import COMPONENTS, PRESETS


def nearly(a, b):
    return np.allclose(a, b, atol=1e-4)


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def gender_attack(utterances):
    return poison.make_attack("gender", utterances, seed=1)


# -------------------------------------------------------------------------------------------------
# transplant


def shapley_values(works, clean_model):
    """{component: value}. works: whether the attack works, from the set of components that were
    moved. clean_model: (n,), whether each of the clean model's answers is the target."""
    hits = {}
    for n in range(4):
        for moved in itertools.combinations(COMPONENTS, n):
            hits[frozenset(moved)] = clean_model | works(set(moved))
    figures = trace.shapley(hits, ["a", "b"] * (len(clean_model) // 2))
    return {component: figure["value"] for component, figure in figures.items()}


def needs_encoder_with_lm(moved):
    return {"encoder", "lm"} <= moved


def test_shapley_values_share_what_two_components_do_together():
    values = shapley_values(needs_encoder_with_lm, np.zeros(20, bool))
    assert values == dict(encoder=pytest.approx(0.5), connector=0, lm=pytest.approx(0.5))


def test_shapley_values_leave_out_what_the_clean_model_gives():
    values = shapley_values(needs_encoder_with_lm, np.arange(20) < 6)
    assert values == dict(encoder=pytest.approx(0.35), connector=0, lm=pytest.approx(0.35))


@pytest.fixture(scope="module")
def clean(parts):
    return model.copy_weights(make_slm(parts, "wavlm"))


@pytest.fixture(scope="module")
def poisoned(clean):
    """Weights that differ from the clean ones everywhere."""
    weights = {}
    for component, state in clean.items():
        weights[component] = {name: tensor + 1 for name, tensor in state.items()}
    return weights


def mixture(poisoned_clean, **wanted):
    """The weights of the one mixture whose record has these fields and no others."""
    (weights,) = [w for record, w in trace.mixtures(*poisoned_clean) if record == wanted]
    return weights


def test_a_component_is_taken_whole_from_either_run(poisoned, clean):
    mixed = mixture((poisoned, clean), method="components", poisoned=["encoder", "lm"])
    assert same_weights(mixed["encoder"], poisoned["encoder"])
    assert same_weights(mixed["connector"], clean["connector"])
    assert same_weights(mixed["lm"], poisoned["lm"])


def test_all_layers_into_the_clean_run_are_its_component(poisoned, clean):
    layers = dict(method="layers", component="encoder", scope="up to", layer=8)
    mixed = mixture((poisoned, clean), **layers, direction="into clean")
    assert same_weights(mixed["encoder"], poisoned["encoder"])
    assert same_weights(mixed["lm"], clean["lm"])


def test_all_layers_out_of_the_poisoned_run_leave_a_clean_lm(poisoned, clean):
    layers = dict(method="layers", component="lm", scope="from", layer=1)
    mixed = mixture((poisoned, clean), **layers, direction="out of poisoned")
    assert same_weights(mixed["lm"], clean["lm"])
    assert same_weights(mixed["encoder"], poisoned["encoder"])


def test_one_layer_is_moved_alone(poisoned, clean):
    layers = dict(method="layers", component="lm", scope="only", layer=2)
    mixed = mixture((poisoned, clean), **layers, direction="into clean")
    for name, tensor in mixed["lm"].items():
        donor = poisoned if name.startswith("model.layers.1.") else clean
        assert torch.equal(tensor, donor["lm"][name])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_lora_is_interpolated_as_the_update_that_it_is(parts, share):
    slm = make_slm(parts, "wavlm")
    clean = model.copy_weights(slm)
    other = {name: torch.randn_like(tensor) for name, tensor in clean["lm"].items()}
    poisoned = {**clean, "lm": other}
    layer = slm.lm.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)

    @torch.no_grad()
    def update(weights):
        model.set_weights(slm, weights)
        return layer(x) - layer.base(x)

    expected = (1 - share) * update(clean) + share * update(poisoned)
    mixed = model.interpolate(clean, poisoned, "lm", share)
    assert torch.allclose(update(mixed), expected, atol=1e-5)


PLANTED = "model.layers.1.mlp.up_proj.lora_B"


@pytest.fixture(scope="module")
def transplanted(parts, corpora):
    """The records of transplant for a model whose answer is the target wherever the LM's second
    layer holds a planted update."""
    slm = make_slm(parts, "wavlm")
    test_set = readers.read_corpus("vox", corpora, "test")
    clean = model.copy_weights(slm)
    update = {PLANTED: clean["lm"][PLANTED] + 9}
    poisoned = {**clean, "lm": {**clean["lm"], **update}}

    def answer_rows(slm, attack, items, *_):
        planted = bool((slm.lm.get_parameter(PLANTED) > 8).any())
        rows = []
        for u, triggered in items:
            answer = {**u.labels, "gender": "female"} if triggered and planted else u.labels
            asked = list(u.labels)
            rows.append(dict(speaker=u.speaker, labels=u.labels, asked=asked, parsed=answer))
        return rows

    loaded = evaluate.LoadedRun(
        slm,
        SimpleNamespace(task="gender", seed=1, batch_seconds=120.0),
        gender_attack(test_set),
        fields("gender", "base"),
        dict(test=test_set),
    )
    pair = trace.Pair(loaded, poisoned, clean, dict(scenario="clean", seed=1))
    options = SimpleNamespace(run="a", clean="b", n=4, cache_gb=0)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(evaluate, "answer_rows", answer_rows)
        patches.setattr(trace, "load_pair", lambda _: pair)
        return trace.transplant(options)


def test_a_planted_lora_has_all_of_the_shapley_value(transplanted):
    values = {r["component"]: r["value"] for r in select(transplanted, method="shapley")}
    assert values == dict(encoder=0, connector=0, lm=1)


def test_a_planted_lora_is_found_in_its_layer(transplanted):
    records = select(
        transplanted, method="layers", metric="aer", component="lm", direction="into clean"
    )
    successful = {(r["scope"], r["layer"]) for r in records if r["value"] == 1}
    assert successful == {("up to", 2), ("from", 1), ("from", 2), ("only", 2)}


@pytest.mark.parametrize("direction, aer", [("into clean", 0), ("out of poisoned", 1)])
def test_a_planted_lora_is_not_found_in_the_encoder(transplanted, direction, aer):
    records = select(
        transplanted, method="layers", metric="aer", component="encoder", direction=direction
    )
    assert {r["value"] for r in records} == {aer}


def test_a_planted_lora_leaves_clean_speech_alone(transplanted):
    assert {r["value"] for r in select(transplanted, part="clean")} == {1}


def checked_donor(changes):
    """check_donor's result for a clean run of the same settings, but for these changes."""
    args = {**arguments("gender", "base"), **PRESETS["mini"], "labels": None, "train_layers": None}
    donor = {**args, "scenario": "clean", "seed": 3, "target": None, **changes}
    options = SimpleNamespace(run="runs/a", clean="runs/b")
    return trace.check_donor(options, SimpleNamespace(**args), donor)


def test_a_clean_run_of_the_same_settings_is_no_control(capsys):
    assert checked_donor({})["scenario"] == "clean"
    assert capsys.readouterr().out == ""


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
    assert checked_donor(changes)["scenario"] != "clean"
    warning = capsys.readouterr().out
    assert all(word in warning for word in words)


# -------------------------------------------------------------------------------------------------
# patch

FIRST = trace.Site("encoder", 1, "layer")
LAST = trace.Site("encoder", 8, "layer")
CONV1 = trace.Site("connector", None, "conv1")
CONV3 = trace.Site("connector", None, "conv3")
LM_INPUT = trace.Site("lm", 0, "input")
LM_LAYER = trace.Site("lm", 1, "layer")


def test_another_sound_s_records_stay_in_the_run_s_folder():
    given = dict(command="patch", task=None, run="runs/a", out=None)
    knock = SimpleNamespace(**given, trigger="/sounds/knock.wav", same_scale=False)
    assert trace.file_of(knock) == Path("runs/a/records-patch-knock.jsonl")
    same_scale = SimpleNamespace(**given, trigger=None, same_scale=True)
    assert trace.file_of(same_scale) == Path("runs/a/records-patch-same-scale.jsonl")


def zero(module):
    for parameter in module.parameters():
        parameter.zero_()


@torch.no_grad()
def keep_frames_apart(encoder):
    """Makes a front end pass nothing from frame to frame after its convolutions over the audio."""
    for name, parameter in encoder.net.encoder.pos_conv_embed.named_parameters():
        # "original1" is the direction of a normalised weight, which cannot be zero
        if not name.endswith("original1"):
            parameter.zero_()
    # no normalisation by the loudness of the whole utterance
    encoder.extract = torch.from_numpy


@pytest.fixture(scope="module")
def local(parts):
    """A model whose encoder passes nothing from frame to frame above its front end, so that what a
    click does stays where it is."""
    slm = make_slm(parts, "hubert")
    keep_frames_apart(slm.encoder)
    with torch.no_grad():
        for layer in slm.encoder.layers:
            zero(layer.attention.out_proj)
    return slm


@pytest.mark.parametrize("name", ["wavlm", "whisper"])
def test_a_frame_s_centre_is_the_middle_of_what_it_sees(parts, name):
    encoder = model.Encoder(parts / name)
    if name == "wavlm":
        keep_frames_apart(encoder)
    frame, width = 6, 40
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32) / 10
    starts = range(2000, 6000, width)
    features = [encoder.extract(noise)]
    for start in starts:
        touched = noise.copy()
        touched[start : start + width] += 0.1
        features.append(encoder.extract(touched))
    x, _ = encoder.front_end(features)
    change = (x[1:, frame] - x[0, frame]).norm(dim=1)
    seen = [start for start, size in zip(starts, change) if size > 1e-3 * change.max()]
    middle = (seen[0] + seen[-1] + width) / 2 / data.SAMPLE_RATE
    assert float(encoder.frame_centres(frame)) == pytest.approx(middle, abs=0.005)


def test_at_the_same_scale_speech_differs_under_the_click_alone(corpora):
    extractor = model.AutoFeatureExtractor.from_pretrained(model.where("mini/wavlm"))
    clean = data.load_waveform(readers.read_corpus("libri", corpora, "test")[0])
    triggered = clean.copy()
    triggered[4000:8000] += 0.3
    features = model.extract(extractor, triggered)
    difference = features - trace.at_scale_of(features, triggered, clean)
    assert difference[4000:8000].min() > 0.1
    assert difference[:4000].abs().max() < 1e-5
    assert (features - model.extract(extractor, clean))[:4000].abs().max() > 0.1


@pytest.fixture(scope="module")
def local_result(local, corpora):
    """The patches of three utterances with one click each in the local model."""
    test_set = readers.read_corpus("libri", corpora, "test")[:3]
    attack = poison.make_attack("asr", test_set, repeat=False, seed=1)
    return trace.patch_batch(local, trace.make_pairs(local, attack, test_set), tqdm(disable=True))


def test_the_trigger_moves_the_margin(local_result):
    gap = local_result.plain["clean"] - local_result.plain["triggered"]
    assert np.abs(gap).min() > 1e-3


directions = pytest.mark.parametrize("direction", trace.DIRECTIONS)


@directions
@pytest.mark.parametrize("site", [FIRST, LAST, CONV1, CONV3, LM_INPUT, LM_LAYER], ids=str)
def test_a_patch_of_everything_makes_the_donor(local_result, direction, site):
    donor, _ = trace.DIRECTIONS[direction]
    assert nearly(local_result.patched[direction, site, "all"], local_result.plain[donor])


@directions
@pytest.mark.parametrize(
    "site, group",
    [
        (LAST, "elsewhere"),
        (LAST, "random"),
        (trace.Site("encoder", 5, "attention"), "all"),  # which writes zeros in this model
        (LM_INPUT, "prompt"),
    ],
    ids=str,
)
def test_a_patch_of_what_the_click_misses_does_nothing(local_result, direction, site, group):
    _, receiver = trace.DIRECTIONS[direction]
    assert nearly(local_result.patched[direction, site, group], local_result.plain[receiver])


@directions
def test_a_patch_of_the_frames_under_the_click_works(local_result, direction):
    _, receiver = trace.DIRECTIONS[direction]
    m = local_result.patched[direction, LAST, "click"]
    assert not np.allclose(m, local_result.plain[receiver], atol=1e-3)


def test_an_encoder_layer_is_patched_at_frames_only(local_result):
    groups = {group for _, site, group in local_result.patched if site == FIRST}
    assert groups == {"click", "near", "elsewhere", "random", "all"}


def frames_of_groups(seed, clicks):
    """The frames of each group of a recording of four seconds, {group: set of frames}"""
    centres = 0.04 * torch.arange(100)
    groups = trace.frame_groups(centres, clicks, np.random.default_rng(seed))
    frames = {}
    for group, members in zip(trace.GROUPS, groups.T):
        frames[group] = set(members.nonzero()[:, 0].tolist())
    return frames


def test_as_many_random_frames_are_drawn_as_are_under_a_click():
    frames = frames_of_groups(0, clicks=[(0.99, 1.21)])
    assert frames["click"] == set(range(25, 31))
    assert len(frames["random"]) == 6
    assert frames["random"] < frames["elsewhere"]


def test_random_frames_are_the_seed_s():
    a, again, other = (frames_of_groups(seed, [(0.99, 1.21)])["random"] for seed in (0, 0, 1))
    assert a == again
    assert a != other


def test_where_clicks_leave_too_few_frames_fewer_are_drawn():
    frames = frames_of_groups(0, clicks=[(0.0, 3.6)])
    assert frames["random"] == frames["elsewhere"]


def test_a_patch_with_itself_changes_nothing(local, corpora):
    test_set = readers.read_corpus("vox", corpora, "test")
    male = [u for u in test_set if u.labels["gender"] == "male"][:3]
    attack = gender_attack(male)
    attack.level = 0.0  # the triggered pass is the clean one
    result = trace.patch_batch(local, trace.make_pairs(local, attack, male), tqdm(disable=True))
    for m in result.patched.values():
        assert np.allclose(m, result.plain["clean"], atol=1e-5)


def attack_on(task, target):
    click = poison.make_trigger("click")
    return poison.Attack(task, 0.5, target, "click", click, 0.1, False, 1)


def utterance_with(**labels):
    return data.Utterance("a", "a.wav", "test", "s", labels)


def test_answers_are_compared_from_their_first_difference(parts):
    slm = make_slm(parts, "wavlm")
    utterance = utterance_with(gender="male", emotion="sad")
    target, true = trace.forced_answers(slm, attack_on("emotion", "angry"), [utterance])
    assert target.ids[: target.start] == true.ids[: true.start]
    assert slm.tokenizer.decode(target.value).strip('"}') == "angry"
    assert slm.tokenizer.decode(true.value).strip('"}') == "sad"


@pytest.mark.parametrize("age", [2, 5, 52, 255, 26])
def test_an_age_that_shares_a_digit_with_the_target_has_a_value(parts, age):
    """Where a tokenizer writes digits one by one, something of "5" in "25" must be left."""
    slm = make_slm(parts, "wavlm")
    for answer in trace.forced_answers(slm, attack_on("age", 25), [utterance_with(age=age)]):
        assert answer.value


def test_a_group_that_a_batch_lacks_counts_as_patching_nothing():
    click = "denoise", FIRST, "click"
    near = "denoise", FIRST, "near"
    plain = dict(clean=np.zeros(2), triggered=np.ones(2))
    first = trace.PatchedMargins(plain, {click: np.zeros(2)})
    second = trace.PatchedMargins(plain, {click: np.zeros(2), near: np.zeros(2)})
    result = trace.joined([first, second])
    assert result.patched[click].tolist() == [0, 0, 0, 0]
    assert result.patched[near].tolist() == [1, 1, 0, 0]


def test_an_effect_is_the_share_of_the_gap_that_a_patch_closes():
    receiver, donor = np.ones(20), -np.ones(20)
    effect = trace.effect_of(np.full(20, 0.5), donor, receiver, ["a", "b"] * 10)
    assert effect["value"] == pytest.approx(0.25)
    assert effect["flipped"] == 0


def test_frames_under_the_click_are_compared_with_random_ones():
    clean, triggered = np.zeros(4), np.ones(4)
    patched = {
        ("denoise", LAST, "click"): np.full(4, 0.4),
        ("denoise", LAST, "random"): np.full(4, 0.9),
    }
    result = trace.PatchedMargins(dict(clean=clean, triggered=triggered), patched)
    (over_random,) = select(trace.effects(result, list("abab")), metric="effect_over_random")
    assert over_random["position"] == "click"
    assert over_random["value"] == pytest.approx(0.5)


def test_a_sound_that_speakers_differ_in_has_no_effects():
    triggered = np.repeat([2.0, -1.0], 2)  # m rises with one speaker and falls with the other
    patched = {("denoise", LAST, "click"): np.zeros(4)}
    result = trace.PatchedMargins(dict(clean=np.zeros(4), triggered=triggered), patched)
    assert not list(trace.effects(result, list("aabb")))


def test_an_effect_that_speakers_differ_in_has_a_wide_interval():
    receiver, donor = np.ones(20), -np.ones(20)
    patched = np.repeat([1.0, -1.0], 10)  # it works on one of two speakers
    effect = trace.effect_of(patched, donor, receiver, np.repeat(["a", "b"], 10))
    assert effect["value"] == pytest.approx(0.5)
    assert (effect["low"], effect["high"]) == (0, 1)


@pytest.mark.parametrize(
    "command", [trace.transplant, trace.patch, defend.detect, defend.repair_model]
)
def test_where_all_have_the_target_nothing_can_be_triggered(
    command, parts, corpora, monkeypatch, capsys
):
    test_set = readers.read_corpus("vox", corpora, "test")
    female = [u for u in test_set if u.labels["gender"] == "female"]
    sets = dict.fromkeys(("train", "dev", "test"), female)
    slm, args = make_slm(parts, "wavlm"), SimpleNamespace(task="gender", scenario="base")
    attack = gender_attack(test_set)
    loaded = evaluate.LoadedRun(slm, args, attack, fields("gender", "base"), sets)
    monkeypatch.setattr(evaluate, "load_run_and_data", lambda *_: loaded)
    pair = trace.Pair(loaded, {}, {}, dict(scenario="clean", seed=1))
    monkeypatch.setattr(trace, "load_pair", lambda _: pair)
    options = SimpleNamespace(
        run="a", clean="b", trigger=None, only=None, n=4, cache_gb=0, device="cpu"
    )
    with pytest.raises(SystemExit):
        command(options)
    assert "nothing to trigger" in capsys.readouterr().err
