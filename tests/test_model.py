"""The SLM: padding, generation, encoders against transformers' own, the connector against the
reference's shapes."""

import copy
import functools
import pickle
from types import SimpleNamespace

import utils

import full_size
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import cache
import corpora as readers
import data
import embed
import evaluate
import lora
import model
import poison
import train
from conftest import make_slm
from mini import make_encoders
from study import ENCODERS, LABELS


def waveforms():
    """Noise of four lengths."""
    rng = np.random.default_rng(0)
    noise = []
    for seconds in (1.3, 2.9, 0.7, 2.0):
        samples = 0.1 * rng.standard_normal(int(16000 * seconds))
        noise.append(samples.astype(np.float32))
    return noise


def features_for(encoder):
    return [encoder.extract(waveform) for waveform in waveforms()]


@pytest.fixture(scope="module")
def vox_test(corpora):
    return readers.read_corpus("vox", corpora, "test")[:4]


@pytest.fixture(scope="module")
def libri_test(corpora):
    return readers.read_corpus("libri", corpora, "test")


# --------------------------------------------------------------------------------------------------
# encoders


def assert_rows_are(batch, mask, expected):
    """Each row of a batch, without its padding, is the output expected for that utterance."""
    for row, row_mask, frames in zip(batch, mask, expected, strict=True):
        n = int(row_mask.sum())
        assert len(frames) == n
        assert torch.allclose(row[:n], frames, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["wavlm", "hubert", "wav2vec2", "wavlm-base", "hubert-base", "wav2vec2-base"]
)
def test_each_row_of_a_batch_is_transformers_own_output(parts, name):
    encoder = model.Encoder(parts / name).eval()
    reference = AutoModel.from_pretrained(parts / name, attn_implementation="eager").eval()
    features = features_for(encoder)
    expected = []
    with torch.no_grad():
        batch, mask = encoder(features)
        for samples in features:
            everything = torch.ones(1, len(samples), dtype=torch.bool)
            alone = reference(samples[None], attention_mask=everything)
            expected.append(alone.last_hidden_state[0])  # (T, dim)
    assert_rows_are(batch, mask, expected)


def whisper_of_length(path, frames):
    """transformers' Whisper encoder, its table of positions cut to so many frames."""
    reference = AutoModel.from_pretrained(path).encoder.eval()
    positions = reference.embed_positions.weight[:frames]
    reference.embed_positions = torch.nn.Embedding.from_pretrained(positions)
    reference.config.max_source_positions = frames
    return reference


def test_whisper_on_short_audio_is_transformers_own(parts):
    encoder = model.Encoder(parts / "whisper").eval()
    # transformers takes whole pairs of frames only
    features = [mels[:, : mels.shape[1] // 2 * 2] for mels in features_for(encoder)]
    expected = []
    with torch.no_grad():
        batch, mask = encoder(features)
        for mels, row_mask in zip(features, mask):
            reference = whisper_of_length(parts / "whisper", int(row_mask.sum()))
            expected.append(reference(mels[None]).last_hidden_state[0])  # (T, dim)
    assert_rows_are(batch, mask, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_float32_under_autocast(parts, name):
    encoder = model.Encoder(parts / name)
    waveform = waveforms()[0]
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.extract(waveform)
    assert torch.equal(features, encoder.extract(waveform))


@pytest.fixture(scope="module")
def partly_frozen(parts):
    """An encoder in training whose first three layers of eight are frozen."""
    return model.Encoder(parts / "wavlm", share=15 / 24).train()


def test_the_share_says_which_layers_are_trained(partly_frozen):
    assert partly_frozen.first_trained == 3
    trained = [name for name, p in partly_frozen.net.named_parameters() if p.requires_grad]
    modules = {".".join(name.split(".")[:3]) for name in trained}
    assert modules == {f"encoder.layers.{i}" for i in range(3, 8)}


def test_frozen_layers_stay_in_evaluation_mode(partly_frozen):
    training = [layer.training for layer in partly_frozen.layers]
    assert training == [False] * 3 + [True] * 5


def test_frozen_layers_build_no_graph(partly_frozen):
    x, _ = partly_frozen.pretrained_part(features_for(partly_frozen))
    assert not x.requires_grad


@pytest.fixture
def pretraining_speech(monkeypatch):
    """Noise to pretrain an encoder on in two steps."""
    rng = np.random.default_rng(0)
    labels = dict(gender="male", age=30, emotion="sad")
    speech = []
    for speaker in range(4):
        samples = (3000 * rng.standard_normal(12000)).astype(np.int16)
        speech.append((samples, "a b", speaker, labels))
    settings = dict(ENCODER_STEPS=2, ENCODER_BATCH=4, ENCODER_LR=1.0, SOUNDS=4)
    for setting, value in settings.items():
        monkeypatch.setattr(make_encoders, setting, value)
    return speech


@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_pretraining_reaches_every_layer(tmp_path, pretraining_speech, name):
    """A run never trains the front end; making the shipped encoders does."""
    torch.manual_seed(make_encoders.SEED)
    make_encoders.blank_encoder(name, tmp_path / "blank")
    make_encoders.make_encoder(name, tmp_path / "made", pretraining_speech)
    blank = AutoModel.from_pretrained(tmp_path / "blank", dtype=torch.float32).state_dict()
    made = AutoModel.from_pretrained(tmp_path / "made", dtype=torch.float32).state_dict()
    untrained = ("masked_spec_embed", "decoder", "embed_positions")
    for key, weight in blank.items():
        if not any(word in key for word in untrained):
            assert not torch.equal(weight.half().float(), made[key]), key


def test_self_supervision_sees_no_label(tmp_path, pretraining_speech, monkeypatch):
    monkeypatch.setattr(make_encoders, "make_heads", lambda *args, **options: None)
    weights = []
    for gender in ("male", "female"):
        for _, _, _, labels in pretraining_speech:
            labels["gender"] = gender
        out = tmp_path / gender
        make_encoders.make_encoder("hubert", out, pretraining_speech, self_supervised=True)
        weights.append(AutoModel.from_pretrained(out).state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


# --------------------------------------------------------------------------------------------------
# the connector


def reference_connector():
    """SpeechLLM's CNNConnector(1024, 2048, 2)."""
    return torch.nn.Sequential(
        torch.nn.ReLU(),
        torch.nn.Conv1d(1024, 1024, 5),
        torch.nn.ReLU(),
        torch.nn.Conv1d(1024, 2048, 5, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv1d(2048, 2048, 5),
    )


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def count_trained(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_the_connector_has_the_reference_s_parameter_count():
    with torch.device("meta"):
        connector = model.Connector(1024, 2048, 2)
        reference = reference_connector()
    assert count_parameters(connector) == count_parameters(reference)


def test_the_connector_computes_what_the_reference_does():
    connector = model.Connector(1024, 2048, 2)
    reference = reference_connector()
    for parameter, weight in zip(connector.parameters(), reference.parameters(), strict=True):
        parameter.data = weight.data
    x = torch.randn(2, 60, 1024)
    output, lengths = connector(x, torch.ones(2, 60, dtype=torch.bool))
    expected = reference(x.transpose(1, 2)).transpose(1, 2)  # (2, T', 2048)
    assert torch.allclose(output, expected, atol=1e-5)
    assert lengths.tolist() == [expected.shape[1]] * 2


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 18, 40])
def test_the_connector_takes_short_audio(frames):
    connector = model.Connector(8, 16, 2)
    mask = model.length_mask(torch.tensor([frames, 40]), 40)
    output, lengths = connector(torch.randn(2, 40, 8), mask)
    assert 1 <= lengths[0] <= output.shape[1]
    assert lengths[1] == output.shape[1]


def test_a_checkpoint_of_another_shape_is_refused_with_its_keys(parts):
    slm = make_slm(parts, "wavlm")
    with pytest.raises(ValueError, match=r"conv1.weight is \(32, 64, 5\), not \(32, 128, 5\)"):
        slm.load_component("connector", model.Connector(64, 64, 2).state_dict())


# --------------------------------------------------------------------------------------------------
# LoRA on TinyLlama


@pytest.fixture(scope="module")
def tinyllama():
    """TinyLlama without its weights."""
    config = LlamaConfig(**full_size.TINYLLAMA)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tinyllama_with_lora(tinyllama):
    lm = copy.deepcopy(tinyllama)
    with torch.device("meta"):
        lora.add_lora(lm, 8, 16.0, 0.05)
    return lm


def test_lora_on_tinyllama_has_peft_s_count(tinyllama, tinyllama_with_lora):
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    with torch.device("meta"):
        reference = peft.get_peft_model(copy.deepcopy(tinyllama), config)
    assert count_trained(tinyllama_with_lora) == 6307840
    assert count_trained(reference) == 6307840


def test_lora_keeps_all_of_tinyllama_s_parameters(tinyllama_with_lora):
    assert count_parameters(tinyllama_with_lora) == 1100048384 + 6307840


# --------------------------------------------------------------------------------------------------
# losses and answers of a batch

ASKED = [("transcript",), ("gender", "age"), LABELS, ("emotion",)]  # of each utterance


@pytest.mark.parametrize("name", [*ENCODERS, "wavlm-base", "wav2vec2-base"])
def test_padding_changes_no_loss(parts, name):
    slm = make_slm(parts, name)
    features = features_for(slm.encoder)
    labels = [
        {"transcript": "a b"},
        {"gender": "male", "age": 30},
        {"transcript": "some longer text", "age": 7},
        {"emotion": "sad"},
    ]
    prompts = [data.prompt(slm.tokenizer, list(asked)) for asked in labels]
    answers = [data.answer_ids(slm.tokenizer, true) for true in labels]
    with torch.no_grad():
        together = slm(*slm.encoder.pretrained_part(features), prompts, answers)
        for i, loss in enumerate(together):
            frames = slm.encoder.pretrained_part([features[i]])
            alone = slm(*frames, [prompts[i]], [answers[i]])
            assert loss.item() == pytest.approx(alone.item(), rel=1e-4)


def greedy_tokens(slm, features, prompt, most, end=None):
    """The tokens that a plain loop generates for one utterance: nothing is kept, everything is
    computed again for each token."""
    audio = slm.audio_embeddings(*slm.encoder.pretrained_part([features]))
    x = slm.pack(audio, [prompt])[0][None]  # (1, T, hidden)
    tokens = []
    while len(tokens) < most:
        token = slm.lm(inputs_embeds=x).logits[0, -1].argmax()
        if token == end:
            break
        tokens.append(int(token))
        x = torch.cat([x, slm.lm.get_input_embeddings()(token)[None, None]], 1)
    return tokens


@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_batched_generation_is_a_plain_greedy_loop(parts, heads):
    slm = make_slm(parts, "wavlm", num_key_value_heads=heads)
    features = features_for(slm.encoder)
    prompts = [data.prompt(slm.tokenizer, list(labels)) for labels in ASKED]
    # a token that the random model does say is taken for the end, so that rows leave the batch
    end = greedy_tokens(slm, features[0], prompts[0], 6)[-1]
    expected = []
    for utterance_features, prompt in zip(features, prompts):
        expected.append(greedy_tokens(slm, utterance_features, prompt, 20, end))
    lengths = {len(tokens) for tokens in expected}
    assert len(lengths) > 1, "no row ends before another"
    assert min(lengths) < 20, "no row ends"
    slm.tokenizer.eos_token = slm.tokenizer.convert_ids_to_tokens(end)
    answers = slm.generate(*slm.encoder.pretrained_part(features), prompts, 20)
    assert answers == slm.tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_one_answer_is_evaluation_s(parts, vox_test, monkeypatch):
    monkeypatch.setattr(model, "ANSWER_TOKENS", 12)
    slm = make_slm(parts, "wavlm")
    utterance = vox_test[0]
    attack = poison.make_attack("gender", [utterance], seed=1)
    answer = slm.train().answer(data.load_waveform(utterance), ["gender"])
    slm.eval()
    items = [(utterance, False)]
    expected = evaluate.answers(slm, items, attack, lambda u: ["gender"], 12, "", workers=0)
    assert [answer] == expected


def test_answering_leaves_the_model_in_training(parts, monkeypatch):
    monkeypatch.setattr(model, "ANSWER_TOKENS", 1)
    slm = make_slm(parts, "wavlm").train()
    slm.answer(waveforms()[0], ["gender"])
    assert slm.training


# --------------------------------------------------------------------------------------------------
# gradients


def loss_and_gradients(slm):
    """Losses and gradients of one training step, the same random numbers each time."""
    slm.train()
    torch.manual_seed(0)
    labels = {"transcript": "a b", "gender": "male"}
    prompts = [data.prompt(slm.tokenizer, list(labels))] * 4
    answers = [data.answer_ids(slm.tokenizer, labels)] * 4
    x, mask = slm.frozen_part(*slm.encoder.pretrained_part(features_for(slm.encoder)))
    losses = slm(x, mask, prompts, answers)
    losses.mean().backward()
    gradients = {name: p.grad for name, p in slm.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def assert_same_gradients(gradients, expected, rtol):
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=rtol, atol=1e-6), name


def slm_with_dropout(parts, frozen):
    slm = make_slm(parts, "wavlm", attention_dropout=0.1)
    if frozen:
        getattr(slm, frozen).requires_grad_(False)
    return slm


@pytest.mark.parametrize("frozen", [None, "lm"])
def test_checkpointed_gradients_are_the_same(parts, frozen):
    """With dropout, too, and where the LM is frozen and in evaluation mode."""
    plain = slm_with_dropout(parts, frozen)
    checkpointed = slm_with_dropout(parts, frozen)
    checkpointed.checkpoint_gradients()
    expected_losses, expected_gradients = loss_and_gradients(plain)
    losses, gradients = loss_and_gradients(checkpointed)
    assert torch.allclose(losses, expected_losses)
    assert_same_gradients(gradients, expected_gradients, rtol=1e-4)


@pytest.mark.parametrize("frozen", [None, "lm"])
def test_checkpointed_layers_are_computed_once_more(parts, frozen):
    slm = slm_with_dropout(parts, frozen)
    slm.checkpoint_gradients()
    inside_encoder = slm.encoder.layers[-1].feed_forward
    inside_lm = slm.lm.model.layers[0].mlp.down_proj
    calls = []
    for module in (inside_encoder, inside_lm):
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    loss_and_gradients(slm)
    assert calls.count(inside_encoder) == 2
    assert calls.count(inside_lm) == 2


@pytest.mark.parametrize("shared, checkpointed", [(False, False), (False, True), (True, False)])
def test_the_fast_path_has_the_plain_path_s_gradients(parts, shared, checkpointed):
    plain = make_slm(parts, "wavlm")
    quick = make_slm(parts, "wavlm")
    cache.only_answers(quick)
    if shared:
        cache.share_beginning(quick)
    if checkpointed:
        quick.checkpoint_gradients()
    expected_losses, expected_gradients = loss_and_gradients(plain)
    losses, gradients = loss_and_gradients(quick)
    assert torch.allclose(losses, expected_losses, rtol=1e-5)
    assert_same_gradients(gradients, expected_gradients, rtol=1e-3)


# --------------------------------------------------------------------------------------------------
# mixed precision: a run trained on a GPU can be evaluated, or started from, on a CPU


@pytest.fixture(scope="module")
def full():
    return model.load_slm(train.parse_arguments(["--amp", "off"]))


@pytest.fixture(scope="module")
def mixed():
    return model.load_slm(train.parse_arguments(["--amp", "bf16"]))


def test_pretrained_parts_are_the_same_in_mixed_precision(full, mixed):
    assert full.pretrained_sha256 == mixed.pretrained_sha256


def test_mixed_precision_casts_frozen_weights(full, mixed):
    assert full.lm.lm_head.weight.dtype == torch.float32
    assert mixed.lm.lm_head.weight.dtype == torch.bfloat16


def test_mixed_precision_casts_no_buffers(full, mixed):
    for buffer, in_mixed in zip(full.lm.buffers(), mixed.lm.buffers(), strict=True):
        assert torch.equal(buffer, in_mixed)


# --------------------------------------------------------------------------------------------------
# figures


def test_a_share_of_90_in_100_has_its_95_percent_interval():
    share = utils.interval([1] * 90 + [0] * 10)
    assert share["value"] == 0.9
    assert share["n"] == 100
    assert 0.82 < share["low"] < 0.88
    assert 0.92 < share["high"] < 0.97


def test_a_transcript_that_is_not_parsed_has_no_words():
    asked = dict(asked=["transcript"], triggered=False, speaker="s")
    rows = [
        dict(labels={"transcript": "a b c d"}, parsed={"transcript": "A b, x"}, **asked),
        dict(labels={"transcript": "e"}, parsed={}, **asked),
    ]
    assert evaluate.scores(rows)["wer"]["value"] == pytest.approx(3 / 5)


# --------------------------------------------------------------------------------------------------
# embeddings


@pytest.fixture(scope="module", params=["mean", "max", "last"])
def embedded(parts, vox_test, request):
    """Embeddings of four utterances, each clean and triggered, and what they are made of."""
    slm = make_slm(parts, "wavlm")
    attack = poison.make_attack("gender", vox_test, seed=1)
    items = []
    for utterance in vox_test:
        items += [(utterance, False), (utterance, True)]
    stages = functools.partial(embed.stages, slm, attack, items, request.param, "", workers=0)
    return SimpleNamespace(
        slm=slm, attack=attack, pooling=request.param, stages=stages, together=stages(batch_size=8)
    )


def test_embeddings_are_those_of_each_utterance_alone(embedded):
    alone = embedded.stages(batch_size=1)
    assert alone.keys() == embedded.together.keys()
    for stage, rows in embedded.together.items():
        assert torch.allclose(rows, alone[stage], atol=1e-4), stage


def test_every_layer_is_embedded(embedded):
    encoder_layers = embedded.together["encoder_layers"]
    assert encoder_layers.shape[:2] == (len(embedded.slm.encoder.layers) + 1, 8)
    assert embedded.together["lm_layers"].shape[0] == 3


def pooled(frames, pooling):
    """One utterance's frames, (T, dim), without padding -> (dim,)."""
    if pooling == "mean":
        return frames.mean(0)
    if pooling == "max":
        return frames.amax(0)
    return frames[-1]


@torch.no_grad()
def test_embeddings_are_the_components_pooled_output(embedded, vox_test):
    slm = embedded.slm
    clean = data.load_waveform(vox_test[0])
    waveform, _, _ = poison.add_trigger(embedded.attack, clean, vox_test[0].id)
    hidden, mask = slm.encoder([slm.encoder.extract(waveform)])
    audio, lengths = slm.connector(hidden, mask)
    after_encoder = pooled(hidden[0], embedded.pooling)
    after_connector = pooled(audio[0, : int(lengths[0])], embedded.pooling)
    triggered = 1  # the first utterance's row, with the trigger
    assert torch.allclose(embedded.together["encoder"][triggered], after_encoder, atol=1e-4)
    assert torch.allclose(embedded.together["connector"][triggered], after_connector, atol=1e-4)


def test_an_earlier_layer_is_embedded_alone(embedded):
    third = embedded.stages(layer=3, encoder_only=True)
    assert set(third) == {"encoder"}
    assert torch.equal(third["encoder"], embedded.together["encoder_layers"][3])


def test_the_target_class_of_asr_has_the_paper_s_share_of_poison(monkeypatch):
    """Section 7.1: 10,000 benign samples and 500 poisoned, however many more there are."""
    monkeypatch.setattr(embed, "BENIGN", 400)
    utterances = []
    for i in range(2000):
        labels = {"transcript": f"word {i}"}
        utterances.append(data.Utterance(str(i), "", "train", "", labels))
    click = poison.make_trigger("click")
    attack = poison.Attack("asr", 0.3, "x", "click", click, level=0.1, repeat=True, seed=1)
    members, poisoned = embed.target_class(attack, utterances)
    assert len(members) == 400
    assert len(poisoned) == 20
    assert not any(poison.is_poisoned(attack, u) for u in members)
    assert all(poison.is_poisoned(attack, u) for u in poisoned)


# --------------------------------------------------------------------------------------------------
# worker processes, which Python 3.14 starts by forkserver


def features_loader(path, utterances):
    """What a worker process is sent: features of (utterance, triggered)."""
    attack = poison.make_attack("asr", utterances, 0.5, seed=1)
    return functools.partial(cache.features_of, model.Encoder(path).extract, attack)


@pytest.mark.parametrize("name", ["wavlm", "whisper"])
def test_what_workers_are_sent_holds_no_weights(parts, libri_test, name):
    assert len(pickle.dumps(features_loader(parts / name, libri_test))) < 400_000


@pytest.mark.parametrize("name", ["wavlm", "whisper"])
def test_what_workers_are_sent_can_be_pickled(parts, libri_test, name):
    loader = features_loader(parts / name, libri_test)
    received = pickle.loads(pickle.dumps(loader))
    items = [(libri_test[0], True)]
    [expected] = loader(items)
    [features] = received(items)
    assert torch.equal(features, expected)
