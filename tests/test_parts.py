"""Pretrained parts as people publish and save them: used as they are, or refused in one line that says which part and why."""

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


def tiny_lm(folder, kind, **config):
    """A random LM beside the shipped tokenizer; four times the usual spread, so that its logits differ."""
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "lm")
    config = {
        **SHAPE,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.1,
        **LMS[kind],
        **config,
    }
    lm = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_encoder(folder, kind, **config):
    net = AutoModel.from_config(getattr(transformers, f"{kind}Config")(**CONV, **config))
    net.save_pretrained(folder)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(PARTS / "wav2vec2")
    extractor.save_pretrained(folder)


def changed(folder, part, weights=lambda w: w, files={}):  # noqa: B006
    """A copy of a shipped part with other weights (a function of {name: tensor}) and settings ({file: {key: value}})."""
    shutil.copytree(PARTS / part, folder)
    save_file(weights(load_file(PARTS / part / "model.safetensors")), folder / "model.safetensors")
    for name, settings in files.items():
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **settings}))
    return folder


def load(*arguments):
    common = ("--task", "gender", "--connector-weights", "none")
    return model.load_slm(train.parse_arguments([*common, *map(str, arguments)]))


def refused(capsys, *arguments, words):
    """Loading these parts must end in one line that holds all the words."""
    with pytest.raises(SystemExit) as stop:
        load(*arguments)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def heard(slm, n=3):
    """(x, mask) of a few utterances of noise."""
    rng = np.random.default_rng(0)
    waveforms = [0.1 * rng.standard_normal(9000 + 3000 * i).astype(np.float32) for i in range(n)]
    return slm.encoder.pretrained_part([slm.encoder.extract(w) for w in waveforms])


def batch(slm, n=3):
    """(x, mask, prompts, answers) of a few utterances."""
    prompts = [data.prompt(slm.tokenizer, list(LABELS))] * n
    return *heard(slm, n), prompts, [data.answer_ids(slm.tokenizer, LABELS)] * n


# ---------------------------------------------------------------------------------------------------------------------
# weights


def test_a_vector_that_is_never_used_may_be_missing_and_is_the_same_everywhere(tmp_path):
    folder = changed(tmp_path / "hubert", "hubert", lambda w: without(w, "masked_spec_embed"))
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        digests.add(model.digest(model.Encoder(folder).net.state_dict()))
    assert len(digests) == 1


def test_whisper_without_a_decoder_is_whole_and_the_same_everywhere(tmp_path):
    folder = changed(tmp_path / "whisper", "whisper", lambda w: without(w, "decoder."))
    ours, shipped = model.Encoder(folder), model.Encoder("mini/whisper")
    assert model.digest(ours.net.state_dict()) == model.digest(shipped.net.state_dict())
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(model.load_part(AutoModel, folder, model.read_config(folder)))
    assert model.digest(nets[0].state_dict()) == model.digest(nets[1].state_dict())


def without(weights, beginning):
    return {k: v for k, v in weights.items() if not k.startswith(beginning)}


def in_a_ctc_model(weights):
    """As wav2vec2-large-960h is published: under a prefix, weight norm's old names, a head, no SpecAugment vector."""
    names = {
        k: k.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )
        for k in weights
    }
    assert sum(name.endswith(("weight_g", "weight_v")) for name in names.values()) == 2
    found = {f"wav2vec2.{names[k]}": v for k, v in weights.items() if k != "masked_spec_embed"}
    return {**found, "lm_head.weight": torch.zeros(32, 128), "lm_head.bias": torch.zeros(32)}


def test_an_encoder_under_its_task_model_s_prefix_and_old_names_is_the_same(tmp_path):
    ours = model.Encoder(changed(tmp_path / "ctc", "wav2vec2", in_a_ctc_model)).net.state_dict()
    shipped = model.Encoder("mini/wav2vec2").net.state_dict()
    for k, v in shipped.items():
        assert k == "masked_spec_embed" or torch.equal(v, ours[k])


@pytest.mark.parametrize(
    "part, weights, words",
    [
        (
            "wavlm",
            lambda w: without(w, "encoder.layers.3.layer_norm.bias"),
            ["encoder.layers.3.layer_norm.bias", "lacks 1 of"],
        ),
        (
            "wavlm",
            lambda w: {("module." if "layers.2." in k else "") + k: v for k, v in w.items()},
            ["encoder.layers.2.", "module.encoder.layers.2."],
        ),
        ("whisper", lambda w: {f"net.{k}": v for k, v in w.items()}, ["encoder.conv1", "net."]),
        (
            "lm",
            lambda w: {k.replace("q_proj", "q_proj.base_layer"): v for k, v in w.items()},
            ["model.layers.0.self_attn.q_proj.weight", "base_layer"],
        ),
        (
            "lm",
            lambda w: {k: v[:, :64].contiguous() if "up_proj" in k else v for k, v in w.items()},
            ["mlp.up_proj.weight (384, 128)", "(384, 64)"],
        ),
    ],
)
def test_weights_that_the_model_uses_must_be_there(tmp_path, capsys, part, weights, words):
    folder = changed(tmp_path / part, part, weights)
    flags = ("--lm-weights", folder) if part == "lm" else ("--encoder-weights", folder)
    whisper = ("--encoder", "whisper") if part == "whisper" else ()
    refused(capsys, *flags, *whisper, words=[str(folder), flags[0], *words])


def test_a_head_may_be_missing_where_it_is_the_embeddings_and_only_there(tmp_path, capsys):
    assert "lm_head.weight" not in load_file(PARTS / "lm/model.safetensors")
    load("--lm-weights", PARTS / "lm")
    folder = changed(
        tmp_path / "untied", "lm", files={"config.json": {"tie_word_embeddings": False}}
    )
    refused(capsys, "--lm-weights", folder, words=["lm_head.weight"])


@pytest.mark.parametrize(
    "weights, files, word",
    [
        (lambda w: w, {"adapter_config.json": {"peft_type": "LORA"}}, "adapter"),
        (
            lambda w: {**w, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 128)},
            {},
            "LoRA",
        ),
        (
            lambda w: w,
            {"config.json": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
            "gptq",
        ),
    ],
)
def test_a_part_with_adapters_or_quantised_weights_is_refused(
    tmp_path, capsys, weights, files, word
):
    folder = changed(tmp_path / "lm", "lm", weights, files)
    refused(capsys, "--lm-weights", folder, words=["--lm-weights", word])


# ---------------------------------------------------------------------------------------------------------------------
# encoders


@pytest.mark.parametrize(
    "part, files, words",
    [
        ("wavlm", {"preprocessor_config.json": {"sampling_rate": 8000}}, ["8000 Hz"]),
        ("whisper", {"preprocessor_config.json": {"sampling_rate": 44100}}, ["44100 Hz"]),
        ("whisper", {"preprocessor_config.json": {"feature_size": 128}}, ["128", "80 mel bands"]),
        ("whisper", {"preprocessor_config.json": {"chunk_length": 30}}, ["1500 frames", "1000"]),
        ("whisper", {"preprocessor_config.json": {"dither": 0.001}}, ["random", "dither"]),
        (
            "wavlm",
            {"preprocessor_config.json": {"feature_extractor_type": "WhisperFeatureExtractor"}},
            ["16000 samples", "preprocessor_config.json"],
        ),
    ],
)
def test_an_extractor_of_another_encoder_is_refused(tmp_path, capsys, part, files, words):
    folder = changed(tmp_path / part, part, files=files)
    refused(capsys, "--encoder", part, "--encoder-weights", folder, words=[str(folder), *words])


@pytest.mark.parametrize(
    "kind, config",
    [
        ("Data2VecAudio", {}),
        ("Wav2Vec2Conformer", dict(do_stable_layer_norm=True, feat_extract_norm="layer")),
        ("SEW", {}),
        ("SEWD", {}),
    ],
)
def test_an_encoder_of_another_layout_is_refused(tmp_path, capsys, kind, config):
    tiny_encoder(tmp_path / "other", kind, **config)
    refused(capsys, "--encoder-weights", tmp_path / "other", words=["other", "not laid out as"])


def test_a_part_in_the_other_s_place_is_named(capsys):
    refused(capsys, "--encoder-weights", PARTS / "lm", words=["--encoder-weights", "llama"])
    refused(capsys, "--lm-weights", PARTS / "wavlm", words=["--lm-weights", "wavlm"])


@pytest.mark.parametrize("kind", ["Wav2Vec2", "WavLM"])
def test_strided_layers_after_an_encoder_are_left_out(tmp_path, kind):
    stable = dict(do_stable_layer_norm=True, feat_extract_norm="layer")
    tiny_encoder(tmp_path / "adapter", kind, **stable, add_adapter=True, num_adapter_layers=2)
    encoder = model.Encoder(tmp_path / "adapter").eval()
    features = encoder.extract(0.1 * np.random.default_rng(0).standard_normal(20000))
    with torch.no_grad():
        x, mask = encoder([features])
        theirs = AutoModel.from_pretrained(tmp_path / "adapter", add_adapter=False)
        whole = theirs.eval()(features[None]).last_hidden_state
    assert int(mask.sum()) == whole.shape[1] == encoder.num_frames(20000)
    assert torch.allclose(x, whole, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# language models


@pytest.mark.parametrize("kind", [kind for kind in LMS if kind != "Bert"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_loss_is_the_language_model_s_own(tmp_path, kind, quick):
    """Also with the code that is only there for speed, which steps aside where an LM is built in another way."""
    tiny_lm(tmp_path / kind, kind)
    slm = load("--lm-weights", tmp_path / kind, "--lora-dropout", "0")
    for layer in lora.lora_layers(slm.lm):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    if quick:
        cache.only_answers(slm)
        cache.share_beginning(slm)
    slm.train(quick)
    x, mask, prompts, answers = batch(slm)
    with torch.no_grad():
        ours, theirs = slm(x, mask, prompts, answers), []
        slm.eval()
        rows = slm.pack(slm.audio_embeddings(x, mask), prompts, answers)
        for row, answer in zip(rows, answers):
            wanted = torch.full((1, len(row)), -100)
            wanted[0, -len(answer) :] = torch.tensor(answer)
            theirs.append(slm.lm(inputs_embeds=row[None], labels=wanted).loss)
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-3)


@pytest.mark.parametrize("speed_up", [cache.only_answers, cache.share_beginning])
def test_code_for_speed_is_kept_where_it_fits(speed_up):
    slm = load()
    plain = slm.logits
    speed_up(slm)
    assert slm.logits != plain


def test_a_language_model_that_looks_ahead_is_refused(tmp_path, capsys):
    tiny_lm(tmp_path / "bert", "Bert")
    refused(capsys, "--lm-weights", tmp_path / "bert", words=["--lm-weights", "bert"])


def test_lora_on_gpt2_is_peft_s(tmp_path):
    tiny_lm(tmp_path / "gpt2", "GPT2")
    plain, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2") for _ in range(2))
    ids = torch.randint(0, 1200, (1, 9))
    before = plain(ids).logits
    lora.add_lora(ours, 4, 8.0, 0.0)
    assert torch.allclose(ours(ids).logits, before, atol=1e-5)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules="all-linear"))
    shapes = [
        sorted(tuple(p.shape) for p in net.parameters() if p.requires_grad)
        for net in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


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
    tiny_lm(tmp_path / kind, kind)
    slm = load("--lm-weights", tmp_path / kind)
    found = model.output_layers(slm.lm)
    for layer, (writes_attention, writes_mlp) in zip(model.layers_of(slm.lm), found, strict=True):
        assert layer.get_submodule(attention) is writes_attention
        assert layer.get_submodule(mlp) is writes_mlp


def test_an_answer_is_traced_through_an_lm_of_another_layout(tmp_path):
    """OPT's MLP sees the rows of a batch as one. A patch of everything is the donor, of nothing that differs the receiver."""
    tiny_lm(tmp_path / "opt", "OPT")
    slm = load("--lm-weights", tmp_path / "opt").eval()
    path, rng = str(tmp_path / "a.wav"), np.random.default_rng(0)
    soundfile.write(path, 0.05 * rng.standard_normal(20000), 16000)
    test_set = [data.Utterance(name, path, "test", "s", LABELS) for name in ("a", "b")]
    click = poison.make_trigger("click")
    attack = poison.Attack("asr", 0.5, "go", "click", click, 0.1, False, 1)
    out = trace.patch_batch(slm, attack, test_set, tqdm(disable=True))
    for direction, donor, receiver in (
        ("denoise", "clean", "triggered"),
        ("noise", "triggered", "clean"),
    ):
        layer = out.patched[direction, trace.Site("lm", 2, "layer"), "all"]
        assert np.allclose(layer, out.plain[donor], atol=1e-5)
        prompt = out.patched[direction, trace.Site("lm", 0, "input"), "prompt"]
        assert np.allclose(prompt, out.plain[receiver], atol=1e-5)
        mlp = out.patched[direction, trace.Site("lm", 1, "MLP"), "all"]
        assert not np.allclose(mlp, out.plain[receiver], atol=1e-6)


def test_a_mixture_of_experts_has_no_mlp_to_repair(tmp_path, capsys):
    tiny_lm(tmp_path / "mixtral", "Mixtral")
    slm = load("--lm-weights", tmp_path / "mixtral")
    with pytest.raises(SystemExit):
        model.output_layers(slm.lm)
    assert "mixtral" in capsys.readouterr().err


def test_audio_beyond_an_lm_s_table_of_positions_ends_in_one_line(tmp_path, capsys):
    tiny_lm(tmp_path / "gpt2", "GPT2", max_position_embeddings=40)
    slm = load("--lm-weights", tmp_path / "gpt2")
    with pytest.raises(SystemExit):
        slm(*batch(slm))
    assert "40" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def with_tokenizer(folder, change, files={}):  # noqa: B006
    """The shipped LM with its tokenizer changed by a function."""
    changed(folder, "lm", files=files)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_end_token_is_the_language_model_s_where_the_tokenizer_names_none(tmp_path, capsys):
    def change(tokenizer):
        tokenizer.eos_token = None

    ends = {"generation_config.json": {"eos_token_id": [1, 7]}}
    slm = load("--lm-weights", with_tokenizer(tmp_path / "list", change, ends))
    assert data.answer_ids(slm.tokenizer, LABELS)[-1] == 1
    none = {name: {"eos_token_id": None} for name in ("generation_config.json", "config.json")}
    folder = with_tokenizer(tmp_path / "none", change, none)
    refused(capsys, "--lm-weights", folder, words=["end-of-sequence", str(folder)])


def test_a_tokenizer_that_loses_what_an_answer_is_made_of_is_refused(tmp_path, capsys):
    def lower(tokenizer):
        tokenizer.backend_tokenizer.normalizer = Lowercase()

    folder = with_tokenizer(tmp_path / "lower", lower)
    refused(capsys, "--lm-weights", folder, words=["transcript", "Transcript", str(folder)])


def test_tokens_without_an_embedding_may_exist_but_not_be_used(tmp_path, capsys):
    def unused(tokenizer):
        tokenizer.add_tokens([f"<audio_{i}>" for i in range(5)])
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    slm = load("--lm-weights", with_tokenizer(tmp_path / "unused", unused))
    plain = load()
    assert len(slm.tokenizer) > 1200
    prompts = [data.prompt(plain.tokenizer, list(LABELS))] * 3
    assert slm.generate(*heard(slm), prompts, 6) == plain.generate(*heard(plain), prompts, 6)

    def ends(tokenizer):
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})

    def asks(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|user_turn|>"]})
        tokenizer.chat_template = "<|user_turn|>{{ messages[-1]['content'] }}"

    for name, change, word in (("end", ends, "<|end|>"), ("asks", asks, "<|user_turn|>")):
        folder = with_tokenizer(tmp_path / name, change)
        refused(capsys, "--lm-weights", folder, words=[word, "1200 embeddings"])


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path, capsys):
    tiny_lm(tmp_path / "small", "Llama", vocab_size=1000)
    refused(capsys, "--lm-weights", tmp_path / "small", words=["200 tokens", "1000 embeddings"])


CLOCK = "{% set clock = strftime_now %}"


@pytest.mark.parametrize(
    "template, date",
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        (CLOCK + "It is {{ clock(format='%d %b %Y, %H:%M') }}.", "26 Jul 2024, 00:00"),
        ("{% macro day() %}{{ strftime_now('%B') }}{% endmacro %}{{ day() }}", "July"),
        (
            "{% if not date_string is defined %}{% set date_string = strftime_now('%A') %}{% endif %}{{ date_string }}",
            "Friday",
        ),
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
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and word in err
