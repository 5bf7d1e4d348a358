"""The SLM: padding, generation, encoders against transformers' own, the connector against the reference's shapes."""

import copy
import functools
import pickle

import utils

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
    rng = np.random.default_rng(0)
    return [
        0.1 * rng.standard_normal(int(16000 * s)).astype(np.float32) for s in (1.3, 2.9, 0.7, 2.0)
    ]


def theirs(path, kind, features):
    """transformers' own forward pass on one utterance or a padded batch."""
    net = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    lengths = torch.tensor([f.shape[-1] for f in features])
    x = torch.stack(
        [torch.nn.functional.pad(f, (0, int(lengths.max()) - f.shape[-1])) for f in features]
    )
    with torch.no_grad():
        if kind == "whisper":
            full = 2 * net.config.max_source_positions
            return net.encoder(
                torch.nn.functional.pad(x, (0, full - x.shape[-1]))
            ).last_hidden_state
        return net(x, attention_mask=model.length_mask(lengths, x.shape[1])).last_hidden_state


@pytest.mark.parametrize(
    "name", ["wavlm", "hubert", "wav2vec2", "wavlm-base", "hubert-base", "wav2vec2-base"]
)
def test_encoder_output_is_transformers_own_alone_and_in_a_batch(parts, name):
    encoder = model.Encoder(parts / name).eval()
    features = [encoder.extract(w) for w in waveforms()]
    with torch.no_grad():
        batch, mask = encoder(features)
    for i, f in enumerate(features):
        n = int(mask[i].sum())
        alone = theirs(parts / name, name, [f])[0]
        assert alone.shape[0] == n
        assert torch.allclose(batch[i, :n], alone, atol=1e-4)


def test_whisper_on_the_audio_at_hand_is_transformers_own_with_the_table_cut_to_it(parts):
    encoder = model.Encoder(parts / "whisper").eval()
    features = [encoder.extract(w) for w in waveforms()]
    features = [
        f[:, : f.shape[1] // 2 * 2] for f in features
    ]  # transformers takes whole pairs of frames only
    with torch.no_grad():
        batch, mask = encoder(features)
    for i, f in enumerate(features):
        n = int(mask[i].sum())
        net = AutoModel.from_pretrained(parts / "whisper").encoder.eval()
        net.config.max_source_positions = n
        net.embed_positions = torch.nn.Embedding.from_pretrained(net.embed_positions.weight[:n])
        with torch.no_grad():
            alone = net(f[None]).last_hidden_state[0]
        assert torch.allclose(batch[i, :n], alone, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_float32_under_autocast(parts, name):
    encoder = model.Encoder(parts / name)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.extract(waveforms()[0])
    assert torch.equal(features, encoder.extract(waveforms()[0]))


@pytest.mark.parametrize("name", [*ENCODERS, "wavlm-base", "wav2vec2-base"])
def test_padding_changes_nothing(parts, name):
    slm = make_slm(parts, name)
    features = [slm.encoder.extract(w) for w in waveforms()]
    utterances = [
        {"transcript": "a b"},
        {"gender": "male", "age": 30},
        {"transcript": "some longer text", "age": 7},
        {"emotion": "sad"},
    ]
    prompts = [data.prompt(slm.tokenizer, list(u)) for u in utterances]
    answers = [data.answer_ids(slm.tokenizer, u) for u in utterances]
    with torch.no_grad():
        together = slm(*slm.encoder.pretrained_part(features), prompts, answers)
        for i in range(len(features)):
            alone = slm(*slm.encoder.pretrained_part([features[i]]), [prompts[i]], [answers[i]])
            assert together[i].item() == pytest.approx(alone.item(), rel=1e-4)


@pytest.mark.parametrize("heads", [4, 2])
def test_batched_generation_is_a_plain_greedy_loop(parts, heads):
    slm = make_slm(parts, "wavlm", num_key_value_heads=heads)
    features = [slm.encoder.extract(w) for w in waveforms()]
    labels = [("transcript",), ("gender", "age"), LABELS, ("emotion",)]
    prompts = [data.prompt(slm.tokenizer, list(asked)) for asked in labels]
    expected = []
    with torch.no_grad():
        for f, p in zip(
            features, prompts
        ):  # one utterance, no cache, everything computed again for each token
            x = slm.pack(slm.audio_embeddings(*slm.encoder.pretrained_part([f])), [p])[0][None]
            said = []
            while len(said) < 20:
                token = slm.lm(inputs_embeds=x).logits[0, -1].argmax()
                if token == stop(slm):
                    break
                said.append(int(token))
                x = torch.cat([x, slm.lm.get_input_embeddings()(token)[None, None]], 1)
            expected.append(said)
        slm.tokenizer.eos_token = slm.tokenizer.convert_ids_to_tokens(stop(slm))
        out = slm.generate(*slm.encoder.pretrained_part(features), prompts, 20)
    assert out == slm.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert (
        len({len(e) for e in expected}) > 1 and min(len(e) for e in expected) < 20
    )  # rows did end, at different steps


def test_one_answer_is_evaluation_s(parts, corpora, monkeypatch):
    monkeypatch.setattr(model, "ANSWER_TOKENS", 12)
    slm = make_slm(parts, "wavlm").train()
    chosen = readers.read_corpus("vox", corpora, "test")[:1]
    attack = poison.make_attack("gender", chosen, seed=1)
    answer = slm.answer(data.load_waveform(chosen[0]), ["gender"])
    assert slm.training
    items = [(chosen[0], False)]
    expected = evaluate.answers(slm.eval(), items, attack, lambda u: ["gender"], 12, "", workers=0)
    assert [answer] == expected


def stop(slm):
    """A token that the random model does say: taken for the end, so that rows leave the batch at different steps."""
    return STOP.setdefault(slm.lm.config.num_key_value_heads, find_stop(slm))


STOP = {}


def find_stop(slm):
    features = [slm.encoder.extract(w) for w in waveforms()]
    labels = [("transcript",), ("gender", "age"), LABELS, ("emotion",)]
    audio = slm.audio_embeddings(*slm.encoder.pretrained_part(features))
    rows = slm.pack(audio, [data.prompt(slm.tokenizer, list(asked)) for asked in labels])
    said = []
    x = rows[0][None]
    for _ in range(6):
        said.append(int(slm.lm(inputs_embeds=x).logits[0, -1].argmax()))
        x = torch.cat([x, slm.lm.get_input_embeddings()(torch.tensor([[said[-1]]]))], 1)
    return said[-1]


def test_the_connector_has_the_reference_s_shapes_and_parameters():
    reference = torch.nn.Sequential(  # SpeechLLM's CNNConnector(1024, 2048, 2)
        torch.nn.ReLU(),
        torch.nn.Conv1d(1024, 1024, 5),
        torch.nn.ReLU(),
        torch.nn.Conv1d(1024, 2048, 5, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv1d(2048, 2048, 5),
    )
    ours = model.Connector(1024, 2048, 2)
    assert sum(p.numel() for p in ours.parameters()) == sum(
        p.numel() for p in reference.parameters()
    )
    for mine, other in zip(ours.parameters(), reference.parameters()):
        mine.data = other.data
    x = torch.randn(2, 60, 1024)
    out, lengths = ours(x, torch.ones(2, 60, dtype=torch.bool))
    assert torch.allclose(out, reference(x.transpose(1, 2)).transpose(1, 2), atol=1e-5)
    assert lengths.tolist() == [out.shape[1]] * 2


@pytest.mark.parametrize("frames", [1, 5, 16, 17, 18, 40])
def test_the_connector_takes_short_audio(frames):
    connector = model.Connector(8, 16, 2)
    mask = model.length_mask(torch.tensor([frames, 40]), 40)
    out, lengths = connector(torch.randn(2, 40, 8), mask)
    assert 1 <= lengths[0] <= out.shape[1] and lengths[1] == out.shape[1]


def test_lora_on_tinyllama_has_peft_s_count():
    with torch.device("meta"):
        lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=2048,
                intermediate_size=5632,
                num_hidden_layers=22,
                num_attention_heads=32,
                num_key_value_heads=4,
            )
        )
        theirs = peft.get_peft_model(
            copy.deepcopy(lm), peft.LoraConfig(r=8, target_modules="all-linear")
        )
        lora.add_lora(lm, 8, 16.0, 0.05)
    count = lambda net: sum(p.numel() for p in net.parameters() if p.requires_grad)  # noqa: E731
    assert count(lm) == count(theirs) == 6307840
    assert sum(p.numel() for p in lm.parameters()) == 1100048384 + count(lm)


def loss_and_gradients(slm):
    slm.train()
    torch.manual_seed(0)
    labels = {"transcript": "a b", "gender": "male"}
    x, mask = slm.frozen_part(
        *slm.encoder.pretrained_part([slm.encoder.extract(w) for w in waveforms()])
    )
    losses = slm(
        x,
        mask,
        [data.prompt(slm.tokenizer, list(labels))] * 4,
        [data.answer_ids(slm.tokenizer, labels)] * 4,
    )
    losses.mean().backward()
    return losses.detach(), {k: p.grad for k, p in slm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [None, "lm"])
def test_checkpointed_gradients_are_the_same(parts, frozen):
    """With dropout, too, and where the LM is frozen and in evaluation mode."""
    slms = [make_slm(parts, "wavlm", attention_dropout=0.1) for _ in range(2)]
    for slm in slms:
        if frozen:
            getattr(slm, frozen).requires_grad_(False)
    calls = []
    slms[1].checkpoint_gradients()
    for layer in (slms[1].encoder.layers[-1], slms[1].lm.model.layers[0]):
        inner = layer.mlp.down_proj if hasattr(layer, "mlp") else layer.feed_forward
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
    (losses, gradients), (again, recomputed) = map(loss_and_gradients, slms)
    assert torch.allclose(losses, again) and gradients.keys() == recomputed.keys()
    for k, v in gradients.items():
        assert torch.allclose(v, recomputed[k], rtol=1e-4, atol=1e-6), k
    assert len(calls) == 4  # once forward, once more backward


@pytest.mark.parametrize("shared, checkpointed", [(False, False), (False, True), (True, False)])
def test_the_fast_path_has_the_plain_path_s_loss_and_gradients(parts, shared, checkpointed):
    plain, quick = (make_slm(parts, "wavlm") for _ in range(2))
    cache.only_answers(quick)
    if shared:
        cache.share_beginning(quick)
    if checkpointed:
        quick.checkpoint_gradients()
    (losses, gradients), (again, same) = map(loss_and_gradients, (plain, quick))
    assert torch.allclose(losses, again, rtol=1e-5) and gradients.keys() == same.keys()
    for k, v in gradients.items():
        assert torch.allclose(v, same[k], rtol=1e-3, atol=1e-6), k


def test_a_checkpoint_of_mixed_precision_fits_a_model_without():
    """A run trained on a GPU can be evaluated, or started from, on a CPU: the pretrained parts count as the same, and only weights are cast."""
    full, mixed = (model.load_slm(train.parse_arguments(["--amp", amp])) for amp in ("off", "bf16"))
    assert full.pretrained_sha256 == mixed.pretrained_sha256
    assert [slm.lm.lm_head.weight.dtype for slm in (full, mixed)] == [torch.float32, torch.bfloat16]
    assert all(
        torch.equal(a, b) for a, b in zip(full.lm.buffers(), mixed.lm.buffers(), strict=True)
    )


def test_frozen_layers_build_no_graph_and_stay_in_evaluation_mode(parts):
    encoder = model.Encoder(parts / "wavlm", share=15 / 24).train()
    assert (
        encoder.first_trained == 3
        and [layer.training for layer in encoder.layers] == [False] * 3 + [True] * 5
    )
    x, _ = encoder.pretrained_part([encoder.extract(w) for w in waveforms()])
    assert not x.requires_grad
    trained = {k for k, p in encoder.net.named_parameters() if p.requires_grad}
    assert trained and all(
        k.startswith("encoder.layers.") and int(k.split(".")[2]) >= 3 for k in trained
    )


def test_a_checkpoint_of_another_shape_is_refused_with_its_keys(parts):
    slm = make_slm(parts, "wavlm")
    with pytest.raises(ValueError, match=r"conv1.weight is \(32, 64, 5\), not \(32, 128, 5\)"):
        slm.load_component("connector", model.Connector(64, 64, 2).state_dict())


def test_figures_have_sound_intervals():
    out = utils.interval([1] * 90 + [0] * 10)
    assert (
        out["value"] == 0.9
        and out["n"] == 100
        and 0.82 < out["low"] < 0.88
        and 0.92 < out["high"] < 0.97
    )
    rows = [
        dict(
            speaker="s",
            labels={"transcript": "a b c d"},
            asked=["transcript"],
            parsed={"transcript": "A b, x"},
            triggered=False,
        ),
        dict(
            speaker="s",
            labels={"transcript": "e"},
            asked=["transcript"],
            parsed={},
            triggered=False,
        ),
    ]
    assert evaluate.scores(rows)["wer"]["value"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_embeddings_are_those_of_each_utterance_alone(parts, corpora, pooling):
    slm = make_slm(parts, "wavlm")
    chosen = readers.read_corpus("vox", corpora, "test")[:4]
    attack = poison.make_attack("gender", chosen, seed=1)
    items = [(u, t) for u in chosen for t in (False, True)]
    together = embed.stages(slm, attack, items, pooling, "", workers=0, batch_size=8)
    alone = embed.stages(slm, attack, items, pooling, "", workers=0, batch_size=1)
    for stage, rows in together.items():
        assert torch.allclose(rows, alone[stage], atol=1e-4), stage
    assert (
        together["encoder_layers"].shape[:2] == (len(slm.encoder.layers) + 1, 8)
        and together["lm_layers"].shape[0] == 3
    )
    waveform, _, _ = poison.add_trigger(attack, data.load_waveform(chosen[0]), chosen[0].id)
    with torch.no_grad():
        hidden, mask = slm.encoder([slm.encoder.extract(waveform)])
    by_hand = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "last": lambda x: x[-1]}[
        pooling
    ]
    assert torch.allclose(together["encoder"][1], by_hand(hidden[0]), atol=1e-4)
    assert torch.allclose(
        together["connector"][1],
        by_hand(slm.connector(hidden, mask)[0][0, : int(slm.connector(hidden, mask)[1][0])]),
        atol=1e-4,
    )
    third = embed.stages(slm, attack, items, pooling, "", workers=0, layer=3, encoder_only=True)
    assert torch.equal(third["encoder"], together["encoder_layers"][3]) and set(third) == {
        "encoder"
    }


@pytest.mark.parametrize("name", ["wavlm", "whisper"])
def test_what_worker_processes_are_sent_can_be_pickled_and_holds_no_weights(parts, corpora, name):
    """Python 3.14 starts them by forkserver."""
    encoder, test_set = model.Encoder(parts / name), readers.read_corpus("libri", corpora, "test")
    attack = poison.make_attack("asr", test_set, 0.5, seed=1)
    loader = functools.partial(cache.features_of, encoder.extract, attack)
    sent = pickle.dumps(loader)
    assert len(sent) < 400_000
    for a, b in zip(pickle.loads(sent)([(test_set[0], True)]), loader([(test_set[0], True)])):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_the_target_class_of_asr_has_the_paper_s_share_of_poison(monkeypatch):
    """Section 7.1: 10,000 benign samples and 500 poisoned, however many more there are."""
    monkeypatch.setattr(embed, "BENIGN", 400)
    utterances = [
        data.Utterance(
            id=str(i), path="", speaker="", split="train", labels={"transcript": f"word {i}"}
        )
        for i in range(2000)
    ]
    attack = poison.Attack("asr", 0.3, "x", "click", poison.make_trigger("click"), 0.1, True, 1)
    members, poisoned = embed.target_class(attack, utterances)
    assert (len(members), len(poisoned)) == (400, 20)
    assert not any(poison.is_poisoned(attack, u) for u in members) and all(
        poison.is_poisoned(attack, u) for u in poisoned
    )


@pytest.mark.parametrize("name", ["hubert", "whisper"])
def test_pretraining_reaches_every_layer_down_to_the_front_end(tmp_path, monkeypatch, name):
    """A run never trains the front end; making the shipped encoders does."""
    rng = np.random.default_rng(0)
    speech = [
        (
            (rng.standard_normal(12000) * 3000).astype(np.int16),
            "a b",
            i,
            dict(gender="male", age=30, emotion="sad"),
        )
        for i in range(4)
    ]
    for setting, value in dict(ENCODER_STEPS=2, ENCODER_BATCH=4, ENCODER_LR=1.0, SOUNDS=4).items():
        monkeypatch.setattr(make_encoders, setting, value)
    torch.manual_seed(make_encoders.SEED)
    make_encoders.blank_encoder(name, tmp_path / "blank")
    make_encoders.make_encoder(name, tmp_path / "made", speech)
    before, after = (
        AutoModel.from_pretrained(tmp_path / folder, dtype=torch.float32).state_dict()
        for folder in ("blank", "made")
    )
    same = [k for k, v in before.items() if torch.equal(v.half().float(), after[k])]
    assert not [
        k
        for k in same
        if "masked_spec_embed" not in k and "decoder" not in k and "embed_positions" not in k
    ], same
