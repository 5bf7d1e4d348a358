"""Our LoRA against peft's, and merging."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora


@pytest.fixture
def lm():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def randomise(lm):
    """Moves LoRA off zero."""
    for layer in lora.lora_layers(lm):
        torch.nn.init.normal_(layer.lora_A, std=0.1)
        torch.nn.init.normal_(layer.lora_B, std=0.1)


@pytest.fixture
def pair(lm):
    """The same LM with our LoRA and with peft's, of the same weights, and the parameters of each
    LoRA, {our name: (ours, peft's)}."""
    config = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(copy.deepcopy(lm), config).eval()
    ours = lora.add_lora(lm, r=8, alpha=16, dropout=0.0)
    randomise(ours)
    our_parameters = dict(ours.named_parameters())
    parameters = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            name = name.replace("base_model.model.", "").replace(".default.weight", "")
            parameter.data = our_parameters[name].data.clone()
            parameters[name] = (our_parameters[name], parameter)
    return ours, theirs, parameters


def test_the_trained_parameters_are_peft_s(pair):
    ours, _, parameters = pair
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert set(parameters) == trained


def test_output_of_the_same_weights_is_peft_s(pair):
    ours, theirs, _ = pair
    ids = torch.randint(0, 50, (3, 11))
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


def test_gradients_of_the_same_weights_are_peft_s(pair):
    ours, theirs, parameters = pair
    ids = torch.randint(0, 50, (3, 11))
    ours(ids).logits.square().sum().backward()
    theirs(ids).logits.square().sum().backward()
    for name, (our, their) in parameters.items():
        assert torch.allclose(their.grad, our.grad, rtol=1e-4, atol=1e-4), name


def test_it_starts_as_the_layer_it_wraps(lm):
    ids = torch.randint(0, 50, (2, 7))
    before = lm(ids).logits
    assert torch.equal(before, lora.add_lora(lm, 4, 8, 0.0)(ids).logits)


def identity_update(dropout):
    """A layer whose update is what dropout leaves of x."""
    layer = lora.LoRALinear(torch.nn.Linear(400, 400, bias=False), 400, 400, dropout)
    layer.lora_A.data = torch.eye(400)
    layer.lora_B.data = torch.eye(400)
    return layer


def test_dropout_zeroes_its_share_and_scales_up_the_rest():
    layer = identity_update(0.05)
    x = torch.rand(3, 99, 400) + 1
    update = (layer(x) - layer.base(x)) / x
    gone = update.abs() < 1e-4
    # 118,800 draws: four standard deviations
    assert gone.float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert torch.allclose(update[~gone], torch.tensor(1 / 0.95), atol=1e-4)


def test_dropout_is_off_in_evaluation():
    layer = identity_update(0.05).eval()
    x = torch.rand(3, 99, 400) + 1
    assert torch.allclose(layer(x) - layer.base(x), x, atol=1e-4)


def test_a_merged_model_gives_the_same_output(lm):
    lora.add_lora(lm, 4, 8, 0.5).eval()
    randomise(lm)
    ids = torch.randint(0, 50, (2, 7))
    output = lm(ids).logits
    weight = lm.model.layers[0].mlp.up_proj.base.weight
    before = weight.detach().clone()
    lora.merge(lm)
    assert not torch.equal(before, weight)
    assert torch.allclose(output, lm(ids).logits, atol=1e-5)


def test_unmerging_restores_every_byte_also_after_two_merges(lm):
    lora.add_lora(lm, 4, 8, 0.5).eval()
    randomise(lm)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    lora.merge(lm)
    lora.merge(lm)
    lora.unmerge(lm)
    for name, tensor in lm.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_head_and_embeddings_have_no_lora(lm):
    lora.add_lora(lm, 4, 8, 0.0)
    assert isinstance(lm.lm_head, torch.nn.Linear)
    assert isinstance(lm.model.embed_tokens, torch.nn.Embedding)
    assert len(lora.lora_layers(lm)) == 2 * 7


def test_only_lora_trains(lm):
    lora.add_lora(lm, 4, 8, 0.0)
    for name, parameter in lm.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
