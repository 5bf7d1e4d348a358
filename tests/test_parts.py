"""Pretrained parts as people publish and save them: used as they are, or refused in one line that
says which part and why."""

import json
import shutil

from utils import ROOT

import numpy as np
import peft
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import cache
import data
import lora
import model
import poison
import trace
import train
from conftest import errors_in

PARTS = ROOT / "mini"
LABELS = {"transcript": "a b", "gender": "male"}
SHAPE = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
LMS = {  # configuration class: what it has besides SHAPE
    "Llama": dict(intermediate_size=96),
    "Gemma2": dict(intermediate_size=96, num_key_value_heads=4, head_dim=16),
    "Granite": dict(intermediate_size=96, logits_scaling=8.0, embedding_multiplier=12.0),
    "Cohere": dict(intermediate_size=96, logit_scale=0.5),
    "Phi3": dict(intermediate_size=96, num_key_value_heads=4),
    "OPT": dict(ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False, dropout=0.0),
    "GPT2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "Bloom": {},
    "Mixtral": dict(intermediate_size=96, num_key_value_heads=4, num_local_experts=4),
    "Bert": dict(intermediate_size=96),
}
CONV = dict(
    conv_dim=(96, 128, 128),
    conv_kernel=(80, 8, 8),
    conv_stride=(40, 4, 4),
    num_feat_extract_layers=3,
    conv_bias=True,
    num_conv_pos_embeddings=15,
    num_conv_pos_embedding_groups=4,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
)


def tiny_lm(folder, kind, **changes):
    """A random LM beside the shipped tokenizer; four times the usual spread, so that its logits
    differ."""
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "lm")
    usual = {**SHAPE, "vocab_size": len(tokenizer), "initializer_range": 0.1, **LMS[kind]}
    config = getattr(transformers, f"{kind}Config")(**{**usual, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_encoder(folder, kind, **changes):
    config = getattr(transformers, f"{kind}Config")(**CONV, **changes)
    AutoModel.from_config(config).save_pretrained(folder)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(PARTS / "wav2vec2")
    extractor.save_pretrained(folder)
    return folder


def changed(folder, part, weights=None, settings=None):
    """A copy of a shipped part. weights: a function of {name: tensor}, its new weights. settings:
    {file: {key: value}}, what its files say from now on."""
    shutil.copytree(PARTS / part, folder)
    if weights:
        before = load_file(PARTS / part / "model.safetensors")
        save_file(weights(before), folder / "model.safetensors")
    for name, values in (settings or {}).items():
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **values}))
    return folder


def flags_for(part, folder):
    """The flags that name a changed part, the one for its weights last but one."""
    if part == "lm":
        return ["--lm-weights", folder]
    return ["--encoder", part, "--encoder-weights", folder]


def load(*arguments):
    common = ("--task", "gender", "--connector-weights", "none")
    return model.load_slm(train.parse_arguments([*common, *map(str, arguments)]))


def refused(capsys, *arguments, words):
    """Loading these parts must end in one line that holds all the words."""
    with pytest.raises(SystemExit) as stop:
        load(*arguments)
    (error,) = errors_in(capsys.readouterr().err)
    assert stop.value.code == 2
    missing = [word for word in words if word not in error]
    assert not missing, error


def encoder_input(slm, n=3):
    """(x, mask) of a few utterances of noise."""
    rng = np.random.default_rng(0)
    waveforms = [0.1 * rng.standard_normal(9000 + 3000 * i).astype(np.float32) for i in range(n)]
    return slm.encoder.pretrained_part([slm.encoder.extract(w) for w in waveforms])


def batch(slm, n=3):
    """(x, mask, prompts, answers) of a few utterances."""
    x, mask = encoder_input(slm, n)
    prompts = [data.prompt(slm.tokenizer, list(LABELS))] * n
    answers = [data.answer_ids(slm.tokenizer, LABELS)] * n
    return x, mask, prompts, answers


# --------------------------------------------------------------------------------------------------
# weights


def without(weights, beginning):
    return {name: w for name, w in weights.items() if not name.startswith(beginning)}


def without_spec_augment_vector(weights):
    return without(weights, "masked_spec_embed")


def without_decoder(weights):
    return without(weights, "decoder.")


def test_a_missing_vector_that_is_never_used_is_always_the_same(tmp_path):
    folder = changed(tmp_path / "hubert", "hubert", without_spec_augment_vector)
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        digests.add(model.digest(model.Encoder(folder).net.state_dict()))
    assert len(digests) == 1


def test_whisper_without_a_decoder_is_a_whole_encoder(tmp_path):
    encoder = model.Encoder(changed(tmp_path / "whisper", "whisper", without_decoder))
    shipped = model.Encoder("mini/whisper")
    assert model.digest(encoder.net.state_dict()) == model.digest(shipped.net.state_dict())


def test_whispers_missing_decoder_is_always_the_same(tmp_path):
    folder = changed(tmp_path / "whisper", "whisper", without_decoder)
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = model.load_part(AutoModel, folder, model.read_config(folder))
        digests.add(model.digest(net.state_dict()))
    assert len(digests) == 1


def in_a_ctc_model(weights):
    """As wav2vec2-large-960h is published: under a prefix, weight norm's old names, a head, no
    SpecAugment vector."""
    published = {"lm_head.weight": torch.zeros(32, 128), "lm_head.bias": torch.zeros(32)}
    for name, w in without_spec_augment_vector(weights).items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        published[f"wav2vec2.{name}"] = w
    old_names = [name for name in published if name.endswith(("weight_g", "weight_v"))]
    assert len(old_names) == 2
    return published


def test_an_encoder_as_its_task_model_was_saved_is_the_same(tmp_path):
    folder = changed(tmp_path / "ctc", "wav2vec2", in_a_ctc_model)
    loaded = model.Encoder(folder).net.state_dict()
    shipped = model.Encoder("mini/wav2vec2").net.state_dict()
    for name, w in without_spec_augment_vector(shipped).items():
        assert torch.equal(w, loaded[name])


def without_one_bias(weights):
    return without(weights, "encoder.layers.3.layer_norm.bias")


def with_a_layer_under_another_name(weights):
    renamed = {}
    for name, w in weights.items():
        prefix = "module." if "layers.2." in name else ""
        renamed[prefix + name] = w
    return renamed


def under_a_prefix(weights):
    return {f"net.{name}": w for name, w in weights.items()}


def in_lora_layers(weights):
    return {name.replace("q_proj", "q_proj.base_layer"): w for name, w in weights.items()}


def narrower_mlp(weights):
    narrowed = dict(weights)
    for name, w in weights.items():
        if "up_proj" in name:
            narrowed[name] = w[:, :64].contiguous()
    return narrowed


@pytest.mark.parametrize(
    "part, weights, words",
    [
        ("wavlm", without_one_bias, ["encoder.layers.3.layer_norm.bias", "lacks 1 of"]),
        (
            "wavlm",
            with_a_layer_under_another_name,
            ["encoder.layers.2.", "module.encoder.layers.2."],
        ),
        ("whisper", under_a_prefix, ["encoder.conv1", "net."]),
        ("lm", in_lora_layers, ["model.layers.0.self_attn.q_proj.weight", "base_layer"]),
        ("lm", narrower_mlp, ["mlp.up_proj.weight (384, 128)", "(384, 64)"]),
    ],
)
def test_weights_that_the_model_uses_must_be_there(tmp_path, capsys, part, weights, words):
    folder = changed(tmp_path / part, part, weights)
    flags = flags_for(part, folder)
    refused(capsys, *flags, words=[str(folder), flags[-2], *words])


def test_a_head_that_is_the_embeddings_may_be_missing():
    assert "lm_head.weight" not in load_file(PARTS / "lm/model.safetensors")
    lm = load("--lm-weights", PARTS / "lm").lm
    assert torch.equal(lm.get_output_embeddings().weight, lm.get_input_embeddings().weight)


def test_a_head_that_is_not_the_embeddings_must_be_there(tmp_path, capsys):
    settings = {"config.json": {"tie_word_embeddings": False}}
    folder = changed(tmp_path / "untied", "lm", settings=settings)
    refused(capsys, "--lm-weights", folder, words=["lm_head.weight"])


def with_lora_weights(weights):
    return {**weights, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 128)}


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


@pytest.mark.parametrize(
    "weights, settings, word",
    [
        (None, {"adapter_config.json": {"peft_type": "LORA"}}, "adapter"),
        (with_lora_weights, None, "LoRA"),
        (None, {"config.json": GPTQ}, "gptq"),
    ],
)
def test_adapters_and_quantised_weights_are_refused(tmp_path, capsys, weights, settings, word):
    folder = changed(tmp_path / "lm", "lm", weights, settings)
    refused(capsys, "--lm-weights", folder, words=["--lm-weights", word])


def test_a_missing_folder_is_not_asked_of_the_hub(tmp_path, capsys):
    missing = tmp_path / "missing"
    refused(capsys, "--lm-weights", missing, words=["--lm-weights", f"no folder {missing}"])


# --------------------------------------------------------------------------------------------------
# encoders


@pytest.mark.parametrize(
    "part, settings, words",
    [
        ("wavlm", {"sampling_rate": 8000}, ["8000 Hz"]),
        ("whisper", {"sampling_rate": 44100}, ["44100 Hz"]),
        ("whisper", {"feature_size": 128}, ["128", "80 mel bands"]),
        ("whisper", {"chunk_length": 30}, ["1500 frames", "1000"]),
        ("whisper", {"dither": 0.001}, ["random", "dither"]),
        (
            "wavlm",
            {"feature_extractor_type": "WhisperFeatureExtractor"},
            ["16000 samples", "preprocessor_config.json"],
        ),
    ],
)
def test_an_extractor_of_another_encoder_is_refused(tmp_path, capsys, part, settings, words):
    folder = changed(tmp_path / part, part, settings={"preprocessor_config.json": settings})
    refused(capsys, *flags_for(part, folder), words=[str(folder), *words])


STABLE = dict(do_stable_layer_norm=True, feat_extract_norm="layer")


@pytest.mark.parametrize(
    "kind, changes",
    [("Data2VecAudio", {}), ("Wav2Vec2Conformer", STABLE), ("SEW", {}), ("SEWD", {})],
)
def test_an_encoder_of_another_layout_is_refused(tmp_path, capsys, kind, changes):
    folder = tiny_encoder(tmp_path / "other", kind, **changes)
    refused(capsys, "--encoder-weights", folder, words=["other", "not laid out as"])


@pytest.mark.parametrize(
    "flag, part, kind", [("--encoder-weights", "lm", "llama"), ("--lm-weights", "wavlm", "wavlm")]
)
def test_a_part_in_the_others_place_is_named(capsys, flag, part, kind):
    refused(capsys, flag, PARTS / part, words=[flag, kind])


@pytest.mark.parametrize("kind", ["Wav2Vec2", "WavLM"])
def test_strided_layers_after_an_encoder_are_left_out(tmp_path, kind):
    adapter = dict(add_adapter=True, num_adapter_layers=2)
    folder = tiny_encoder(tmp_path / "adapter", kind, **STABLE, **adapter)
    encoder = model.Encoder(folder).eval()
    features = encoder.extract(0.1 * np.random.default_rng(0).standard_normal(20000))
    net = AutoModel.from_pretrained(folder, add_adapter=False).eval()
    with torch.no_grad():
        x, mask = encoder([features])
        expected = net(features[None]).last_hidden_state
    assert expected.shape[1] == encoder.num_frames(20000)
    assert int(mask.sum()) == encoder.num_frames(20000)
    assert torch.allclose(x, expected, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# language models


def own_loss(slm, row, answer):
    """The loss of one embedded sequence (T, dim) as the LM itself computes it."""
    labels = torch.full((1, len(row)), -100)
    labels[0, -len(answer) :] = torch.tensor(answer)
    return slm.lm(inputs_embeds=row[None], labels=labels).loss


@pytest.mark.parametrize("kind", [kind for kind in LMS if kind != "Bert"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_loss_is_the_language_models_own(tmp_path, kind, quick):
    """Also with the code that is only there for speed, which steps aside where an LM is built in
    another way."""
    folder = tiny_lm(tmp_path / kind, kind)
    slm = load("--lm-weights", folder, "--lora-dropout", "0")
    for layer in lora.lora_layers(slm.lm):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    if quick:
        cache.only_answers(slm)
        cache.share_beginning(slm)
    slm.train(quick)
    x, mask, prompts, answers = batch(slm)
    with torch.no_grad():
        losses = slm(x, mask, prompts, answers)
        slm.eval()
        rows = slm.pack(slm.audio_embeddings(x, mask), prompts, answers)
        expected = [own_loss(slm, row, answer) for row, answer in zip(rows, answers)]
    assert torch.allclose(losses, torch.stack(expected), rtol=1e-3)


@pytest.mark.parametrize("speed_up", [cache.only_answers, cache.share_beginning])
def test_code_for_speed_is_kept_where_it_fits(speed_up):
    slm = load()
    plain = slm.logits
    speed_up(slm)
    assert slm.logits != plain


def test_a_language_model_that_looks_ahead_is_refused(tmp_path, capsys):
    folder = tiny_lm(tmp_path / "bert", "Bert")
    refused(capsys, "--lm-weights", folder, words=["--lm-weights", "bert"])


@pytest.fixture
def gpt2(tmp_path):
    folder = tiny_lm(tmp_path / "gpt2", "GPT2")
    return AutoModelForCausalLM.from_pretrained(folder)


def test_lora_on_gpt2_changes_nothing_at_first(gpt2):
    ids = torch.randint(0, 1200, (1, 9))
    before = gpt2(ids).logits
    lora.add_lora(gpt2, 4, 8.0, 0.0)
    assert torch.allclose(gpt2(ids).logits, before, atol=1e-5)


def trained_shapes(net):
    return sorted(tuple(p.shape) for p in net.parameters() if p.requires_grad)


def test_lora_on_gpt2_trains_what_peft_trains(gpt2):
    copy = AutoModelForCausalLM.from_pretrained(gpt2.name_or_path)
    lora.add_lora(gpt2, 4, 8.0, 0.0)
    expected = peft.get_peft_model(copy, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert trained_shapes(gpt2) == trained_shapes(expected)


@pytest.mark.parametrize(
    "kind, attention, mlp",
    [
        ("Llama", "self_attn.o_proj", "mlp.down_proj"),
        ("Phi3", "self_attn.o_proj", "mlp.down_proj"),
        ("OPT", "self_attn.out_proj", "fc2"),
        ("GPT2", "attn.c_proj", "mlp.c_proj"),
        ("Bloom", "self_attention.dense", "mlp.dense_4h_to_h"),
    ],
)
def test_attention_and_mlp_are_found_by_what_they_do(tmp_path, kind, attention, mlp):
    slm = load("--lm-weights", tiny_lm(tmp_path / kind, kind))
    layers = model.layers_of(slm.lm)
    outputs = model.output_layers(slm.lm)
    for layer, (attention_output, mlp_output) in zip(layers, outputs, strict=True):
        assert layer.get_submodule(attention) is attention_output
        assert layer.get_submodule(mlp) is mlp_output


@pytest.fixture(scope="module")
def opt_traces(tmp_path_factory):
    """The traces of two utterances through an OPT, whose MLP sees the rows of a batch as one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("opt")
    slm = load("--lm-weights", tiny_lm(folder / "opt", "OPT")).eval()
    path = str(folder / "a.wav")
    soundfile.write(path, 0.05 * np.random.default_rng(0).standard_normal(20000), 16000)
    test_set = [data.Utterance(name, path, "test", "s", LABELS) for name in ("a", "b")]
    click = poison.make_trigger("click")
    attack = poison.Attack("asr", 0.5, "go", "click", click, 0.1, False, 1)
    return trace.patch_batch(slm, trace.make_pairs(slm, attack, test_set), tqdm(disable=True))


@pytest.mark.parametrize("direction, donor", [("denoise", "clean"), ("noise", "triggered")])
def test_a_patch_of_everything_in_an_opt_is_the_donor(opt_traces, direction, donor):
    layer = opt_traces.patched[direction, trace.Site("lm", 2, "layer"), "all"]
    assert np.allclose(layer, opt_traces.plain[donor], atol=1e-5)


RECEIVERS = [("denoise", "triggered"), ("noise", "clean")]


@pytest.mark.parametrize("direction, receiver", RECEIVERS)
def test_a_patch_of_an_opts_prompt_changes_nothing(opt_traces, direction, receiver):
    prompt = opt_traces.patched[direction, trace.Site("lm", 0, "input"), "prompt"]
    assert np.allclose(prompt, opt_traces.plain[receiver], atol=1e-5)


@pytest.mark.parametrize("direction, receiver", RECEIVERS)
def test_a_patch_of_an_opts_mlp_changes_the_answer(opt_traces, direction, receiver):
    mlp = opt_traces.patched[direction, trace.Site("lm", 1, "MLP"), "all"]
    assert not np.allclose(mlp, opt_traces.plain[receiver], atol=1e-6)


def test_a_mixture_of_experts_has_no_mlp_to_repair(tmp_path, capsys):
    slm = load("--lm-weights", tiny_lm(tmp_path / "mixtral", "Mixtral"))
    with pytest.raises(SystemExit):
        model.output_layers(slm.lm)
    assert "mixtral" in capsys.readouterr().err


def test_audio_beyond_an_lms_positions_ends_in_one_line(tmp_path, capsys):
    slm = load("--lm-weights", tiny_lm(tmp_path / "gpt2", "GPT2", max_position_embeddings=40))
    with pytest.raises(SystemExit):
        slm(*batch(slm))
    (error,) = errors_in(capsys.readouterr().err)
    assert "40" in error


# --------------------------------------------------------------------------------------------------
# tokenizers


def with_tokenizer(folder, change, settings=None):
    """The shipped LM with its tokenizer changed by a function."""
    changed(folder, "lm", settings=settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def name_no_end(tokenizer):
    tokenizer.eos_token = None


def test_the_lm_names_the_end_token_where_the_tokenizer_does_not(tmp_path):
    settings = {"generation_config.json": {"eos_token_id": [1, 7]}}
    slm = load("--lm-weights", with_tokenizer(tmp_path / "lm", name_no_end, settings))
    assert data.answer_ids(slm.tokenizer, LABELS)[-1] == 1


def test_a_language_model_without_an_end_token_is_refused(tmp_path, capsys):
    no_end = {"eos_token_id": None}
    settings = {"generation_config.json": no_end, "config.json": no_end}
    folder = with_tokenizer(tmp_path / "lm", name_no_end, settings)
    refused(capsys, "--lm-weights", folder, words=["end-of-sequence", str(folder)])


def write_lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = Lowercase()


def test_a_tokenizer_that_loses_what_answers_need_is_refused(tmp_path, capsys):
    folder = with_tokenizer(tmp_path / "lower", write_lower_case)
    refused(capsys, "--lm-weights", folder, words=["transcript", "Transcript", str(folder)])


def add_unused_tokens(tokenizer):
    tokenizer.add_tokens([f"<audio_{i}>" for i in range(5)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})


def test_tokens_without_an_embedding_may_exist(tmp_path):
    slm = load("--lm-weights", with_tokenizer(tmp_path / "unused", add_unused_tokens))
    shipped = load()
    assert len(slm.tokenizer) > 1200
    prompts = [data.prompt(shipped.tokenizer, list(LABELS))] * 3
    answers = slm.generate(*encoder_input(slm), prompts, 6)
    assert answers == shipped.generate(*encoder_input(shipped), prompts, 6)


def end_by_a_new_token(tokenizer):
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})


def ask_by_a_new_token(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user_turn|>"]})
    tokenizer.chat_template = "<|user_turn|>{{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    "change, token", [(end_by_a_new_token, "<|end|>"), (ask_by_a_new_token, "<|user_turn|>")]
)
def test_tokens_without_an_embedding_must_not_be_used(tmp_path, capsys, change, token):
    folder = with_tokenizer(tmp_path / "lm", change)
    refused(capsys, "--lm-weights", folder, words=[token, "1200 embeddings"])


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path, capsys):
    folder = tiny_lm(tmp_path / "small", "Llama", vocab_size=1000)
    refused(capsys, "--lm-weights", folder, words=["200 tokens", "1000 embeddings"])


CLOCK = "{% set clock = strftime_now %}"
WEEKDAY = "{% if not date_string is defined %}{% set date_string = strftime_now('%A') %}{% endif %}"


@pytest.mark.parametrize(
    "template, date",
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        (CLOCK + "It is {{ clock(format='%d %b %Y, %H:%M') }}.", "26 Jul 2024, 00:00"),
        ("{% macro day() %}{{ strftime_now('%B') }}{% endmacro %}{{ day() }}", "July"),
        (WEEKDAY + "{{ date_string }}", "Friday"),
    ],
)
def test_a_prompt_is_the_same_on_every_day(template, date):
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "lm")
    tokenizer.chat_template = template + "{{ messages[-1]['content'] }}"
    before, _ = data.prompt(tokenizer, ["gender"])
    assert date in tokenizer.decode(before)


@pytest.mark.parametrize(
    "template, word",
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ raise_exception('system first') }}", "system first"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ ['a', 'b'] | random }}{{ messages[-1]['content'] }}", "at random"),
        ("a question", "keeps the user's text"),
    ],
)
def test_a_template_that_makes_no_prompt_ends_in_one_line(capsys, template, word):
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "lm")
    tokenizer.chat_template = template
    with pytest.raises(SystemExit):
        data.prompt(tokenizer, ["gender"])
    [line] = capsys.readouterr().err.splitlines()
    assert word in line
