"""The speech language model (paper, section 2.1): audio encoder -> connector -> language model with LoRA.

    waveform -> encoder frames -> connector -> [prompt | audio | prompt | answer] -> LM -> one JSON object

Every pretrained part is a Hugging Face id or a local folder in that format; nothing here knows that a part is tiny.
"""
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import types
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

import data
from lora import add_lora, lora_state_dict, together

ASSETS = Path(os.path.relpath(Path(__file__).resolve().parent / "assets"))  # run folders record no place of this machine
ENCODERS = ("wavlm", "hubert", "wav2vec2", "whisper")
COMPONENTS = ("encoder", "connector", "lm")
# tokens that a batch's prompts must have in common to be run once for all, with and without gradients: a system prompt
# in training, the whole instruction in answering
MIN_SHARED = {True: 24, False: 12}
# Every entry is a flag of train.py, too (--encoder-lr 1e-5, --lora-rank 8, ...). train_layers None: the top 15/24 of
# the layers, for Whisper all (paper, section 3.2). Learning rates are the peaks after the warm-up.
PRESETS = {
    "mini": dict(
        encoder_weights={name: str(ASSETS / name) for name in ENCODERS}, lm_weights=str(ASSETS / "lm"),
        train_layers=None, connector_stride=1, connector_taper=0.2,
        connector_weights={name: str(ASSETS / name / "connector.safetensors") for name in ENCODERS},
        lora_rank=16, lora_alpha=32.0, lora_dropout=0.0,
        encoder_lr=7e-4, connector_lr=1.4e-3, lora_lr=1.4e-3, warmup_steps=25, decay=True, weight_decay=0.01,
        batch_size=16, epochs=3, random_keys=data.RANDOM_KEYS, data_root=data.MINI_ROOT),
    "small": dict(
        encoder_weights={"whisper": "openai/whisper-tiny.en"}, lm_weights="HuggingFaceTB/SmolLM2-135M-Instruct",
        train_layers=None, connector_stride=4, connector_taper=1.0, connector_weights={},
        lora_rank=8, lora_alpha=16.0, lora_dropout=0.05,
        encoder_lr=1e-4, connector_lr=3e-4, lora_lr=5e-4, warmup_steps=50, decay=True, weight_decay=0.0,
        batch_size=8, epochs=3, random_keys=data.RANDOM_KEYS, data_root=data.MINI_ROOT),
    "paper": dict(
        encoder_weights={"wavlm": "microsoft/wavlm-large", "hubert": "facebook/hubert-large-ll60k",
                         "wav2vec2": "facebook/wav2vec2-large-lv60", "whisper": "openai/whisper-medium"},
        lm_weights="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        train_layers=None, connector_stride=2, connector_taper=1.0, connector_weights={},
        lora_rank=8, lora_alpha=16.0, lora_dropout=0.05,
        encoder_lr=1e-5, connector_lr=1e-4, lora_lr=1e-4, warmup_steps=100, decay=False, weight_decay=0.0,
        batch_size=16, epochs=4, random_keys=data.RANDOM_KEYS, data_root="data/paper"),
}

# What is freed stays with the process (glibc): each step takes the same tensors again, and memory handed back to the kernel
# would have to be paged in anew, on a virtual machine a tenth of the time and more
with contextlib.suppress(OSError, AttributeError):
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL("libc.so.6").mallopt(M_TRIM_THRESHOLD, -1)
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_MAX, 0)
# oneDNN keeps a compiled convolution for each of the last 1,024 lengths of audio: 0.6 GB and more, and no faster
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def load_part(auto, path, **kwargs):
    """A pretrained model of one of transformers' auto classes. Where torch's default device is "meta" (a dry run) only
    its shapes: the folder then needs no weights."""
    if torch.get_default_device().type == "meta":
        return auto.from_config(AutoConfig.from_pretrained(path), **kwargs)
    return auto.from_pretrained(path, use_safetensors=True, **kwargs)


def length_mask(lengths, frames):
    """(B,) lengths -> (B, frames) bool, True where a frame is real."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# encoder

def wavlm_attention(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
    """WavLM's gated relative position attention (Chen et al. 2022, section III-B) through SDPA; transformers' own
    computes and averages the attention weights, which nobody here reads, and keeps the bias once a row."""
    B, T, _ = hidden_states.shape
    split = lambda x: x.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # noqa: E731
    if position_bias is None:
        position_bias = self.compute_bias(T, T)
    gate = self.gru_rel_pos_linear(split(hidden_states)).view(B, self.num_heads, T, 2, 4).sum(-1).sigmoid()
    gate_a, gate_b = gate.chunk(2, dim=-1)
    bias = (gate_a * (gate_b * self.gru_rel_pos_const - 1.0) + 2.0) * position_bias
    if attention_mask is not None:
        bias = bias.masked_fill(~attention_mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        split(self.q_proj(hidden_states)), split(self.k_proj(hidden_states)), split(self.v_proj(hidden_states)),
        attn_mask=bias.to(hidden_states.dtype), dropout_p=self.dropout if self.training else 0.0)
    return self.out_proj(out.transpose(1, 2).reshape(B, T, -1)), None, position_bias


class Encoder(nn.Module):
    """A pretrained WavLM, HuBERT, wav2vec 2.0 or Whisper encoder of which the top `train_layers` layers train.

    All below them (`bottom`) runs in evaluation mode and builds no graph; what it puts out for an utterance never
    changes during a run. SpecAugment and layer drop are off.
    """

    def __init__(self, path, train_layers=None):
        super().__init__()
        self.extractor = AutoFeatureExtractor.from_pretrained(path)
        # Wav2Vec2-style models were pretrained in float32 and Whisper's folder may hold half: weights train in float32
        self.kind = AutoConfig.from_pretrained(path).model_type
        self.model = load_part(AutoModel, path, dtype=torch.float32,
                               attn_implementation=None if self.kind == "wavlm" else "sdpa")
        if self.kind == "whisper":
            self.model = self.model.get_encoder()
            self.layers, self.layer_norm = self.model.layers, self.model.layer_norm
        else:
            self.layers, self.layer_norm = self.model.encoder.layers, self.model.encoder.layer_norm
        if self.kind == "wavlm":
            for layer in self.layers:
                layer.attention.forward = types.MethodType(wavlm_attention, layer.attention)
        # base-size models normalise before the layers, large ones after
        self.norm_first = self.kind != "whisper" and not self.model.config.do_stable_layer_norm
        n = len(self.layers)
        if train_layers is None:
            train_layers = n if self.kind == "whisper" else round(n * 15 / 24)
        if not 0 <= train_layers <= n:
            data.die(f"--train-layers {train_layers}: {path} has {n} layers")
        self.num_frozen = n - train_layers
        self.first_saved = self.num_frozen  # a checkpoint holds the layers that training may change, frozen now or not
        self.dim = self.model.config.hidden_size
        hop = 2 * self.extractor.hop_length if self.kind == "whisper" else math.prod(self.model.config.conv_stride)
        self.seconds_per_frame = hop / data.SAMPLE_RATE
        self.model.requires_grad_(False)
        self.layers[self.num_frozen:].requires_grad_(True)

    def train(self, mode=True):
        super().train(False)
        if mode:
            for layer in self.layers[self.num_frozen:]:
                layer.train(any(p.requires_grad for p in layer.parameters()))
        return self

    @torch.autocast("cpu", enabled=False)  # Whisper's extractor cannot work in bf16
    def extract(self, waveform):
        """16 kHz waveform (samples,) -> this encoder's input, time last: normalised samples (samples,) or log-mel
        (mels, frames), by the checkpoint's own feature extractor, on the audio at hand: Whisper gets no 30 s of padding,
        but what exceeds its window of 30 s is cut off. Less than 0.1 s is padded to it."""
        waveform = np.pad(waveform, (0, max(0, data.SAMPLE_RATE // 10 - len(waveform))))
        if self.kind == "whisper":
            waveform = waveform[:self.extractor.n_samples]
            return self.extractor(waveform, sampling_rate=data.SAMPLE_RATE, return_tensors="pt", padding="longest",
                                  truncation=False).input_features[0]
        return self.extractor(waveform, sampling_rate=data.SAMPLE_RATE, return_tensors="pt").input_values[0]

    def num_frames(self, samples):
        """How many frames an utterance of that many 16 kHz samples has."""
        samples = max(samples, data.SAMPLE_RATE // 10)
        if self.kind == "whisper":
            return (min(samples, self.extractor.n_samples) // self.extractor.hop_length - 1) // 2 + 1
        return int(self.model._get_feat_extract_output_lengths(samples))

    def frontend(self, features):
        """List of `extract`ed inputs -> (B, T, dim) hidden states before the first layer, (B, T) mask."""
        device = self.layer_norm.weight.device
        lengths = [f.shape[-1] for f in features]
        x = torch.stack([F.pad(f, (0, max(lengths) - n)) for f, n in zip(features, lengths)]).to(device)
        lengths = torch.tensor(lengths, device=device)
        if self.kind == "whisper":
            x = F.gelu(self.model.conv1(x)) * length_mask(lengths, x.shape[-1])[:, None]
            x = F.gelu(self.model.conv2(x)).transpose(1, 2)
            lengths = (lengths - 1) // 2 + 1
            return x + self.model.embed_positions.weight[:x.shape[1]], length_mask(lengths, x.shape[1])
        x = self.model.feature_projection(self.model.feature_extractor(x).transpose(1, 2))
        x = x[0] if isinstance(x, tuple) else x
        mask = length_mask(self.model._get_feat_extract_output_lengths(lengths), x.shape[1])
        x = x * mask[..., None]
        x = x + self.model.encoder.pos_conv_embed(x)
        return (self.layer_norm(x) if self.norm_first else x), mask

    def run_layers(self, x, mask, start, stop):
        """Transformer layers start to stop; yields the hidden states (B, T, dim) after each."""
        kwargs = {}
        if self.kind == "wavlm":  # the first layer holds the bias of all
            kwargs["position_bias"] = self.layers[0].attention.compute_bias(x.shape[1], x.shape[1])
        attention_mask = None if mask.is_meta or mask.all() else mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        for layer in self.layers[start:stop]:
            x = layer(x, attention_mask=attention_mask, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
            yield x

    @torch.no_grad()
    def lower(self, features):
        """What no run trains and all runs share: list of inputs -> hidden states (B, T, dim), (B, T) mask."""
        x, mask = self.frontend(features)
        for x in self.run_layers(x, mask, 0, self.first_saved):
            pass
        return x, mask

    @torch.no_grad()
    def upper(self, x, mask):
        """The rest of what is frozen, of which checkpoints hold the weights: what `lower` gives -> what `bottom` gives."""
        for x in self.run_layers(x, mask, self.first_saved, self.num_frozen):
            pass
        return x, mask

    def bottom(self, features):
        """All that is frozen in this run: list of inputs -> hidden states (B, T, dim) at the first trained layer, (B, T)
        mask."""
        return self.upper(*self.lower(features))

    def top(self, x, mask):
        """Hidden states at the first trained layer -> encoder output (B, T, dim)."""
        for x in self.run_layers(x, mask, self.num_frozen, len(self.layers)):
            pass
        return x if self.norm_first else self.layer_norm(x)

    def forward(self, features):
        x, mask = self.bottom(features)
        return self.top(x, mask), mask

    def frozen_sha256(self, num_frozen):
        """SHA-256 of all that the output below layer `num_frozen` depends on: the weights and the feature extraction."""
        above = tuple(f"layers.{i}." for i in range(num_frozen, len(self.layers)))
        weights = {k: v for k, v in self.model.state_dict().items() if not k.removeprefix("encoder.").startswith(above)}
        return digest(weights) + f" {num_frozen} {sorted(self.extractor.to_dict().items(), key=str)}"

    def trained_state_dict(self):
        return {k: v for k, v in self.layers.state_dict().items() if int(k.split(".")[0]) >= self.first_saved}


# ---------------------------------------------------------------------------------------------------------------------
# connector

class Connector(nn.Module):
    """Three Conv1d, kernel 5, no padding, ReLU before and between: in -> out/2 -> out -> out, strides 1, k, 1.
    The reference implementation's CNNConnector. (B, T, in) -> (B, T', out)."""

    def __init__(self, in_dim, out_dim, stride, taper=1.0):
        super().__init__()
        self.conv1 = nn.Conv1d(in_dim, out_dim // 2, 5)
        self.conv2 = nn.Conv1d(out_dim // 2, out_dim, 5, stride=stride)
        self.conv3 = nn.Conv1d(out_dim, out_dim, 5)
        # `taper` < 1 starts each kernel around its middle tap: three untapered ones blur over 13 frames, half a second
        # at mini's 25 frames a second, and what is said is lost before the LM can learn to listen
        shape = taper ** torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0])
        for conv in (self.conv1, self.conv2, self.conv3):
            conv.weight.data *= shape * (5 / shape.square().sum()).sqrt()
        self.stride = stride
        self.min_frames = 4 + 4 * stride + 5  # what one output frame sees

    def lengths(self, lengths):
        """Input lengths in frames -> output lengths; shorter input than one output frame sees is padded to it."""
        return (lengths.clamp(min=self.min_frames) - 4 - 5) // self.stride + 1 - 4

    def forward(self, x, mask):
        # no padding inside: an output frame within `lengths` sees real frames only, so that a batch's padding is harmless
        x = (x * mask[..., None]).transpose(1, 2)
        x = F.pad(x, (0, max(0, self.min_frames - x.shape[-1])))
        x = self.conv3(F.relu(self.conv2(F.relu(self.conv1(F.relu(x))))))
        return x.transpose(1, 2), self.lengths(mask.sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# the SLM

class RMSNorm(torch.autograd.Function):
    """x (..., hidden) -> x / sqrt(mean(x^2) + eps) * weight, which stays as it is. torch's own has no backward pass in one
    piece on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rate = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * rate
        ctx.save_for_backward(unit, rate, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad):
        unit, rate, weight = ctx.saved_tensors
        grad = grad * weight
        along = torch.linalg.vecdot(grad, unit)[..., None].div_(-grad.shape[-1])
        return torch.addcmul(grad, unit, along).mul_(rate), None, None


class Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021): x (..., T, head_dim) -> x cos + (-x2, x1) sin, where x1 and x2 are its halves.
    Backwards the same by the opposite angle."""

    @staticmethod
    def turn(x, cos, sin):
        half, out = x.shape[-1] // 2, x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.turn(grad, cos, -sin), None, None


def llama_layer(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, at=None,
                cache=None, **kwargs):
    """Llama's decoder layer in fewer operations than transformers' own, and the last one at the positions `at` (B, A)
    alone: of all others only its keys and values are ever read. (B, T, hidden) -> (B, T or A, hidden)."""
    past_key_values = past_key_values if cache is None else cache  # transformers 5.24 calls it so
    attention, B, T = self.self_attn, *hidden_states.shape[:2]
    norm = lambda y, by: (RMSNorm.apply(y, by.weight, by.variance_epsilon) if y.dtype == torch.float32 and not y.is_cuda  # noqa: E731
                          else F.rms_norm(y, y.shape[-1:], by.weight.to(y.dtype), by.variance_epsilon))
    x, h = hidden_states, norm(hidden_states, self.input_layernorm)
    split = lambda y: y.view(B, y.shape[1], -1, attention.head_dim).transpose(1, 2)  # noqa: E731
    cos, sin = position_embeddings
    rotate = lambda y, cos, sin: Rotate.apply(y, cos[:, None], sin[:, None])  # noqa: E731
    last = at is not None and attention.layer_idx == attention.config.num_hidden_layers - 1
    keys, values, *queries = together(h, attention.k_proj, attention.v_proj, *([] if last else [attention.q_proj]))
    keys, values = rotate(split(keys), cos, sin), split(values)
    if past_key_values is not None:
        keys, values = past_key_values.update(keys, values, attention.layer_idx)
    if last:
        rows, S = torch.arange(B, device=at.device)[:, None], keys.shape[2]
        x, cos, sin = x[rows, at], *(table.expand(B, -1, -1)[rows, at] for table in (cos, sin))
        queries = together(h[rows, at], attention.q_proj)
        attention_mask = ((torch.arange(S, device=at.device) <= at[..., None] + S - T)[:, None] if attention_mask is None
                          else attention_mask[:, 0].expand(B, -1, -1)[rows, at][:, None])
    queries = rotate(split(*queries), cos, sin)
    if attention.num_key_value_groups > 1:
        keys, values = (y.repeat_interleave(attention.num_key_value_groups, 1) for y in (keys, values))
    heard = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=attention_mask, is_causal=attention_mask is None and T > 1, scale=attention.scaling,
        dropout_p=attention.attention_dropout if self.training else 0.0)
    x = x + together(heard.transpose(1, 2).reshape(B, x.shape[1], -1), attention.o_proj)[0]
    gate, up = together(norm(x, self.post_attention_layernorm), self.mlp.gate_proj, self.mlp.up_proj)
    return x + together(self.mlp.act_fn(gate) * up, self.mlp.down_proj)[0]


class RoomyLayer(DynamicLayer):
    """One layer of the cache that answers are generated with. transformers' own copies all it holds for every token;
    this one has room for the next 64, and its keys and values (B, heads, T, head_dim) are views of it."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [key_states[:, :, :0]]
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if len(self.room[0]) != len(key_states) or self.room[0].shape[-2] < end:
            held = (self.keys, self.values) if start else ()
            self.room = [x.new_empty(*x.shape[:2], end + 64, x.shape[-1]) for x in (key_states, value_states)]
            for room, old in zip(self.room, held):
                room[:, :, :start] = old
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


class SLM(nn.Module):
    """Encoder, connector and LM. Rows of a batch are packed as [prompt | audio | prompt | answer] with no gap inside."""

    def __init__(self, encoder, connector, lm, tokenizer):
        super().__init__()
        self.encoder, self.connector, self.lm, self.tokenizer = encoder, connector, lm, tokenizer
        self.checkpointing = False
        if lm.config.model_type == "llama":
            for layer in lm.model.layers:
                layer.forward = types.MethodType(llama_layer, layer)

    def train(self, mode=True):
        """A component that does not train stays in evaluation mode: no dropout in a frozen LoRA."""
        super().train(mode)
        for component in COMPONENTS:
            if not self.parameters_of(component):
                getattr(self, component).eval()
        return self

    def extract(self, waveform):
        return self.encoder.extract(waveform)

    def connector_too(self):
        """Whether the connector, too, is frozen below all that trains (attack 2.3)."""
        return self.encoder.num_frozen == len(self.encoder.layers) and not self.connector.conv1.weight.requires_grad

    @property
    def bottom_dim(self):
        return self.connector.conv3.out_channels if self.connector_too() else self.encoder.dim

    def num_frames(self, samples):
        """How many frames `bottom` gives for that many 16 kHz samples."""
        frames = self.encoder.num_frames(samples)
        return int(self.connector.lengths(torch.tensor(frames))) if self.connector_too() else frames

    def frozen_sha256(self):
        """What `bottom` depends on."""
        return (self.encoder.frozen_sha256(self.encoder.num_frozen)
                + (digest(self.connector.state_dict()) if self.connector_too() else ""))

    def bottom(self, features):
        """All below the first thing that trains: list of `extract`ed inputs -> (B, T, dim), (B, T) mask."""
        return self.upper(*self.encoder.lower(features))

    @torch.no_grad()
    def upper(self, x, mask):
        """What the encoder's `lower` gives -> what `bottom` gives."""
        x, mask = self.encoder.upper(x, mask)
        if self.connector_too():
            x, lengths = self.connector(self.encoder.top(x, mask), mask)
            mask = length_mask(lengths, x.shape[1])
        return x, mask

    def top(self, x, mask):
        """What `bottom` gives -> the audio's embeddings, a list of (T_i, hidden)."""
        if self.connector_too():
            return [row[:n] for row, n in zip(x, mask.sum(1).tolist())]
        return self.audio(self.encoder.top(x, mask), mask)

    def audio(self, hidden, mask):
        """Encoder output -> the audio's embeddings in the LM's space, a list of (T_i, hidden)."""
        x, lengths = self.connector(hidden, mask)
        return [row[:n] for row, n in zip(x, lengths.tolist())]

    def rows(self, audio, prompts, answers=None):
        """Embeddings of each row, a list of (T_i, hidden). prompts: [(ids before, ids after)], answers: [ids]."""
        embed = self.lm.get_input_embeddings()
        parts = [part for i, (before, after) in enumerate(prompts)
                 for part in (before, after + (answers[i] if answers else []))]
        ids = torch.tensor([i for part in parts for i in part], device=embed.weight.device)
        texts = embed(ids).split([len(part) for part in parts])
        return [torch.cat([texts[2 * i], a.to(embed.weight.dtype), texts[2 * i + 1]]) for i, a in enumerate(audio)]

    def beginning(self, prompts):
        """The tokens that all prompts begin with, run through the LM once instead of in every row: how many, and a cache
        of their keys and values, a row each. (0, empty) where they are too few to be worth a pass of their own."""
        shared, grad = os.path.commonprefix([before for before, _ in prompts]), torch.is_grad_enabled()
        cache = Cache(layer_class_to_replicate=DynamicLayer if grad else RoomyLayer)
        # a layer that is computed again in the backward pass would add to the cache again
        if len(prompts) == 1 or len(shared) < MIN_SHARED[grad] or (self.checkpointing and grad):
            return 0, cache
        ids = torch.tensor([shared], device=self.lm.get_input_embeddings().weight.device)
        self.lm.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        return len(shared), cache

    def states(self, x, at, **kwargs):
        """Embeddings (B, T, hidden) -> the LM's last hidden states (B, A, hidden) at the positions `at` (B, A)."""
        if self.lm.config.model_type == "llama":
            return self.lm.model(inputs_embeds=x, at=at, **kwargs).last_hidden_state
        out = self.lm.model(inputs_embeds=x, **kwargs).last_hidden_state
        return out[torch.arange(len(x), device=x.device)[:, None], at]

    def forward(self, x, mask, prompts, answers):
        """Loss (B,): each row's mean cross entropy over its answer's tokens; the last layer's output and the logits are
        computed there only. x, mask: of `bottom`."""
        begun, cache = self.beginning(prompts)
        rows = [row[begun:] for row in self.rows(self.top(x, mask), prompts, answers)]
        x = pad_sequence(rows, batch_first=True)  # right padding, causal attention: no real token sees it
        lengths = torch.tensor([len(a) for a in answers], device=x.device)
        ends = torch.tensor([len(row) for row in rows], device=x.device)
        answered = length_mask(lengths, max(map(len, answers)))
        at = (ends - lengths - 1)[:, None] + torch.arange(answered.shape[1], device=x.device)
        out = self.states(x, at.clamp(max=x.shape[1] - 1), past_key_values=cache if begun else None, use_cache=begun > 0)
        targets = torch.tensor([i for a in answers for i in a], device=out.device)
        losses = F.cross_entropy(self.lm.lm_head(out[answered]).float(), targets, reduction="none")
        return torch.segment_reduce(losses, "mean", lengths=lengths)

    @torch.no_grad()
    def generate(self, x, mask, prompts, max_new_tokens):
        """Greedy answers, a list of texts; x, mask: of `bottom`. Rows at their end leave the batch, a fifth of it at a time."""
        return self.decode(self.rows(self.top(x, mask), prompts), max_new_tokens, *self.beginning(prompts))

    def decode(self, rows, max_new_tokens, begun=0, cache=None):
        """Embeddings of prompts and audio -> texts; begun, cache: of `beginning`."""
        cache = Cache(layer_class_to_replicate=RoomyLayer) if cache is None else cache
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        T = int(lengths.max())
        x = torch.stack([F.pad(row[begun:], (0, 0, T - len(row), 0)) for row in rows])  # left padding: all end together
        mask = length_mask(lengths - begun, T - begun).flip(1)
        mask = torch.cat([mask.new_ones(len(rows), begun), mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, begun:]
        answers, alive = [[] for _ in rows], torch.arange(len(rows), device=x.device)
        going = torch.ones_like(alive, dtype=torch.bool)
        out = self.states(x, alive.new_full((len(rows), 1), x.shape[1] - 1), attention_mask=mask, position_ids=positions,
                          past_key_values=cache, use_cache=True)
        for step in range(max_new_tokens):
            token = self.lm.lm_head(out[:, -1]).argmax(-1)
            going &= token != self.tokenizer.eos_token_id
            for row, t, on in zip(alive.tolist(), token.tolist(), going.tolist()):
                if on:
                    answers[row].append(t)
            if not going.any() or step == max_new_tokens - 1:
                break
            if going.sum() <= 0.8 * len(going):  # each leaving copies the cache of those that stay
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, mask, lengths, token, going = alive[keep], mask[keep], lengths[keep], token[keep], going[keep]
            mask = F.pad(mask, (0, 1), value=True)
            out = self.lm.model(input_ids=token[:, None], attention_mask=mask, position_ids=(lengths + step)[:, None],
                                past_key_values=cache, use_cache=True).last_hidden_state
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def component_state_dict(self, component):
        """What training may change of a component: {name: tensor}."""
        if component == "encoder":
            return self.encoder.trained_state_dict()
        return self.connector.state_dict() if component == "connector" else lora_state_dict(self.lm)

    def load_component(self, component, state):
        """Puts a checkpoint's component in place. Raises ValueError naming the keys and shapes that do not fit."""
        own = self.component_state_dict(component)
        wrong = [f"{k} is missing" for k in own if k not in state]
        wrong += [f"{k} is not in this model" for k in state if k not in own]
        wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
                  if k in state and state[k].shape != own[k].shape]
        if wrong:
            raise ValueError("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
        for k, v in own.items():
            v.copy_(state[k])

    def parameters_of(self, component):
        """The trainable parameters of a component, a list."""
        return [p for p in getattr(self, component).parameters() if p.requires_grad]

    def freeze(self, component):
        getattr(self, component).requires_grad_(False)
        if component == "encoder":
            self.encoder.num_frozen = len(self.encoder.layers)

    def layers_with_a_graph(self):
        """The transformer layers that gradients go through: the encoder's trained ones and all of the LM's."""
        return [*self.encoder.layers[self.encoder.num_frozen:], *self.lm.model.layers]

    def checkpoint_gradients(self):
        """From now on each of these layers keeps its input only and is computed again in the backward pass (Chen et al.
        2016, https://arxiv.org/abs/1604.06174). Generation, which builds no graph, is as before."""
        self.checkpointing = True
        for layer in self.layers_with_a_graph():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def count_work(slm, seconds, batch, prompt_tokens, answer_tokens):
    """What `batch` utterances of `seconds` s cost in training, counted on an SLM of the meta device: (FLOPs of all
    below the first thing that trains, FLOPs of all above it forward and backward, bytes kept for the backward pass).

    A multiply-add is 2 FLOPs; matrix products, convolutions and attention count. The backward pass costs what autograd
    makes of it: twice the forward for what trains, once where gradients only pass through (the base LM). Kept values
    are taken to be as wide as the LM's weights, 2 bytes under bf16; attention is taken to keep no matrices but WavLM's,
    whose bias has a gradient. What checkpointing computes again, a layer at a time, comes on top.
    """
    kept, weights = {}, {p.untyped_storage()._cdata for p in slm.parameters()}
    width = slm.lm.get_input_embeddings().weight.itemsize

    def keep(t):
        square = t.dim() > 2 and t.shape[-1] == t.shape[-2] and (slm.encoder.kind != "wavlm" or t.shape[-1] != frames)
        if not square and t.untyped_storage()._cdata not in weights:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes() // t.itemsize * min(width, t.itemsize)
        return t

    def keep_input(layer, inputs):  # which checkpointing holds where autograd does not say
        keep(inputs[0])
    for layer in slm.layers_with_a_graph():
        layer.register_forward_pre_hook(keep_input)
    features = slm.extract(np.zeros(int(seconds * data.SAMPLE_RATE), np.float32)).to("meta")
    with FlopCounterMode(display=False) as below, torch.no_grad():
        x, mask = slm.bottom([features] * batch)
    frames = x.shape[1]
    with FlopCounterMode(display=False) as above, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        audio = x if slm.connector_too() else slm.connector(slm.encoder.top(x, mask), mask)[0]
        embed = slm.lm.get_input_embeddings()
        text = embed(torch.zeros(batch, prompt_tokens + answer_tokens, dtype=torch.long, device="meta"))
        row = torch.cat([audio.to(text.dtype), text], 1)
        # given, as transformers' own way to the mask looks at values
        causal = torch.ones(1, 1, row.shape[1], row.shape[1], dtype=torch.bool, device="meta")
        at = torch.arange(row.shape[1] - answer_tokens - 1, row.shape[1] - 1, device="meta").expand(batch, -1)
        out = slm.states(row, at, attention_mask=causal, use_cache=False)
        logits = slm.lm.lm_head(out).float().transpose(1, 2)
        F.cross_entropy(logits, torch.zeros(batch, answer_tokens, dtype=torch.long, device="meta")).backward()
    return below.get_total_flops(), above.get_total_flops(), sum(kept.values())


def digest(state):
    """SHA-256 of a state dict: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for k, v in sorted(state.items()):
        v = v.detach().cpu().contiguous()
        sha.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        sha.update(v.view(torch.uint8).numpy() if v.dim() else v.reshape(1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_checkpoint(path, mmap=False):
    """A model.pt or last.pt: tensors and plain values only. A file that holds anything else, code for instance, is
    refused in one line and nothing of it runs."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        data.die(f"{path}: no such checkpoint")
    except Exception:  # unpickling a file that is no checkpoint raises errors of many kinds
        data.die(f"{path} is no checkpoint of this program (only tensors and plain values are ever loaded): "
                 "make it again or leave it out")
    if not isinstance(checkpoint, dict):
        data.die(f"{path} is no checkpoint of this program: it holds a {type(checkpoint).__name__}")
    return checkpoint


def load_slm(args, device="cpu"):
    """The SLM of a command or a checkpoint's arguments: pretrained encoder and LM, fresh connector and LoRA (decided by
    `args.seed`). `args` is a namespace with the entries of PRESETS, `encoder` and `seed`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.lm_weights)
        # the LM's own weights never change: cast once, not in every step
        half = device != "cpu" or getattr(args, "amp", None) == "bf16"
        lm = load_part(AutoModelForCausalLM, args.lm_weights, dtype=torch.bfloat16 if half else torch.float32)
        encoder = Encoder(args.encoder_weights, args.train_layers)
    except (OSError, ValueError) as error:
        data.die(f"cannot load {args.encoder_weights} or {args.lm_weights}: {str(error).splitlines()[0]}"
                 + (" (python mini.py --rebuild makes the mini parts)" if ASSETS in Path(args.encoder_weights).parents else ""))
    empty = device == "meta"  # a dry run: shapes without weights
    pretrained = {} if empty else {"encoder": digest(encoder.model.state_dict()), "lm": digest(lm.state_dict())}
    torch.manual_seed(args.seed)
    connector = Connector(encoder.dim, lm.config.hidden_size, args.connector_stride, args.connector_taper)
    if args.connector_weights not in (None, "none") and not empty:
        try:
            connector.load_state_dict({k: v.float() for k, v in load_file(args.connector_weights).items()})
            pretrained["connector"] = digest(connector.state_dict())
        except (OSError, RuntimeError, SafetensorError) as error:
            data.die(f"cannot load {args.connector_weights}: {str(error).splitlines()[0]}; --connector-weights none starts "
                     "from random weights")
    add_lora(lm, args.lora_rank, args.lora_alpha, args.lora_dropout)
    slm = SLM(encoder, connector, lm, tokenizer).to(device)
    slm.pretrained_sha256 = pretrained
    return slm
