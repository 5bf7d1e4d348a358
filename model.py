"""The speech language model (paper, section 2.1 and Figure 1): audio encoder -> connector -> LM.

    waveform -> features -> encoder frames -> connector
             -> [prompt | audio | prompt | answer] -> LM with LoRA -> one JSON object

The model itself comes first: `Encoder`, `Connector`, `SLM`. Loading and checking
of pretrained parts follows. Each part is a Hugging Face id or a local folder in that format, and
nothing here depends on a model's size.
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

# a pytorch_model.bin is read as it is: transformers must not ask online for a converted one
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

from utils import die, first_line

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
from study import COMPONENTS, ENCODERS, LABELS, where

# float32 means float32 on a GPU too, as it does by default in matrix products
torch.backends.cudnn.allow_tf32 = False
# raised inside transformers' WavLM
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
# this file checks for itself what a checkpoint lacks
transformers.utils.logging.set_verbosity_error()

MIN_SAMPLES = SAMPLE_RATE // 10  # shorter audio is padded to 0.1 s
ANSWER_TOKENS = 512  # how long an answer of `SLM.answer` may get


def length_mask(lengths, frames):
    """(B,) lengths -> (B, frames) bool, True where a frame is real."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def pool(x, lengths, pooling="mean"):
    """(B, T, dim) and each row's number of real frames -> (B, dim) float32: the frames' mean, their
    maximum or the last one."""
    mask = length_mask(lengths, x.shape[1])[..., None]  # (B, T, 1)
    if pooling == "max":
        return x.masked_fill(~mask, float("-inf")).amax(1).float()
    if pooling == "last":
        return x[torch.arange(len(x), device=x.device), lengths - 1].float()
    return ((x * mask).sum(1) / lengths[:, None]).float()


# -------------------------------------------------------------------------------------------------
# the audio encoder


@torch.autocast("cpu", enabled=False)  # Whisper's extractor cannot work in bf16
def extract(extractor, waveform):
    """16 kHz waveform (samples,) -> an encoder's input, time last: normalised samples (samples,) or
    log-mel (mels, frames), made by the checkpoint's own feature extractor. Whisper's input is not
    padded to its window of 30 s, but it is cut off there. Audio of less than 0.1 s is padded."""
    waveform = np.pad(waveform, (0, max(0, MIN_SAMPLES - len(waveform))))
    if not hasattr(extractor, "n_samples"):
        inputs = extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return inputs.input_values[0]
    inputs = extractor(
        waveform[: extractor.n_samples],  # Whisper's window
        sampling_rate=SAMPLE_RATE,
        return_tensors="pt",
        padding="longest",
        truncation=False,
    )
    return inputs.input_features[0]


def receptive_field(kernels, strides):
    """How many samples one output frame of a stack of convolutions sees."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        samples = (samples - 1) * stride + kernel
    return samples


class Encoder(nn.Module):
    """A pretrained WavLM, HuBERT, wav2vec 2.0 or Whisper encoder.

    The top `train_layers` of its layers train, or, where that is None, the top `share` of them.
    Everything below runs in evaluation mode and builds no graph. There is no SpecAugment and no
    layer drop.
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
        # a function that worker processes can be sent without the weights
        self.extract = functools.partial(extract, self.extractor)
        check_extractor(self.extractor, config)

        self.net = net.get_encoder() if self.whisper else net
        transformer = self.net if self.whisper else self.net.encoder
        if not hasattr(transformer, "layers"):
            raise ValueError(OTHER_LAYOUT.format(config.model_type))
        self.layers = transformer.layers
        self.layer_norm = transformer.layer_norm
        # WavLM's position bias
        self.relative = hasattr(getattr(self.layers[0], "attention", None), "compute_bias")
        # base-size models normalise before the layers, large ones after
        self.norm_first = not self.whisper and not getattr(config, "do_stable_layer_norm", False)
        # a front end that normalises over time must not see padding
        self.alone = getattr(config, "feat_extract_norm", None) == "group"
        if self.whisper:
            hop = 2 * self.extractor.hop_length
            # a mel frame is centred on its own time, and both convolutions on a frame that they see
            first_centre = 0.0
        else:
            hop = math.prod(config.conv_stride)
            first_centre = receptive_field(config.conv_kernel, config.conv_stride) / 2
        self.seconds_per_frame = hop / SAMPLE_RATE
        self.first_centre = first_centre / SAMPLE_RATE
        self.dim = config.hidden_size
        self.settings = settings_of(config, self.extractor)

        n = len(self.layers)
        if train_layers is None:
            train_layers = round(n * share)
        if not 0 <= train_layers <= n:
            die(f"--train-layers {train_layers}: {path} has {n} layers")
        self.first_trained = n - train_layers
        if not self.whisper and torch.get_default_device().type != "meta":
            check_frames(self, config)
        self.requires_grad_(False)
        self.layers[self.first_trained :].requires_grad_(True)

    def train(self, mode=True):
        super().train(False)
        self.layers[self.first_trained :].train(mode)
        return self

    def num_frames(self, samples):
        """How many frames an utterance of that many 16 kHz samples has."""
        samples = max(samples, MIN_SAMPLES)
        if not self.whisper:
            return int(self.net._get_feat_extract_output_lengths(samples))
        mel_frames = min(samples, self.extractor.n_samples) // self.extractor.hop_length
        return (mel_frames - 1) // 2 + 1

    def frame_centres(self, frames):
        """The middle of the audio that each frame sees before the first layer, in seconds. frames:
        their numbers, from 0, a tensor or array."""
        return self.first_centre + frames * self.seconds_per_frame

    def front_end(self, features):
        """List of `extract`ed inputs -> hidden states before the first layer (B, T, dim) and their
        mask (B, T)."""
        features = [f.to(self.layer_norm.weight.device) for f in features]
        longest = max(f.shape[-1] for f in features)
        padded = torch.stack([F.pad(f, (0, longest - f.shape[-1])) for f in features])
        lengths = torch.tensor([f.shape[-1] for f in features], device=padded.device)
        if self.whisper:
            return self.whisper_front_end(padded, lengths)

        cnn = self.net.feature_extractor
        if self.alone:
            x = pad_sequence([cnn(f[None])[0].T for f in features], batch_first=True)
        else:
            x = cnn(padded).transpose(1, 2)  # (B, T, channels)
        x = self.net.feature_projection(x)  # (B, T, dim)
        x = x[0] if isinstance(x, tuple) else x
        mask = length_mask(self.net._get_feat_extract_output_lengths(lengths), x.shape[1])
        x = x * mask[..., None]
        x = x + self.net.encoder.pos_conv_embed(x)
        if self.norm_first:
            x = self.layer_norm(x)
        return x, mask

    def whisper_front_end(self, mels, lengths):
        """Log-mels (B, mels, frames) and their lengths (B,) -> (B, T, dim) and mask (B, T)."""
        x = F.gelu(self.net.conv1(mels)) * length_mask(lengths, mels.shape[-1])[:, None]
        x = F.gelu(self.net.conv2(x)).transpose(1, 2)  # (B, T, dim)
        mask = length_mask((lengths - 1) // 2 + 1, x.shape[1])
        return x + self.net.embed_positions.weight[: x.shape[1]], mask

    def run_layers(self, x, mask, start, stop):
        """Transformer layers start to stop; yields the hidden states (B, T, dim) after each."""
        nothing_padded = mask.is_meta or bool(mask.all())
        kwargs = {}
        if self.relative:  # the first layer holds the bias of all; WavLM takes the mask itself
            bias = self.layers[0].attention.compute_bias(x.shape[1], x.shape[1])
            kwargs["position_bias"] = bias.repeat(len(x), 1, 1)
            attention_mask = mask
        else:
            attention_mask = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        if nothing_padded:
            attention_mask = None
        for layer in self.layers[start:stop]:
            x = layer(x, attention_mask=attention_mask, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
            yield x

    @torch.no_grad()
    def pretrained_part(self, features):
        """The layers below those that train: list of inputs -> hidden states (B, T, dim) at the
        first trained layer, mask (B, T)."""
        x, mask = self.front_end(features)
        for after_layer in self.run_layers(x, mask, 0, self.first_trained):
            x = after_layer
        return x, mask

    def trained_part(self, x, mask):
        """What training may change: hidden states at the first trained layer -> the encoder's
        output (B, T, dim)."""
        for after_layer in self.run_layers(x, mask, self.first_trained, len(self.layers)):
            x = after_layer
        return x if self.norm_first else self.layer_norm(x)

    def forward(self, features):
        x, mask = self.pretrained_part(features)
        return self.trained_part(x, mask), mask


# -------------------------------------------------------------------------------------------------
# the connector


class Connector(nn.Module):
    """Three Conv1d, kernel 5, no padding, ReLU before and between: in -> out/2 -> out -> out,
    strides 1, k, 1. The reference implementation's CNNConnector. (B, T, in) -> (B, T', out)."""

    def __init__(self, in_dim, out_dim, stride, taper=1.0):
        super().__init__()
        self.conv1 = nn.Conv1d(in_dim, out_dim // 2, 5)
        self.conv2 = nn.Conv1d(out_dim // 2, out_dim, 5, stride=stride)
        self.conv3 = nn.Conv1d(out_dim, out_dim, 5)
        # `taper` < 1 starts each kernel around its middle tap: three untapered ones blur over 13
        # frames, half a second at mini's 25 frames a second, and the words are lost before the LM
        # can learn to listen
        shape = taper ** torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0])
        for conv in (self.conv1, self.conv2, self.conv3):
            conv.weight.data *= shape * (5 / shape.square().sum()).sqrt()
        self.stride = stride
        self.min_frames = 4 + 4 * stride + 5  # what one output frame sees

    def forward(self, x, mask):
        """Returns the output and its lengths (B,). Nothing is padded inside: an output frame within
        its length sees real frames only, so that a batch's padding cannot matter. Input shorter
        than what one output frame sees is padded to that."""
        lengths = (mask.sum(1).clamp(min=self.min_frames) - 9) // self.stride - 3
        x = (x * mask[..., None]).transpose(1, 2)  # (B, in, T)
        x = F.pad(x, (0, max(0, self.min_frames - x.shape[-1])))
        x = self.conv1(F.relu(x))
        x = self.conv2(F.relu(x))
        x = self.conv3(F.relu(x))  # (B, out, T')
        return x.transpose(1, 2), lengths


# -------------------------------------------------------------------------------------------------
# the whole model


def token_losses(logits, answers):
    """The cross entropy of each token, a tuple of one (A,) for each of the answers (lists of ids);
    logits: those that foretell their tokens (all answers' tokens, vocabulary)."""
    targets = torch.tensor(sum(answers, []), device=logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses.split([len(answer) for answer in answers])


class SLM(nn.Module):
    """Encoder, connector and LM. Rows of a batch are packed as [prompt | audio | prompt | answer]
    with no gap inside.

    Components that are frozen below the first one that trains run separately (`frozen_part`), so
    that their outputs can be cached.
    """

    def __init__(self, encoder, connector, lm, tokenizer, labels=LABELS):
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.lm = lm
        self.tokenizer = tokenizer
        self.labels = list(labels)  # what it is trained to answer
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
        """What `encoder.pretrained_part` gives -> (B, T, dim) and mask (B, T) at the first
        component that trains."""
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

    def embed(self, ids):
        """A list of n token ids -> their embeddings (n, hidden)."""
        embedding = self.lm.get_input_embeddings()
        return embedding(torch.tensor(ids, dtype=torch.long, device=embedding.weight.device))

    def pack(self, audio, prompts, answers=None):
        """Embeddings of each row, a list of (T_i, hidden).
        prompts: [(ids before, ids after)], answers: [ids]."""
        answers = answers or [[]] * len(prompts)
        rows = []
        for x, (before, after), answer in zip(audio, prompts, answers):
            before = self.embed(before)
            after = self.embed(after + answer)
            rows.append(torch.cat([before, x.to(before.dtype), after]))  # (T_i, hidden)
        self.check_positions(max(map(len, rows)))
        return rows

    def check_positions(self, n):
        """Exits with a one-line error where a row of n positions is longer than the LM's table of
        them."""
        if n > self.positions:
            die(
                f"prompt, audio and answer take {n} positions, and the language model has "
                f"{self.positions}: a larger --connector-stride shortens the audio, --max-seconds "
                "with --skip-bad leaves long audio out"
            )

    def forward(self, x, mask, prompts, answers, by_token=False):
        """Loss (B,): each row's mean cross entropy over its answer's tokens. x, mask: what
        `frozen_part` gives. by_token: the cross entropy of each token instead, a tuple of one (A,)
        for each row."""
        logits = self.answer_logits(x, mask, prompts, answers)
        losses = token_losses(logits, answers)
        return losses if by_token else torch.stack([row.mean() for row in losses])

    def answer_logits(self, x, mask, prompts, answers):
        """The logits (all answers' tokens, vocabulary) that foretell each token of each answer. No
        others are computed. x, mask: what `frozen_part` gives."""
        rows = self.pack(self.audio_embeddings(x, mask), prompts, answers)
        # right padding under causal attention: no real token sees it
        x = pad_sequence(rows, batch_first=True)  # (B, T, hidden)
        answer_lengths = [len(answer) for answer in answers]
        ends = torch.tensor([len(row) - 1 for row in rows], device=x.device)  # (B,)
        starts = ends - torch.tensor(answer_lengths, device=x.device)
        # where the next token is the answer's
        wanted = length_mask(ends, x.shape[1]) & ~length_mask(starts, x.shape[1])
        return self.logits(x, wanted)

    def logits(self, x, wanted, beginning=None):
        """The LM's own logits (n, vocabulary), with whatever it does to them after its last layer,
        at the n `wanted` positions (B, T) of embeddings (B, T, hidden). beginning: a cache of keys
        and values of what comes before, which those of x are added to. In training, cache.py's
        `only_answers` and `share_beginning` wrap this method to skip what no loss needs."""
        kwargs = {} if beginning is None else {"cache": beginning}
        use_cache = beginning is not None
        out = self.lm(inputs_embeds=x, use_cache=use_cache, logits_to_keep=wanted, **kwargs)
        return out.logits

    @torch.no_grad()
    def generate(self, x, mask, prompts, max_new_tokens):
        """Greedy answers, a list of texts; x, mask: what `frozen_part` gives."""
        return self.decode(self.pack(self.audio_embeddings(x, mask), prompts), max_new_tokens)

    def decode(self, rows, max_new_tokens):
        """Embeddings of prompts and audio, a list of (T_i, hidden) -> greedy answers, a list of
        texts."""
        tokens = self.greedy_tokens(rows, max_new_tokens)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def greedy_tokens(self, rows, max_new_tokens):
        """As `decode`, but the answers' token ids, without the end-of-sequence token."""
        self.check_positions(max(map(len, rows)) + max_new_tokens)
        x, mask = pad_left(rows)  # all prompts end together
        end = self.tokenizer.eos_token_id
        # a row that has ended may go on with any token
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        tokens = self.lm.generate(inputs_embeds=x, attention_mask=mask, generation_config=greedy)
        answers = []
        for row in tokens.tolist():
            answers.append(row[: row.index(end)] if end in row else row)
        return answers

    @torch.no_grad()
    def answer(self, waveform, labels=None):
        """The model's answer to one recording, as text: one JSON object, where it says what it was
        trained to say. Greedy, in evaluation mode, with LoRA merged or not, as it is.

        waveform: 16 kHz mono, float, (samples,). labels: what the prompt asks for, some of
        study.LABELS; by default all that the model was trained on.
        """
        training = self.training
        self.eval()
        prompt = data.prompt(self.tokenizer, list(labels or self.labels))
        features = self.encoder.extract(np.asarray(waveform, dtype=np.float32))
        x, mask = self.frozen_part(*self.encoder.pretrained_part([features]))
        text = self.generate(x.float(), mask, [prompt], ANSWER_TOKENS)[0]
        self.train(training)
        return text

    def component_state_dict(self, component):
        """What training may change of a component: {name: tensor}."""
        if component == "connector":
            return self.connector.state_dict()
        if component == "lm":
            return lora_state_dict(self.lm)
        trained = {}
        for name, tensor in self.encoder.layers.state_dict().items():
            if int(name.split(".")[0]) >= self.encoder.first_trained:
                trained[name] = tensor
        return trained

    def load_component(self, component, state):
        """Puts a checkpoint's component in place. Raises ValueError naming the keys and shapes that
        do not fit."""
        current = self.component_state_dict(component)
        wrong = [f"{name} is missing" for name in current if name not in state]
        wrong += [f"{name} is not in this model" for name in state if name not in current]
        for name in current:
            if name in state and state[name].shape != current[name].shape:
                shapes = f"{tuple(state[name].shape)}, not {tuple(current[name].shape)}"
                wrong.append(f"{name} is {shapes}")
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError("; ".join(wrong[:3]) + more)
        for name, tensor in current.items():
            tensor.copy_(state[name])

    def parameters_of(self, component):
        """The trainable parameters of a component, a list."""
        return [p for p in getattr(self, component).parameters() if p.requires_grad]

    def layers_with_a_graph(self):
        """The transformer layers that gradients go through, a list: the encoder's that train, and
        all of the LM's."""
        layers = list(layers_of(self.lm))
        if "encoder" not in self.frozen:
            layers = [*self.encoder.layers[self.encoder.first_trained :], *layers]
        return layers

    def checkpoint_gradients(self):
        """From now on these layers keep their input only and are computed again in the backward
        pass (Chen et al. 2016, https://arxiv.org/abs/1604.06174). The last one, which the backward
        pass needs first, keeps everything: computing it again would save next to nothing."""
        for layer in self.layers_with_a_graph()[:-1]:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def pad_left(rows):
    """A list of (T_i, hidden) -> (B, T, hidden), each row at the end, and its (B, T) mask of 0
    and 1."""
    x = pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=x.device)
    return x, length_mask(lengths, x.shape[1]).flip(1).long()


def autocast(amp, device):
    """The context of mixed precision, which training and evaluation enter: amp is "off", "bf16" or
    "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(device).type, enabled=amp != "off", dtype=dtype)


# -------------------------------------------------------------------------------------------------
# the parts of a language model, whatever they are named


def layers_of(lm):
    """The transformer layers of a language model, an nn.ModuleList. Raises ValueError where it has
    none."""
    n = lm.config.get_text_config().num_hidden_layers
    for module in lm.modules():  # from the outside in
        if isinstance(module, nn.ModuleList) and len(module) == n:
            return module
    raise ValueError(f"its {lm.config.model_type} model has no list of {n} layers")


def linear_layers_called(lm):
    """The linear layers with LoRA, in the order in which a forward pass calls them, a list."""
    calls = []

    def note_call(module, inputs, output):
        calls.append(module)

    handles = []
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            handles.append(module.register_forward_hook(note_call))
    embedding = lm.get_input_embeddings()
    lm(inputs_embeds=embedding.weight[None, :2], use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def output_layers(lm):
    """[(attention's, MLP's)] of each transformer layer: the linear layers, with LoRA, that write
    what attention and MLP add to the hidden states, which are the last that the layer calls of
    each. Exits with a one-line error where attention and MLP are not made of linear layers alone,
    as in a mixture of experts."""
    calls = linear_layers_called(lm)
    pairs = []
    for layer in layers_of(lm):
        name_of = {m: name for name, m in layer.named_modules() if isinstance(m, LoRALinear)}
        order = [module for module in calls if module in name_of]
        attention = [module for module in order if "att" in name_of[module]]
        mlp = [module for module in order if "att" not in name_of[module]]
        each_called_once = len(order) == len(name_of) == len(set(order))
        only_matrices = all(p.dim() <= 2 for p in layer.parameters())
        if not (each_called_once and only_matrices and attention and mlp):
            die(
                f"the {lm.config.model_type} language model has layers that are not attention and "
                "MLP of linear layers alone: traces within an answer and repairs do not know them"
            )
        pairs.append((attention[-1], mlp[-1]))
    return pairs


# -------------------------------------------------------------------------------------------------
# pretrained parts: where they are and how they are read


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


def read_config(path):
    """The configuration of a pretrained part. Raises ValueError where a folder does not exist, or
    where its weights are not plainly those of a model: an adapter, or quantised."""
    path = where(path)
    # OWNER/NAME may be a hub id, which an offline machine would ask for again and again
    if "/" in path and Path(path).parent.is_dir() and not Path(path).exists():
        raise ValueError(f"there is no folder {path}")
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


# weights that this program never uses, so that a checkpoint may lack them: SpecAugment's vector,
# which fine-tuned checkpoints are published without, and Whisper's decoder
UNUSED = re.compile(r"(^|\.)masked_spec_embed$|^decoder\.")


def load_part(auto, path, config, **kwargs):
    """A pretrained model of one of transformers' auto classes, with its `read_config`; the same in
    every process: weights that the checkpoint lacks raise ValueError, or, if UNUSED, are zero.
    Where torch's default device is "meta" (a dry run) it has shapes only, and the folder needs no
    weights."""
    if torch.get_default_device().type == "meta":
        return auto.from_config(config, **kwargs)
    net, info = auto.from_pretrained(
        where(path),
        config=config,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kwargs,
    )
    lacking = sorted(name for name in info["missing_keys"] if not UNUSED.search(name))
    for name, shape_there, shape in sorted(info["mismatched_keys"]):
        lacking.append(f"{name} {tuple(shape)} (it has {tuple(shape_there)})")
    unknown = sorted(info["unexpected_keys"])
    if lacking:
        others = f"; it has {len(unknown)} others, such as {unknown[0]}" if unknown else ""
        raise ValueError(
            f"it lacks {len(lacking)} of the {len(net.state_dict())} weights of its "
            f"{config.model_type} model, such as {', '.join(lacking[:3])}{others}"
        )
    if any("lora_" in name for name in unknown):
        raise ValueError("it holds LoRA weights beside the model's: merge them and save that")
    for name in info["missing_keys"]:
        net.get_parameter_or_buffer(name).data.zero_()
    return net


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
    kept = {}
    for name, value in settings.items():
        if not NOT_COMPUTED.search(name):
            kept[name] = computed(value) if isinstance(value, dict) else value
    return json.loads(json.dumps(kept, default=str))


def digest(state):
    """SHA-256 of a state dict: names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


# -------------------------------------------------------------------------------------------------
# pretrained parts: whether they can be used as the SLM does

OTHER_LAYOUT = (
    "its {} encoder is not laid out as wav2vec 2.0, HuBERT or WavLM: take one of these, or Whisper"
)


def close(x, y):
    """Whether two tensors agree but for rounding."""
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-3 * (1 + y.abs().max()))


def check_extractor(extractor, config):
    """Raises ValueError unless a checkpoint's feature extractor makes what its encoder takes."""
    rate = getattr(extractor, "sampling_rate", None)
    if rate != SAMPLE_RATE:
        raise ValueError(
            f"its feature extractor takes audio of {rate} Hz, and this program works at "
            f"{SAMPLE_RATE} Hz: take an encoder for that rate"
        )
    second = np.zeros(SAMPLE_RATE, np.float32)
    with torch.device("cpu"):  # also in a dry run
        features = extract(extractor, second)
        again = extract(extractor, second)
    if not torch.equal(features, again):
        raise ValueError(
            "its feature extractor (preprocessor_config.json) draws at random: set its dither to 0"
        )
    shape = tuple(features.shape)
    if config.model_type == "whisper":
        fits = len(shape) == 2 and shape[0] == config.num_mel_bins
        taken = f"{config.num_mel_bins} mel bands"
        frames_taken = 2 * config.max_source_positions
    else:
        fits = shape == (SAMPLE_RATE,)
        taken = f"{SAMPLE_RATE} samples"
        frames_taken = math.inf
    if not fits:
        raise ValueError(
            f"its feature extractor (preprocessor_config.json) makes {shape} of a second of "
            f"audio, and its encoder (config.json) takes {taken}: take the "
            f"{config.model_type} model's own"
        )
    frames = getattr(extractor, "nb_max_frames", 0)
    if frames > frames_taken:
        raise ValueError(
            f"its feature extractor (preprocessor_config.json) makes up to {frames} frames, and "
            f"its encoder (config.json) takes {frames_taken}: take the model's own"
        )


@torch.no_grad()
def check_frames(encoder, config):
    """Raises ValueError unless the frames of two utterances in a batch are those of transformers'
    own forward pass: an encoder of another layout might pass through here as something else."""
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE // 2).astype(np.float32)
    features = [encoder.extract(0.1 * noise), encoder.extract(0.1 * noise[: SAMPLE_RATE // 4])]
    same = []
    try:
        x, mask = encoder(features)
        for i, waveform in enumerate(features):
            alone = encoder.net(waveform[None]).last_hidden_state[0]
            same.append(int(mask[i].sum()) == len(alone) and close(x[i, : len(alone)], alone))
    except Exception:  # it has other modules, and each fails in its own way
        same.append(False)
    if not all(same):
        raise ValueError(OTHER_LAYOUT.format(config.model_type))


def fit_tokenizer(tokenizer, lm):
    """Gives a tokenizer without an end-of-sequence token the LM's. Raises ValueError where there is
    none, where answers do not survive it, or where the LM has no embedding for a token that prompts
    or answers may hold."""
    if tokenizer.eos_token_id is None:
        end = lm.generation_config.eos_token_id
        if end is None:
            end = lm.config.get_text_config().eos_token_id
        end = end[0] if isinstance(end, list) else end
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
    check_embeddings(tokenizer, lm)


def check_embeddings(tokenizer, lm):
    """Raises ValueError where the LM has no embedding for a token that prompts or answers may hold.
    Added tokens that a prompt does not hold may lack one."""
    embeddings = lm.get_input_embeddings().weight.shape[0]
    before, after = data.prompt(tokenizer, list(LABELS))
    added = set(tokenizer.get_added_vocab().values())
    used = set(tokenizer.get_vocab().values()) - added
    unknown = tokenizer("\u6f22 \U0001f9ff", add_special_tokens=False).input_ids  # rare characters
    used |= {tokenizer.eos_token_id, *before, *after, *unknown}
    beyond = sorted(token_id for token_id in used if token_id >= embeddings)
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise ValueError(
            f"its tokenizer uses {len(beyond)} tokens that the model's {embeddings} embeddings "
            f"lack, such as {token!r} ({beyond[0]}): take the model's own tokenizer, or resize its "
            "embeddings"
        )


@torch.no_grad()
def check_lm(lm, ids):
    """Raises ValueError unless an LM can be used as the SLM does: with embeddings in the place of
    tokens, logits at chosen positions, later tokens without a say in earlier ones, and rows of a
    batch that begin at different positions. ids: those of a few tokens."""
    kind = lm.config.model_type
    embed = lm.get_input_embeddings()
    rows = [torch.tensor(ids), torch.tensor(ids[len(ids) // 2 :])]
    alone = [lm(input_ids=row[None], use_cache=False).logits[0] for row in rows]

    lengths = torch.tensor([len(row) for row in rows])
    x = pad_sequence([embed(row) for row in rows], batch_first=True)
    last_two = length_mask(lengths, x.shape[1]) & ~length_mask(lengths - 2, x.shape[1])
    chosen = lm(inputs_embeds=x, use_cache=False, logits_to_keep=last_two).logits
    if not close(chosen, torch.cat([logits[-2:] for logits in alone])):
        raise ValueError(
            f"its {kind} model gives other logits for embeddings, in a padded batch and at chosen "
            "positions, than for tokens"
        )

    beginning = lm(input_ids=rows[0][None, :-1], use_cache=False).logits[0]
    if not close(beginning, alone[0][:-1]):
        raise ValueError(f"its {kind} model looks at later tokens: it cannot write an answer")

    x, mask = pad_left([embed(row) for row in rows])
    one_token = GenerationConfig(
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    first = lm.generate(inputs_embeds=x, attention_mask=mask, generation_config=one_token)
    if not close(first.logits[0], torch.stack([logits[-1] for logits in alone])):
        raise ValueError(f"its {kind} model answers otherwise in a batch than alone")


# -------------------------------------------------------------------------------------------------
# checkpoints


def load_checkpoint(path, mmap=False):
    """A file of torch.save that holds tensors and plain values only. One that holds anything else,
    such as code, is refused in one line, and none of it runs."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        die(f"{path}: no such checkpoint; train that run first, or name another")
    except Exception:  # unpickling a file that is no checkpoint raises errors of many kinds
        die(
            f"{path} is no checkpoint of this program (only tensors and plain values are ever "
            "loaded): make it again or leave it out"
        )
    if not isinstance(saved, dict):
        die(f"{path} is no checkpoint of this program: it holds a {type(saved).__name__}")
    for state in saved.values():
        values = state.values() if isinstance(state, dict) else ()
        for value in values:
            if isinstance(value, torch.Tensor) and not is_held(value):
                die(
                    f"{path} is no checkpoint of this program: a tensor is sparse, quantised or "
                    "empty, or claims more memory than the file holds"
                )
    return saved


def is_held(tensor):
    """Whether a tensor from a file is an ordinary one that has a number in memory for each of its
    elements."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= max(1, tensor.untyped_storage().nbytes())


# -------------------------------------------------------------------------------------------------
# the SLM that a command asks for


@contextlib.contextmanager
def die_of_part(flag, path, doing=""):
    """A context in which whatever goes wrong ends the program in one line that names this part,
    and what was being done where the error does not say it for itself."""
    try:
        yield
    except Exception as error:  # a folder of another kind raises errors of many kinds
        kind = "" if isinstance(error, ValueError) else f"{doing}{type(error).__name__}: "
        die(f"cannot load --{flag} {path}: {kind}{first_line(error)}")


def load_lm(path):
    """A pretrained language model in float32, and its tokenizer. Raises ValueError where the folder
    holds something else."""
    config = read_config(path)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"it holds a {config.model_type} model, not a language model")
    tokenizer = AutoTokenizer.from_pretrained(where(path), trust_remote_code=False)
    lm = load_part(AutoModelForCausalLM, path, config, dtype=torch.float32)
    fit_tokenizer(tokenizer, lm)
    layers_of(lm)
    # a chat model's own settings sample; answers here are greedy
    lm.generation_config = GenerationConfig()
    return lm, tokenizer


def load_connector_weights(connector, path):
    """Puts a file's weights, in float32, into a connector. Exits with a one-line error where they
    do not fit."""
    try:
        weights = load_file(where(path))
        connector.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (OSError, RuntimeError, SafetensorError) as error:
        die(
            f"cannot load {path}: {first_line(error)}; --connector-weights none starts from "
            "random weights"
        )


def load_slm(args, device="cpu"):
    """The SLM that a command or a checkpoint asks for: pretrained encoder and LM, new connector and
    LoRA (decided by `args.seed`). `args` is a namespace with the settings of study.py, `encoder`,
    the parts' weights and `seed`."""
    device = torch.device(device)
    dry_run = device.type == "meta"  # shapes without weights
    with die_of_part("lm-weights", args.lm_weights):
        lm, tokenizer = load_lm(args.lm_weights)
    with die_of_part("encoder-weights", args.encoder_weights):
        share = ENCODERS[args.encoder]["trained"]
        encoder = Encoder(args.encoder_weights, args.train_layers, share)
    pretrained_sha256 = {}
    if not dry_run:
        pretrained_sha256["encoder"] = digest(encoder.net.state_dict())
        pretrained_sha256["lm"] = digest(lm.state_dict())

    torch.manual_seed(args.seed)
    lm_dim = lm.get_input_embeddings().weight.shape[1]
    connector = Connector(encoder.dim, lm_dim, args.connector_stride, args.connector_taper)
    if args.connector_weights not in (None, "none") and not dry_run:
        load_connector_weights(connector, args.connector_weights)
        pretrained_sha256["connector"] = digest(connector.state_dict())

    kind = lm.config.model_type
    doing = f"its {kind} model does not work with LoRA and embedded audio, "
    with die_of_part("lm-weights", args.lm_weights, doing):
        add_lora(lm, args.lora_rank, args.lora_alpha, args.lora_dropout)
        if not dry_run:
            check_lm(lm.eval(), data.prompt(tokenizer, list(LABELS))[0][-8:])
    if dry_run or getattr(args, "amp", None) == "bf16":
        for p in lm.parameters():  # the base never changes: cast once, not in every step
            p.data = p if p.requires_grad else p.to(torch.bfloat16)

    labels = getattr(args, "labels", None) or LABELS
    slm = SLM(encoder, connector, lm, tokenizer, labels).to(device)
    slm.pretrained_sha256 = pretrained_sha256
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
    """The receiver's weights, but with these layers (from 0) of one component from the donor."""
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
