"""The speech language model (paper, section 2.1 and Figure 1): audio encoder -> connector -> language model with LoRA.

    waveform -> features -> encoder frames -> connector -> [prompt | audio | prompt | answer] -> LM -> one JSON object

Every pretrained part is a Hugging Face id or a local folder in that format; nothing here knows that a part is tiny.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import warnings
from pathlib import Path

os.environ.setdefault(
    "DISABLE_SAFETENSORS_CONVERSION", "1"
)  # a pytorch_model.bin is read as it is, nobody is asked online

from utils import ROOT, die

import numpy as np
import torch
import transformers
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

import data
from data import SAMPLE_RATE
from lora import LoRALinear, add_lora, lora_state_dict
from study import COMPONENTS, ENCODERS, LABELS

torch.backends.cudnn.allow_tf32 = (
    False  # float32 means float32 on a GPU too, as in matrix products by default
)
warnings.filterwarnings(
    "ignore", message="Support for mismatched key_padding_mask"
)  # inside transformers' WavLM
transformers.utils.logging.set_verbosity_error()  # what a checkpoint lacks is checked here

OTHER_LAYOUT = (
    "its {} encoder is not laid out as wav2vec 2.0, HuBERT or WavLM: take one of these, or Whisper"
)
# weights that this program never uses, so that a checkpoint may lack them: SpecAugment's vector, which fine-tuned
# checkpoints are published without, and Whisper's decoder
UNUSED = re.compile(r"(^|\.)masked_spec_embed$|^decoder\.")


def where(path):
    """A pretrained part's id or folder; `mini/...` lies beside this file, wherever a command is
    started from. Runs of earlier versions call that folder `assets`."""
    path = re.sub("^assets/", "mini/", str(path)) if not Path(path).exists() else str(path)
    if path.startswith("mini/") and not Path(path).exists():
        path = str(ROOT / path)
    return path


def read_config(path):
    """The configuration of a pretrained part. Raises ValueError where its weights are not plainly
    those of a model: an adapter, or quantised."""
    path = where(path)
    # an adapter's folder has no config.json; a hub id is looked up only once it is known to exist
    adapter = (Path(path) / "adapter_config.json").is_file()
    config = None if adapter else AutoConfig.from_pretrained(path, trust_remote_code=False)
    if adapter or find_adapter_config_file(path):
        raise ValueError(
            "it holds an adapter (adapter_config.json): merge it into its base model "
            "(peft: merge_and_unload) and save that"
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method")
        raise ValueError(
            f"its weights are quantised ({method}): take the model that they were made from"
        )
    if getattr(config, "add_adapter", False):
        config.add_adapter = False  # strided layers after the encoder: the connector's place
    return config


def load_part(auto, path, config, **kwargs):
    """A pretrained model of one of transformers' auto classes, with its `read_config`; the same in
    every process: weights that the checkpoint lacks raise ValueError, or, if UNUSED, are zero.
    Where torch's default device is "meta" (a dry run) it has shapes only, and the folder needs no
    weights."""
    if torch.get_default_device().type == "meta":
        return auto.from_config(config, **kwargs)
    net, found = auto.from_pretrained(
        where(path),
        config=config,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    lacking = sorted(k for k in found["missing_keys"] if not UNUSED.search(k))
    lacking += [
        f"{k} {tuple(wanted)} (it has {tuple(there)})"
        for k, there, wanted in sorted(found["mismatched_keys"])
    ]
    if lacking:
        total, unknown = len(net.state_dict()), sorted(found["unexpected_keys"])
        others = f"; it has {len(unknown)} others, such as {unknown[0]}" if unknown else ""
        raise ValueError(
            f"it lacks {len(lacking)} of the {total} weights of its {config.model_type} model, "
            f"such as {', '.join(lacking[:3])}{others}"
        )
    if any("lora_" in k for k in found["unexpected_keys"]):
        raise ValueError("it holds LoRA weights beside the model's: merge them and save that")
    for k in found["missing_keys"]:
        net.get_parameter_or_buffer(k).data.zero_()
    return net


def close(x, y):
    """Whether two tensors agree but for rounding."""
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-3 * (1 + y.abs().max()))


# settings that do not change what a part's weights compute in evaluation mode, or belong to heads
# that this program does not use
NOT_COMPUTED = re.compile(
    "drop|mask|spec_augment|_token|version|architectures|path|dtype|cache|init|label|problem_type|"
    "output_|return_|loss|ctc_|feature_extractor_type|processor_class|padding|gradient|"
    "attn_implementation|chunk_size_feed|vocab_size|decoder_|codevector|contrastive|negatives|"
    "classifier|tdnn|target_positions|median_filter"
)
# settings of connector and LoRA that do, and the argument that sets each
SETTING_OF = {"stride": "connector_stride", "LoRA alpha": "lora_alpha"}


def settings_of(config, extractor=None):
    """What a part's weights do not tell of what it computes, {name: value}: activation, heads,
    rotary base, epsilon, ..., and the settings of its feature extractor."""
    settings = config.to_dict()
    if extractor is not None:
        settings["extractor"] = extractor.to_dict()
    return computed(settings)


def computed(settings):
    """Those of nested settings that change what is computed, as JSON holds them."""
    kept = {k: v for k, v in settings.items() if not NOT_COMPUTED.search(k)}
    kept = {k: computed(v) if isinstance(v, dict) else v for k, v in kept.items()}
    return json.loads(json.dumps(kept, default=str))


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


def window(path):
    """How many seconds of an utterance the pretrained encoder at `path` receives."""
    try:
        extractor = AutoFeatureExtractor.from_pretrained(where(path), trust_remote_code=False)
    except Exception:  # loading the encoder will say what is wrong
        return math.inf
    return getattr(extractor, "n_samples", math.inf) / SAMPLE_RATE


def longest(args):
    """The longest audio that a run takes, in seconds: --max-seconds, and no more than its encoder
    receives."""
    return min(args.max_seconds, window(args.encoder_weights))


class Encoder(nn.Module):
    """A pretrained WavLM, HuBERT, wav2vec 2.0 or Whisper encoder. The top `train_layers` of its layers train, or, where that is
    None, the top `share` of them; everything below runs in evaluation mode and builds no graph. SpecAugment and layer drop are off.
    Raises ValueError where the folder holds something else.
    """

    def __init__(self, path, train_layers=None, share=1.0):
        super().__init__()
        config = read_config(path)
        self.whisper = config.model_type == "whisper"
        if not self.whisper and not hasattr(config, "conv_stride"):
            raise ValueError(
                f"it holds a {config.model_type} model, not a speech encoder "
                "(wav2vec 2.0, HuBERT, WavLM, Whisper)"
            )
        # published weights may be half precision: they train in float32
        net = load_part(AutoModel, path, config, dtype=torch.float32)
        self.extractor = AutoFeatureExtractor.from_pretrained(where(path), trust_remote_code=False)
        self.extract = functools.partial(
            extract, self.extractor
        )  # pickled for worker processes, without the weights
        self.check_extractor(config)
        self.net = net.get_encoder() if self.whisper else net
        transformer = self.net if self.whisper else self.net.encoder
        if not hasattr(transformer, "layers"):
            raise ValueError(OTHER_LAYOUT.format(config.model_type))
        self.layers, self.layer_norm = transformer.layers, transformer.layer_norm
        self.relative = hasattr(
            getattr(self.layers[0], "attention", None), "compute_bias"
        )  # WavLM's position bias
        # base-size models normalise before the layers, large ones after
        self.norm_first = not self.whisper and not getattr(config, "do_stable_layer_norm", False)
        # a front end that normalises over time must not see padding
        self.alone = getattr(config, "feat_extract_norm", None) == "group"
        n = len(self.layers)
        train_layers = round(n * share) if train_layers is None else train_layers
        if not 0 <= train_layers <= n:
            die(f"--train-layers {train_layers}: {path} has {n} layers")
        self.first_trained = n - train_layers
        self.dim = config.hidden_size
        self.settings = settings_of(config, self.extractor)
        self.seconds_per_frame = (
            2 * self.extractor.hop_length if self.whisper else math.prod(config.conv_stride)
        ) / SAMPLE_RATE
        if not self.whisper and torch.get_default_device().type != "meta":
            self.check_frames(config)
        self.requires_grad_(False)
        self.layers[self.first_trained :].requires_grad_(True)

    def check_extractor(self, config):
        """Raises ValueError unless the checkpoint's feature extractor makes what its encoder takes."""
        rate = getattr(self.extractor, "sampling_rate", None)
        if rate != SAMPLE_RATE:
            raise ValueError(
                f"its feature extractor takes audio of {rate} Hz, and this program works at "
                f"{SAMPLE_RATE} Hz: take an encoder for that rate"
            )
        with torch.device("cpu"):  # also in a dry run
            features = [self.extract(np.zeros(SAMPLE_RATE, np.float32)) for _ in range(2)]
        if not torch.equal(*features):
            raise ValueError(
                "its feature extractor (preprocessor_config.json) draws at random: set its dither to 0"
            )
        shape = tuple(features[0].shape)
        fits = shape == (SAMPLE_RATE,)
        if self.whisper:
            fits = len(shape) == 2 and shape[0] == config.num_mel_bins
        if not fits:
            taken = f"{config.num_mel_bins} mel bands" if self.whisper else f"{SAMPLE_RATE} samples"
            raise ValueError(
                f"its feature extractor (preprocessor_config.json) makes {shape} of a second of "
                f"audio, and its encoder (config.json) takes {taken}: take the "
                f"{config.model_type} model's own"
            )
        if self.whisper and self.extractor.nb_max_frames > 2 * config.max_source_positions:
            raise ValueError(
                f"its feature extractor (preprocessor_config.json) makes up to "
                f"{self.extractor.nb_max_frames} frames, and its encoder (config.json) takes "
                f"{2 * config.max_source_positions}: take the model's own"
            )

    @torch.no_grad()
    def check_frames(self, config):
        """Raises ValueError unless the frames of two utterances in a batch are those of
        transformers' own forward pass: an encoder of another layout might pass through here as
        something else."""
        noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE // 2).astype(np.float32)
        features = [self.extract(0.1 * noise), self.extract(0.1 * noise[: SAMPLE_RATE // 4])]
        try:
            whole = [self.net(f[None]).last_hidden_state[0] for f in features]
            x, mask = self(features)
            same = [
                bool(mask[i].sum() == len(frames)) and close(x[i, : len(frames)], frames)
                for i, frames in enumerate(whole)
            ]
        except Exception:  # it has other modules, and each fails in its own way
            same = [False]
        if not all(same):
            raise ValueError(OTHER_LAYOUT.format(config.model_type))

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
        # learned positions end somewhere, rotary ones do not
        tables = [m for m in lm.modules() if isinstance(m, nn.Embedding)]
        learned = any(table is not lm.get_input_embeddings() for table in tables)
        self.positions = lm.config.max_position_embeddings if learned else math.inf

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
        rows = [
            torch.cat([ids(before), x.to(embed.weight.dtype), ids(after + answer)])
            for x, (before, after), answer in zip(audio, prompts, answers)
        ]
        self.check_positions(max(map(len, rows)))
        return rows

    def check_positions(self, n):
        """Ends in one line where a row of n positions is longer than the LM's table of them."""
        if n > self.positions:
            die(
                f"prompt, audio and answer take {n} positions, and the language model has "
                f"{self.positions}: a larger --connector-stride shortens the audio, --max-seconds "
                "with --skip-bad leaves long audio out"
            )

    def forward(self, x, mask, prompts, answers):
        """Loss (B,): each row's mean cross entropy over its answer's tokens, the only positions whose logits are computed.
        x, mask: what `frozen_part` gives."""
        rows = self.pack(self.audio_embeddings(x, mask), prompts, answers)
        x = pad_sequence(
            rows, batch_first=True
        )  # right padding under causal attention: no real token sees it
        ends = torch.tensor([len(row) - 1 for row in rows], device=x.device)
        starts = ends - torch.tensor([len(a) for a in answers], device=x.device)
        # where the next token is the answer's
        answered = length_mask(ends, x.shape[1]) & ~length_mask(starts, x.shape[1])
        logits = self.logits(x, answered)
        targets = torch.tensor([token for a in answers for token in a], device=logits.device)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return torch.stack([row.mean() for row in losses.split([len(a) for a in answers])])

    def logits(self, x, wanted, cache=None):
        """The LM's own logits (n, vocabulary), with whatever it does to them after its last layer,
        at the n `wanted` positions (B, T) of embeddings (B, T, hidden)."""
        self.answered = wanted
        cached = {} if cache is None else {"cache": cache}
        return self.lm(
            inputs_embeds=x, use_cache=bool(cached), logits_to_keep=wanted, **cached
        ).logits

    @torch.no_grad()
    def generate(self, x, mask, prompts, max_new_tokens):
        """Greedy answers, a list of texts; x, mask: what `frozen_part` gives."""
        return self.decode(self.pack(self.audio_embeddings(x, mask), prompts), max_new_tokens)

    def decode(self, rows, max_new_tokens):
        """Embeddings of prompts and audio, a list of (T_i, hidden) -> greedy answers, a list of texts."""
        self.check_positions(max(map(len, rows)) + max_new_tokens)
        x = pad_sequence(rows, batch_first=True, padding_side="left")  # all prompts end together
        mask = length_mask(
            torch.tensor([len(row) for row in rows], device=x.device), x.shape[1]
        ).flip(1)
        end = self.tokenizer.eos_token_id
        # a row that has ended may go on with any token
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
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
            *layers_of(self.lm),
        ]

    def checkpoint_gradients(self):
        """From now on each of these layers keeps its input only and is computed again in the backward pass (Chen et al.
        2016, https://arxiv.org/abs/1604.06174)."""
        for layer in self.layers_with_a_graph():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------------
# the parts of a language model, whatever they are named


def layers_of(lm):
    """The transformer layers of a language model, an nn.ModuleList. Raises ValueError where it has none."""
    n = lm.config.get_text_config().num_hidden_layers
    for module in lm.modules():  # from the outside in
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return module
    raise ValueError(f"its {lm.config.model_type} model has no list of {n} layers")


@torch.no_grad()
def output_layers(lm):
    """[(attention's, MLP's)] of each transformer layer: the linear layers, with LoRA, that write
    what attention and MLP add to the hidden states, which are the last that the layer calls of
    each. Ends in one line where attention and MLP are not made of linear layers alone, as in a
    mixture of experts."""
    calls, handles = [], []
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            handles.append(module.register_forward_hook(lambda module, *_: calls.append(module)))
    embedding = lm.get_input_embeddings()
    lm(inputs_embeds=embedding.weight[None, :2], use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    found = []
    for layer in layers_of(lm):
        name_of = {m: name for name, m in layer.named_modules() if isinstance(m, LoRALinear)}
        order = [module for module in calls if module in name_of]
        attention = [module for module in order if "att" in name_of[module]]
        mlp = [module for module in order if "att" not in name_of[module]]
        once = len(order) == len(name_of) == len(set(order))
        linear = all(p.dim() <= 2 for p in layer.parameters())
        if not (once and linear and attention and mlp):
            die(
                f"the {lm.config.model_type} language model has layers that are not attention and "
                "MLP of linear layers alone: traces within an answer and repairs do not know them"
            )
        found.append((attention[-1], mlp[-1]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# loading


@contextlib.contextmanager
def blame(flag, path, doing=""):
    """A context in which whatever goes wrong ends the program in one line that names this part,
    and what was being done where the error does not say it for itself."""
    try:
        yield
    except Exception as error:  # a folder of another kind raises errors of many kinds
        said = (str(error).splitlines() or [""])[0]
        kind = "" if isinstance(error, ValueError) else f"{doing}{type(error).__name__}: "
        die(f"cannot load --{flag} {path}: {kind}{said}")


def fit_tokenizer(tokenizer, lm):
    """Gives a tokenizer without an end-of-sequence token the LM's. Raises ValueError where there is
    none, or where the LM has no embedding for a token that prompts or answers may hold. Added
    tokens that a prompt does not hold may lack one."""
    embeddings = lm.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id is None:
        named = (lm.generation_config.eos_token_id, lm.config.get_text_config().eos_token_id)
        ends = next((end for end in named if end is not None), None)
        end = ends[0] if isinstance(ends, list) else ends
        tokenizer.eos_token = None if end is None else tokenizer.convert_ids_to_tokens(end)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "neither its tokenizer nor its configuration names an end-of-sequence token "
            "(eos_token), which ends every answer"
        )
    labels = dict(transcript="it's eleven o'clock", gender="female", age=35, emotion="angry")
    ids = data.answer_ids(tokenizer, labels)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if data.parse(text) != labels:
        raise ValueError(f"its tokenizer makes {text!r} of the answer {data.answer(labels)!r}")
    before, after = data.prompt(tokenizer, list(LABELS))
    added = set(tokenizer.get_added_vocab().values())
    used = {id for id in tokenizer.get_vocab().values() if id not in added}
    unknown = tokenizer("\u6f22 \U0001f9ff", add_special_tokens=False).input_ids  # rare characters
    used |= {tokenizer.eos_token_id, *before, *after, *unknown}
    beyond = sorted(id for id in used if id >= embeddings)
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ValueError(
            f"its tokenizer uses {len(beyond)} tokens that the model's {embeddings} embeddings lack, "
            f"such as {token!r} ({beyond[0]}): take the model's own tokenizer, or resize its embeddings"
        )


@torch.no_grad()
def check_lm(lm, ids):
    """Raises ValueError unless an LM can be used as the SLM does: with embeddings in the place of
    tokens, logits at chosen positions, later tokens without a say in earlier ones, and rows of a
    batch that begin at different positions. ids: those of a few tokens."""
    kind, embed = lm.config.model_type, lm.get_input_embeddings()
    rows = [torch.tensor(ids), torch.tensor(ids[len(ids) // 2 :])]
    whole = [lm(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    x = pad_sequence([embed(row) for row in rows], batch_first=True)
    last = length_mask(torch.tensor([len(row) for row in rows]), x.shape[1])
    last &= ~length_mask(torch.tensor([len(row) - 2 for row in rows]), x.shape[1])
    chosen = lm(inputs_embeds=x, use_cache=False, logits_to_keep=last).logits
    if not close(chosen, torch.cat([logits[-2:] for logits in whole])):
        raise ValueError(
            f"its {kind} model gives other logits for embeddings, in a padded batch and at chosen "
            "positions, than for tokens"
        )
    beginning = lm(input_ids=rows[0][None, :-1], use_cache=False).logits[0]
    if not close(beginning, whole[0][:-1]):
        raise ValueError(f"its {kind} model looks at later tokens: it cannot write an answer")
    x = pad_sequence([embed(row) for row in rows], batch_first=True, padding_side="left")
    mask = length_mask(torch.tensor([len(row) for row in rows]), x.shape[1]).flip(1)
    settings = GenerationConfig(
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first = lm.generate(inputs_embeds=x, attention_mask=mask.long(), generation_config=settings)
    if not close(first.logits[0], torch.stack([logits[-1] for logits in whole])):
        raise ValueError(f"its {kind} model answers otherwise in a batch than alone")


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
    with blame("lm-weights", args.lm_weights):
        config = read_config(args.lm_weights)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"it holds a {config.model_type} model, not a language model")
        tokenizer = AutoTokenizer.from_pretrained(where(args.lm_weights), trust_remote_code=False)
        lm = load_part(AutoModelForCausalLM, args.lm_weights, config, dtype=torch.float32)
        fit_tokenizer(tokenizer, lm)
        layers_of(lm)
    with blame("encoder-weights", args.encoder_weights):
        encoder = Encoder(
            args.encoder_weights, args.train_layers, ENCODERS[args.encoder]["trained"]
        )
    lm.generation_config = (
        GenerationConfig()
    )  # a chat model's own settings sample; answers here are greedy
    pretrained = (
        {}
        if dry_run
        else {"encoder": digest(encoder.net.state_dict()), "lm": digest(lm.state_dict())}
    )
    torch.manual_seed(args.seed)
    lm_dim = lm.get_input_embeddings().weight.shape[1]
    connector = Connector(encoder.dim, lm_dim, args.connector_stride, args.connector_taper)
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
    doing = f"its {config.model_type} model does not work with LoRA and embedded audio, "
    with blame("lm-weights", args.lm_weights, doing):
        add_lora(lm, args.lora_rank, args.lora_alpha, args.lora_dropout)
        if not dry_run:
            check_lm(lm.eval(), data.prompt(tokenizer, list(LABELS))[0][-8:])
    if dry_run or getattr(args, "amp", None) == "bf16":
        for p in lm.parameters():  # the base never changes: cast once, not in every step
            p.data = p if p.requires_grad else p.to(torch.bfloat16)
    slm = SLM(encoder, connector, lm, tokenizer).to(device)
    slm.pretrained_sha256 = pretrained
    of_args = {name: getattr(args, key) for name, key in SETTING_OF.items()}
    slm.settings = {
        "encoder": encoder.settings,
        "connector": {"stride": of_args["stride"]},
        "lm": {
            **settings_of(lm.config),
            "LoRA alpha": of_args["LoRA alpha"],
            "LoRA rank-stabilised": False,
        },
    }
    return slm


# -------------------------------------------------------------------------------------------------
# weight surgery, for trace.py and defences/repairs.py
#
# `weights` are {component: state dict} of what training may change, as copy_weights makes them.


def copy_weights(slm):
    weights = {}
    for component in COMPONENTS:
        state = slm.component_state_dict(component)
        weights[component] = {name: tensor.clone() for name, tensor in state.items()}
    return weights


@torch.no_grad()
def set_weights(slm, weights):
    """Loads the weights of all components into the model. LoRA's may have any rank."""
    slm.load_component("encoder", weights["encoder"])
    slm.load_component("connector", weights["connector"])
    for name, tensor in weights["lm"].items():
        parameter = slm.lm.get_parameter(name)
        parameter.data = tensor.to(parameter.device).clone()


def layer_index(name):
    """The layer, from 0, of a weight in the encoder's or the LM's state dict ("3.attention...",
    "model.layers.3...", "transformer.h.3..."). None for a weight outside the layers, such as
    OPT's projections."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return None


def transplant_layers(receiver, donor, component, layers):
    """The receiver's weights, except that these layers (from 0) of one component are the donor's."""
    mixed = dict(receiver[component])
    for name in mixed:
        if layer_index(name) in layers:
            mixed[name] = donor[component][name]
    return {**receiver, component: mixed}


def interpolate(start, end, component, share):
    """The weights `start`, except that one component is moved by `share` of the way to `end`.

    What is interpolated of LoRA is its update, the product B A. The sum (1 - share) B1 A1 +
    share B2 A2 is one LoRA of twice the rank: the A stand on top of each other, and the B, each
    scaled by its share, side by side.
    """
    mixed = {}
    for name, a in start[component].items():
        b = end[component][name]
        if name.endswith("lora_A"):
            mixed[name] = torch.cat([a, b])  # (2 rank, in)
        elif name.endswith("lora_B"):
            mixed[name] = torch.cat([(1 - share) * a, share * b], 1)  # (out, 2 rank)
        else:
            mixed[name] = torch.lerp(a.float(), b.float(), share).to(a.dtype)
    return {**start, component: mixed}


def encoder_attention(layer):
    """The attention of an encoder layer, which Whisper names differently from the others."""
    return layer.attention if hasattr(layer, "attention") else layer.self_attn


def encoder_mlp(layer):
    """The module that writes what an encoder layer's MLP adds: Whisper's second linear layer, or
    the others' whole MLP."""
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.fc2
