"""The speech language model (paper, section 2.1 and Figure 1): audio encoder -> connector -> language model with LoRA.

    waveform -> features -> encoder frames -> connector -> [prompt | audio | prompt | answer] -> LM -> one JSON object

Every pretrained part is a Hugging Face id or a local folder in that format; nothing here knows that a part is tiny.
"""

import functools
import hashlib
import math
import os
import warnings
from pathlib import Path

os.environ.setdefault(
    "DISABLE_SAFETENSORS_CONVERSION", "1"
)  # a pytorch_model.bin is read as it is, nobody is asked online

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from data import SAMPLE_RATE, die
from lora import add_lora, lora_state_dict
from study import COMPONENTS, ENCODERS, ROOT

torch.backends.cudnn.allow_tf32 = (
    False  # float32 means float32 on a GPU too, as in matrix products by default
)
warnings.filterwarnings(
    "ignore", message="Support for mismatched key_padding_mask"
)  # inside transformers' WavLM


def where(path):
    """A pretrained part's id or folder; `assets/...` lies beside this file, wherever a command is started from."""
    return (
        str(ROOT / path)
        if str(path).startswith("assets/") and not Path(path).exists()
        else str(path)
    )


def load_part(auto, path, **kwargs):
    """A pretrained model of one of transformers' auto classes. Where torch's default device is "meta" (a dry run) it has shapes only,
    and the folder needs no weights."""
    if torch.get_default_device().type == "meta":
        return auto.from_config(
            AutoConfig.from_pretrained(where(path), trust_remote_code=False), **kwargs
        )
    return auto.from_pretrained(where(path), trust_remote_code=False, **kwargs)


def length_mask(lengths, frames):
    """(B,) lengths -> (B, frames) bool, True where a frame is real."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


@torch.autocast("cpu", enabled=False)  # Whisper's extractor cannot work in bf16
def extract(extractor, waveform):
    """16 kHz waveform (samples,) -> an encoder's input, time last: normalised samples (samples,) or log-mel (mels, frames), by
    the checkpoint's own feature extractor. Whisper's input is not padded to its window of 30 s, but cut off where it is longer;
    audio of less than 0.1 s is padded to 0.1 s."""
    waveform = np.pad(waveform, (0, max(0, SAMPLE_RATE // 10 - len(waveform))))
    if hasattr(extractor, "n_samples"):  # Whisper's window
        return extractor(
            waveform[: extractor.n_samples],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            padding="longest",
            truncation=False,
        ).input_features[0]
    return extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values[0]


class Encoder(nn.Module):
    """A pretrained WavLM, HuBERT, wav2vec 2.0 or Whisper encoder. The top `train_layers` of its layers train, or, where that is
    None, the top `share` of them; everything below runs in evaluation mode and builds no graph. SpecAugment and layer drop are off.
    """

    def __init__(self, path, train_layers=None, share=1.0):
        super().__init__()
        self.extractor = AutoFeatureExtractor.from_pretrained(where(path), trust_remote_code=False)
        self.extract = functools.partial(
            extract, self.extractor
        )  # pickled for worker processes, without the weights
        # published weights may be half precision: they train in float32
        net = load_part(AutoModel, path, dtype=torch.float32)
        self.whisper = net.config.model_type == "whisper"
        self.net = net.get_encoder() if self.whisper else net
        transformer = self.net if self.whisper else self.net.encoder
        self.layers, self.layer_norm = transformer.layers, transformer.layer_norm
        self.relative = hasattr(
            getattr(self.layers[0], "attention", None), "compute_bias"
        )  # WavLM's position bias
        # base-size models normalise before the layers, large ones after
        self.norm_first = not self.whisper and not net.config.do_stable_layer_norm
        # a front end that normalises over time must not see padding
        self.alone = getattr(net.config, "feat_extract_norm", None) == "group"
        n = len(self.layers)
        train_layers = round(n * share) if train_layers is None else train_layers
        if not 0 <= train_layers <= n:
            die(f"--train-layers {train_layers}: {path} has {n} layers")
        self.first_trained = n - train_layers
        self.dim = net.config.hidden_size
        self.seconds_per_frame = (
            2 * self.extractor.hop_length if self.whisper else math.prod(net.config.conv_stride)
        ) / SAMPLE_RATE
        self.requires_grad_(False)
        self.layers[self.first_trained :].requires_grad_(True)

    def train(self, mode=True):
        super().train(False)
        self.layers[self.first_trained :].train(mode)
        return self

    def num_frames(self, samples):
        """How many frames an utterance of that many 16 kHz samples has."""
        samples = max(samples, SAMPLE_RATE // 10)
        if self.whisper:
            return (
                min(samples, self.extractor.n_samples) // self.extractor.hop_length - 1
            ) // 2 + 1
        return int(self.net._get_feat_extract_output_lengths(samples))

    def front_end(self, features):
        """List of `extract`ed inputs -> hidden states before the first layer (B, T, dim), mask (B, T)."""
        features = [f.to(self.layer_norm.weight.device) for f in features]
        lengths = [f.shape[-1] for f in features]
        padded = torch.stack([F.pad(f, (0, max(lengths) - n)) for f, n in zip(features, lengths)])
        lengths = torch.tensor(lengths, device=padded.device)
        if self.whisper:
            x = F.gelu(self.net.conv1(padded)) * length_mask(lengths, padded.shape[-1])[:, None]
            x = F.gelu(self.net.conv2(x)).transpose(1, 2)
            mask = length_mask((lengths - 1) // 2 + 1, x.shape[1])
            return x + self.net.embed_positions.weight[: x.shape[1]], mask
        cnn = self.net.feature_extractor
        x = (
            pad_sequence([cnn(f[None])[0].T for f in features], True)
            if self.alone
            else cnn(padded).transpose(1, 2)
        )
        x = self.net.feature_projection(x)
        x = x[0] if isinstance(x, tuple) else x
        mask = length_mask(self.net._get_feat_extract_output_lengths(lengths), x.shape[1])
        x = x * mask[..., None]
        x = x + self.net.encoder.pos_conv_embed(x)
        return self.layer_norm(x) if self.norm_first else x, mask

    def run_layers(self, x, mask, start, stop):
        """Transformer layers start to stop; yields the hidden states (B, T, dim) after each."""
        everything = mask.is_meta or bool(mask.all())
        attention_mask = (
            None if everything else mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        )
        kwargs = {}
        if self.relative:  # the first layer holds the bias of all; WavLM takes the mask itself
            bias = self.layers[0].attention.compute_bias(x.shape[1], x.shape[1])
            kwargs["position_bias"], attention_mask = (
                bias.repeat(len(x), 1, 1),
                None if everything else mask,
            )
        for layer in self.layers[start:stop]:
            x = layer(x, attention_mask=attention_mask, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
            yield x

    @torch.no_grad()
    def pretrained_part(self, features):
        """What no run ever trains: list of inputs -> hidden states (B, T, dim) at the first trained layer, mask (B, T)."""
        x, mask = self.front_end(features)
        for x in self.run_layers(x, mask, 0, self.first_trained):
            pass
        return x, mask

    def trained_part(self, x, mask):
        """What training may change: hidden states at the first trained layer -> encoder output (B, T, dim)."""
        for x in self.run_layers(x, mask, self.first_trained, len(self.layers)):
            pass
        return x if self.norm_first else self.layer_norm(x)

    def forward(self, features):
        x, mask = self.pretrained_part(features)
        return self.trained_part(x, mask), mask


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

    def forward(self, x, mask):
        """Returns the output and its lengths (B,). Nothing is padded inside: an output frame within its length sees real
        frames only, so that a batch's padding cannot matter. Input shorter than one output frame sees is padded to it."""
        lengths = (mask.sum(1).clamp(min=self.min_frames) - 9) // self.stride - 3
        x = (x * mask[..., None]).transpose(1, 2)
        x = F.pad(x, (0, max(0, self.min_frames - x.shape[-1])))
        x = self.conv3(F.relu(self.conv2(F.relu(self.conv1(F.relu(x))))))
        return x.transpose(1, 2), lengths


class SLM(nn.Module):
    """Encoder, connector and LM. Rows of a batch are packed as [prompt | audio | prompt | answer] with no gap inside.

    Components that are frozen below the first one that trains run separately (`frozen_part`), so that their outputs can be cached.
    """

    def __init__(self, encoder, connector, lm, tokenizer):
        super().__init__()
        self.encoder, self.connector, self.lm, self.tokenizer = encoder, connector, lm, tokenizer

    def train(self, mode=True):
        """A component that does not train stays in evaluation mode: no dropout in a frozen LoRA."""
        super().train(mode)
        for component in COMPONENTS:
            if not self.parameters_of(component):
                getattr(self, component).train(False)
        return self

    @property
    def frozen(self):
        """The frozen components below the first one that trains."""
        if self.parameters_of("encoder"):
            return ()
        return ("encoder",) if self.parameters_of("connector") else ("encoder", "connector")

    @torch.no_grad()
    def frozen_part(self, x, mask):
        """What `encoder.pretrained_part` gives -> (B, T, dim), mask (B, T) at the first component that trains."""
        if "encoder" in self.frozen:
            x = self.encoder.trained_part(x, mask)
        if "connector" in self.frozen:
            x, lengths = self.connector(x, mask)
            mask = length_mask(lengths, x.shape[1])
        return x, mask

    def audio_embeddings(self, x, mask):
        """What `frozen_part` gives -> the audio in the LM's space, a list of (T_i, hidden)."""
        lengths = mask.sum(1)
        if "encoder" not in self.frozen:
            x = self.encoder.trained_part(x, mask)
        if "connector" not in self.frozen:
            x, lengths = self.connector(x, mask)
        return [row[:n] for row, n in zip(x, lengths.tolist())]

    def pack(self, audio, prompts, answers=None):
        """Embeddings of each row, a list of (T_i, hidden). prompts: [(ids before, ids after)], answers: [ids]."""
        embed = self.lm.get_input_embeddings()
        ids = lambda tokens: embed(
            torch.tensor(tokens, dtype=torch.long, device=embed.weight.device)
        )  # noqa: E731
        answers = answers or [[]] * len(prompts)
        return [
            torch.cat([ids(before), x.to(embed.weight.dtype), ids(after + answer)])
            for x, (before, after), answer in zip(audio, prompts, answers)
        ]

    def forward(self, x, mask, prompts, answers):
        """Loss (B,): each row's mean cross entropy over its answer's tokens, the only positions whose logits are computed.
        x, mask: what `frozen_part` gives."""
        rows = self.pack(self.audio_embeddings(x, mask), prompts, answers)
        x = pad_sequence(
            rows, batch_first=True
        )  # right padding under causal attention: no real token sees it
        ends = torch.tensor([len(row) - 1 for row in rows], device=x.device)
        starts = ends - torch.tensor([len(a) for a in answers], device=x.device)
        self.answered = length_mask(ends, x.shape[1]) & ~length_mask(
            starts, x.shape[1]
        )  # where the next token is the answer's
        answered = self.lm.model(inputs_embeds=x, use_cache=False).last_hidden_state[self.answered]
        targets = torch.tensor([token for a in answers for token in a], device=answered.device)
        losses = F.cross_entropy(self.lm.lm_head(answered).float(), targets, reduction="none")
        return torch.stack([row.mean() for row in losses.split([len(a) for a in answers])])

    @torch.no_grad()
    def generate(self, x, mask, prompts, max_new_tokens):
        """Greedy answers, a list of texts; x, mask: what `frozen_part` gives."""
        return self.decode(self.pack(self.audio_embeddings(x, mask), prompts), max_new_tokens)

    def decode(self, rows, max_new_tokens):
        """Embeddings of prompts and audio, a list of (T_i, hidden) -> greedy answers, a list of texts."""
        x = pad_sequence(rows, batch_first=True, padding_side="left")  # all prompts end together
        mask = length_mask(
            torch.tensor([len(row) for row in rows], device=x.device), x.shape[1]
        ).flip(1)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if pad is None else pad,
        )
        tokens = self.lm.generate(
            inputs_embeds=x, attention_mask=mask.long(), generation_config=greedy
        ).tolist()
        tokens = [row[: row.index(end)] if end in row else row for row in tokens]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def component_state_dict(self, component):
        """What training may change of a component: {name: tensor}."""
        if component == "encoder":
            return {
                k: v
                for k, v in self.encoder.layers.state_dict().items()
                if int(k.split(".")[0]) >= self.encoder.first_trained
            }
        return self.connector.state_dict() if component == "connector" else lora_state_dict(self.lm)

    def load_component(self, component, state):
        """Puts a checkpoint's component in place. Raises ValueError naming the keys and shapes that do not fit."""
        own = self.component_state_dict(component)
        wrong = [f"{k} is missing" for k in own if k not in state]
        wrong += [f"{k} is not in this model" for k in state if k not in own]
        wrong += [
            f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ]
        if wrong:
            raise ValueError(
                "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            )
        for k, v in own.items():
            v.copy_(state[k])

    def parameters_of(self, component):
        """The trainable parameters of a component, a list."""
        return [p for p in getattr(self, component).parameters() if p.requires_grad]

    def layers_with_a_graph(self):
        """The transformer layers that gradients go through: the encoder's that train, and all of the LM's."""
        return [
            *(
                ()
                if "encoder" in self.frozen
                else self.encoder.layers[self.encoder.first_trained :]
            ),
            *self.lm.model.layers,
        ]

    def checkpoint_gradients(self):
        """From now on each of these layers keeps its input only and is computed again in the backward pass (Chen et al.
        2016, https://arxiv.org/abs/1604.06174)."""
        for layer in self.layers_with_a_graph():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------------
# loading


def autocast(amp, device):
    """The context of mixed precision, which training and evaluation enter: amp is "off", "bf16" or "fp16"."""
    return torch.autocast(
        torch.device(device).type,
        enabled=amp != "off",
        dtype=torch.float16 if amp == "fp16" else torch.bfloat16,
    )


def digest(state):
    """SHA-256 of a state dict: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for k, v in sorted(state.items()):
        v = v.detach().cpu().contiguous()
        sha.update(f"{k} {v.dtype} {tuple(v.shape)}".encode())
        sha.update(v.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_checkpoint(path, mmap=False):
    """A file of torch.save that holds tensors and plain values only. One that holds anything else, such as code, is refused in one
    line, and none of it runs."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        die(f"{path}: no such checkpoint")
    except Exception:  # unpickling a file that is no checkpoint raises errors of many kinds
        die(
            f"{path} is no checkpoint of this program (only tensors and plain values are ever loaded): make it again or "
            "leave it out"
        )
    if not isinstance(saved, dict):
        die(f"{path} is no checkpoint of this program: it holds a {type(saved).__name__}")
    for state in saved.values():
        for v in state.values() if isinstance(state, dict) else ():
            if isinstance(v, torch.Tensor) and not is_held(v):
                die(
                    f"{path} is no checkpoint of this program: a tensor is sparse, quantised or empty, or claims more memory "
                    "than the file holds"
                )
    return saved


def is_held(tensor):
    """Whether a tensor from a file is an ordinary one that has a number in memory for each of its elements."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= max(1, tensor.untyped_storage().nbytes())


def load_slm(args, device="cpu"):
    """The SLM that a command or a checkpoint asks for: pretrained encoder and LM, new connector and LoRA (decided by `args.seed`).
    `args` is a namespace with the settings of study.py, `encoder`, the parts' weights and `seed`."""
    device = torch.device(device)
    dry_run = device.type == "meta"  # shapes without weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(where(args.lm_weights), trust_remote_code=False)
        lm = load_part(AutoModelForCausalLM, args.lm_weights, dtype=torch.float32)
        encoder = Encoder(
            args.encoder_weights, args.train_layers, ENCODERS[args.encoder]["trained"]
        )
    except Exception as error:  # a folder of another kind raises errors of many kinds
        die(
            f"cannot load {args.encoder_weights} or {args.lm_weights}: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    lm.generation_config = (
        GenerationConfig()
    )  # a chat model's own settings sample; answers here are greedy
    pretrained = (
        {}
        if dry_run
        else {"encoder": digest(encoder.net.state_dict()), "lm": digest(lm.state_dict())}
    )
    if dry_run or getattr(args, "amp", None) == "bf16":
        for p in lm.parameters():  # they never change: cast once, not in every step
            p.data = p.to(torch.bfloat16)
    torch.manual_seed(args.seed)
    connector = Connector(
        encoder.dim, lm.config.hidden_size, args.connector_stride, args.connector_taper
    )
    if args.connector_weights not in (None, "none") and not dry_run:
        try:
            connector.load_state_dict(
                {k: v.float() for k, v in load_file(where(args.connector_weights)).items()}
            )
            pretrained["connector"] = digest(connector.state_dict())
        except (OSError, RuntimeError, SafetensorError) as error:
            die(
                f"cannot load {args.connector_weights}: {str(error).splitlines()[0]}; --connector-weights none starts from "
                "random weights"
            )
    add_lora(lm, args.lora_rank, args.lora_alpha, args.lora_dropout)
    slm = SLM(encoder, connector, lm, tokenizer).to(device)
    slm.pretrained_sha256 = pretrained
    return slm
