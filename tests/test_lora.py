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
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def randomise(model):
    for k, p in sorted((k, p) for k, p in model.named_parameters() if "lora_" in k):
        p.data = (
            torch.randn(p.shape, generator=torch.Generator().manual_seed(len(k) + p.numel())) * 0.1
        )


def test_the_same_weights_give_peft_s_output_gradients_and_parameter_count(lm):
    theirs = peft.get_peft_model(
        copy.deepcopy(lm),
        peft.LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    ).eval()
    ours = lora.add_lora(lm, r=8, alpha=16, dropout=0.0)
    names = {
        k: k.replace("base_model.model.", "")
        .replace("lora_A.default.weight", "lora_A")
        .replace("lora_B.default.weight", "lora_B")
        for k, _ in theirs.named_parameters()
        if "lora_" in k
    }
    own = dict(ours.named_parameters())
    assert set(names.values()) == {k for k, p in own.items() if p.requires_grad}
    randomise(ours)
    for k, p in theirs.named_parameters():
        if k in names:
            p.data = own[names[k]].data.clone()
    ids = torch.randint(0, 50, (3, 11))
    a, b = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(a, b, atol=1e-5)
    a.square().sum().backward(), b.square().sum().backward()
    for k, p in theirs.named_parameters():
        if k in names:
            assert torch.allclose(p.grad, own[names[k]].grad, rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_layer_it_wraps(lm):
    ids = torch.randint(0, 50, (2, 7))
    before = lm(ids).logits
    assert torch.equal(before, lora.add_lora(lm, 4, 8, 0.0)(ids).logits)


def test_dropout_takes_its_share_of_x_from_the_update_and_scales_up_the_rest():
    layer = lora.LoRALinear(torch.nn.Linear(400, 400, bias=False), 400, 400, 0.05)
    layer.lora_A.data, layer.lora_B.data = (
        torch.eye(400),
        torch.eye(400),
    )  # the update is what is left of x
    x = torch.rand(3, 99, 400) + 1
    update = (layer(x) - layer.base(x)) / x
    gone = update.abs() < 1e-4
    assert gone.float().mean().item() == pytest.approx(
        0.05, abs=0.003
    )  # 118,800 draws: four standard deviations
    assert torch.allclose(update[~gone], torch.tensor(1 / 0.95), atol=1e-4)
    assert torch.allclose(layer.eval()(x) - layer.base(x), x, atol=1e-4)


def test_merged_gives_the_same_and_unmerged_the_same_bytes(lm):
    lora.add_lora(lm, 4, 8, 0.5).eval()
    randomise(lm)
    ids = torch.randint(0, 50, (2, 7))
    out, state = lm(ids).logits, {k: v.clone() for k, v in lm.state_dict().items()}
    lora.merge(lm)
    lora.merge(lm)
    assert not torch.equal(
        state["model.layers.0.mlp.up_proj.base.weight"], lm.model.layers[0].mlp.up_proj.base.weight
    )
    assert torch.allclose(out, lm(ids).logits, atol=1e-5)
    lora.unmerge(lm)
    assert all(torch.equal(v, lm.state_dict()[k]) for k, v in state.items())


def test_head_and_embeddings_are_left_alone(lm):
    lora.add_lora(lm, 4, 8, 0.0)
    assert isinstance(lm.lm_head, torch.nn.Linear)
    assert len(lora.lora_layers(lm)) == 2 * 7
    assert all("lora_" in k for k, p in lm.named_parameters() if p.requires_grad)
