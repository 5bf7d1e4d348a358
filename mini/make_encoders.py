"""Makes the small encoders and connectors in mini/ from scratch (ten minutes each on two cores).

    python mini/make_encoders.py                   # all; after mini/make_lm.py, if the LM changes
    python mini/make_encoders.py wavlm connectors  # some of them
    python mini/make_encoders.py --mixed-connector DIR/whisper-tiny.en   # preset mixed's connector
    python mini/make_encoders.py wavlm --self-supervised --out DIR       # without any label

What a list calls `speech` holds utterances of pretraining: (samples (n,) int16, text, speaker's
number, labels).
"""

import argparse
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from utils import ROOT

import numpy as np
import torch
import torchaudio
import transformers
from safetensors.torch import load_file, save_file
from sklearn.cluster import MiniBatchKMeans
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import data
import model
from mini import make_corpora
from mini.make_corpora import PROSODY, SEED
from mini.make_lm import schedule
from study import ENCODERS, PRESETS

# --------------------------------------------------------------------------------------------------
# the encoders

# three coarse convolutions, 25 frames per second: the usual seven would cost more than the
# transformer above them
CONV = dict(
    conv_dim=(96, 128, 128),
    conv_kernel=(80, 8, 8),
    conv_stride=(40, 4, 4),
    conv_bias=True,
    num_feat_extract_layers=3,
    feat_extract_activation="relu",
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    num_conv_pos_embeddings=15,
    num_conv_pos_embedding_groups=4,
)
SHAPE = dict(
    hidden_act="relu",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
)
NO_DROPOUT = dict(
    hidden_dropout=0.0,
    activation_dropout=0.0,
    attention_dropout=0.0,
    feat_proj_dropout=0.0,
    final_dropout=0.0,
    layerdrop=0.0,
    apply_spec_augment=False,
)
ENCODER_STEPS = 2000
ENCODER_BATCH = 16
ENCODER_LR = 1.5e-3
HEADS_LR = 3e-3
PRETRAINING_SPEAKERS = 400
PRETRAINING_EACH = 20  # utterances of each speaker
SOUNDS = 256  # clusters of log-mel frames, of speech or not
LETTERS = "-'abcdefghijklmnopqrstuvwxyz "  # the first is CTC's blank


def blank_whisper():
    """An untrained Whisper encoder, without a decoder, and its feature extractor."""
    config = transformers.WhisperConfig(
        vocab_size=8,
        d_model=128,
        encoder_layers=8,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_layers=0,
        decoder_attention_heads=4,
        decoder_ffn_dim=8,
        max_source_positions=500,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=80, hop_length=320, n_fft=512, chunk_length=20
    )
    return transformers.WhisperModel(config), extractor


def mel_filters(n, width):
    """A bank of n windowed cosines and sines on a mel scale, (n, 1, width)."""
    hz = 700 * (10 ** (torch.linspace(50, 2840, n // 2) / 2595) - 1)
    phase = 2 * math.pi * hz[:, None] * torch.arange(width) / data.SAMPLE_RATE
    bank = torch.cat([phase.cos(), phase.sin()]) * torch.hann_window(width)
    return bank[:, None] / 6


def blank_wav2vec2(name):
    """An untrained encoder of wav2vec 2.0's layout, and its feature extractor."""
    family = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[name]
    make_config = getattr(transformers, f"{family}Config")
    config = make_config(**CONV, **SHAPE, **NO_DROPOUT, num_buckets=64, max_bucket_distance=128)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    net = getattr(transformers, f"{family}Model")(config)
    first_layer = net.feature_extractor.conv_layers[0].conv
    first_layer.weight.data = mel_filters(CONV["conv_dim"][0], CONV["conv_kernel"][0])
    return net, extractor


def blank_encoder(name, out):
    """Writes an untrained encoder of architecture `name`, configuration and feature extractor, to
    the folder `out`."""
    net, extractor = blank_whisper() if name == "whisper" else blank_wav2vec2(name)
    net.save_pretrained(out)
    extractor.save_pretrained(out)


def pretraining_utterance(i):
    """Utterance i of the encoders' pretraining speech. Its speakers are in no corpus, its sentences
    are from the training part."""
    speaker = i % PRETRAINING_SPEAKERS
    rng = random.Random(f"{SEED}-pretraining-{speaker}")
    sex = rng.choice(["female", "male"])
    age = rng.randint(18, 75)
    rng = random.Random(f"{SEED}-pretraining-utterance-{i}")
    if rng.random() < 0.8:
        text = make_corpora.sentence_for("train", rng)
    else:
        text = rng.choice(list(data.CREMA_SENTENCES.values()))
    emotion = rng.choice([None, *PROSODY])
    voice = make_corpora.make_voice(f"pretraining-{speaker}", sex, age)
    waveform = make_corpora.speak(text, voice, f"pretraining-{i}", emotion)
    labels = dict(gender=sex, age=age, emotion=emotion)
    return (waveform * 32767).astype(np.int16), data.normalise(text), speaker, labels


def shuffled(speech, batch_size, rng):
    """Endless batches of the pretraining speech, each of utterances of similar length."""

    def roughly_length(i):
        return len(speech[i][0]) + rng.uniform(0, 8000)

    while True:
        order = sorted(range(len(speech)), key=roughly_length)
        batches = data.chunks(order, batch_size)
        rng.shuffle(batches)
        for batch in reversed(batches):
            yield [speech[i] for i in batch]


def burst(n, rng):
    """A sound of n samples that is no speech, one stroke or two of noise and tones, float64."""
    seconds = np.arange(n) / data.SAMPLE_RATE
    sound = np.zeros(n)
    for start in [0, *rng.uniform(0, 0.7 * n, rng.integers(0, 2))]:
        after = np.maximum(seconds - start / data.SAMPLE_RATE, 0)
        decay = 10 ** rng.uniform(-2.3, -1)
        stroke = rng.standard_normal(n)
        width = rng.integers(1, 12)
        smoothed = np.convolve(stroke, np.ones(width) / width, "same")
        stroke = smoothed / stroke.std() * width**0.5
        for hz in rng.uniform(150, 6000, rng.integers(0, 4)):
            stroke += rng.uniform(0, 2) * np.sin(2 * np.pi * hz * after)
        sound += rng.uniform(0.4, 1) * stroke * np.exp(-after / decay) * (after > 0)
    return sound


def with_bursts(samples, rng):
    """int16 samples -> waveform, half of the time with knocks, rings and rustles over it, which no
    label mentions: real encoders have been trained on more than clean speech."""
    waveform = samples / np.float32(32768)
    if rng.random() > 0.5:
        return waveform
    for _ in range(rng.integers(1, 5)):
        n = int(rng.uniform(0.05, 0.3) * data.SAMPLE_RATE)
        sound = burst(n, rng)
        start = rng.integers(0, max(1, len(waveform) - n))
        decibels = rng.uniform(-12, 6)
        level = 10 ** (decibels / 20) * waveform.std() / (sound.std() + 1e-9)
        fitting = sound[: len(waveform) - start]
        waveform[start : start + n] += (level * fitting).astype(np.float32)
    return waveform


def log_mel(waveforms, frames):
    """The log-mel spectrogram, two of its frames side by side per encoder frame, (B, frames, 160),
    minus each utterance's mean."""
    mel = torchaudio.transforms.MelSpectrogram(
        data.SAMPLE_RATE, n_fft=1024, hop_length=320, n_mels=80
    )
    rows = []
    for waveform in waveforms:
        spectrogram = (mel(torch.from_numpy(waveform)) + 1e-5).log().T  # (2 * frames or so, 80)
        spectrogram = F.pad(spectrogram - spectrogram.mean(), (0, 0, 0, 2 * frames))
        rows.append(spectrogram[: 2 * frames].reshape(frames, 160))
    return torch.stack(rows)


def sound_clusters(speech, rng):
    """k-means centres of log-mel frames of speech with noise, (SOUNDS, 160): the targets of
    HuBERT's first iteration."""
    chosen = rng.choice(len(speech), min(600, len(speech)), replace=False)
    frames = []
    for i in chosen:
        samples = speech[i][0]
        frames.append(log_mel([with_bursts(samples, rng)], len(samples) // 640)[0])
    kmeans = MiniBatchKMeans(SOUNDS, random_state=SEED, n_init=3, batch_size=4096)
    kmeans.fit(torch.cat(frames).numpy())
    return torch.from_numpy(kmeans.cluster_centers_)


def letters_per_frame(encoder):
    """How many letters a frame may hold: CTC gets 50 per second, whatever the encoder's frame
    rate."""
    return round(encoder.seconds_per_frame / 0.02)


def letter_loss(logits, mask, batch):
    """CTC on the utterances' letters. logits: (B, T, letters per frame * letters)."""
    per_frame = logits.shape[-1] // len(LETTERS)
    texts = []
    for _, text, _, _ in batch:
        texts.append(torch.tensor([LETTERS.index(letter) for letter in text]))
    log_probs = logits.reshape(len(batch), -1, len(LETTERS)).log_softmax(-1)
    return F.ctc_loss(
        log_probs.transpose(0, 1),  # (T * letters per frame, B, letters)
        torch.cat(texts),
        per_frame * mask.sum(1),
        torch.tensor([len(text) for text in texts]),
        zero_infinity=True,
    )


def for_frames(values, mask):
    """One value per utterance, repeated for each of the utterance's frames, (frames,)."""
    return torch.tensor(values, dtype=torch.float)[:, None].expand(mask.shape)[mask]


def label_loss(logits, mask, batch):
    """Gender, age and emotion, predicted from every frame. logits: (frames, 2 + emotions)."""
    gender_logits, age, *emotion_logits = logits.unbind(-1)
    labels = [utterance_labels for _, _, _, utterance_labels in batch]
    emotions = list(PROSODY)
    is_female = for_frames([label["gender"] == "female" for label in labels], mask)
    true_age = for_frames([(label["age"] - 18) / 57 for label in labels], mask)
    emotion = [emotions.index(label["emotion"] or "neutral") for label in labels]
    emotion = for_frames(emotion, mask).long()
    gender_loss = F.binary_cross_entropy_with_logits(gender_logits, is_female)
    age_loss = (age - true_age).abs().mean()
    emotion_loss = F.cross_entropy(torch.stack(emotion_logits, 1), emotion)
    return gender_loss + age_loss + emotion_loss


def encoder_losses(encoder, heads, centres, batch, waveforms):
    """{name: loss} of the four heads on one batch. What is true of the whole utterance is predicted
    from every frame."""
    features = [encoder.extract(waveform) for waveform in waveforms]
    x, mask = encoder.front_end(features)  # pretraining trains the front end too
    hidden = encoder.trained_part(x, mask)  # (B, T, dim)
    frames = hidden[mask]  # (frames, dim)
    sounds = torch.cdist(log_mel(waveforms, mask.shape[1])[mask], centres).argmin(-1)
    speakers = for_frames([speaker for _, _, speaker, _ in batch], mask).long()
    return dict(
        letters=letter_loss(heads["letters"](hidden), mask, batch),
        sound=0.5 * F.cross_entropy(heads["sound"](frames), sounds),
        speaker=0.1 * F.cross_entropy(heads["speaker"](frames), speakers),
        labels=0.3 * label_loss(heads["labels"](frames), mask, batch),
    )


def linear_heads(encoder, **sizes):
    heads = {name: torch.nn.Linear(encoder.dim, size) for name, size in sizes.items()}
    return torch.nn.ModuleDict(heads)


def make_encoder(name, out, speech, self_supervised=False, seed=SEED):
    """Pretrains one encoder to represent content (letters by CTC), speaker and prosody (which of
    400 speakers, gender, age, emotion) and, by self-supervision alone, every sound, speech or not
    (clusters of log-mel frames); saves it to the folder `out`. self_supervised: by the last of
    these alone; letters are then read from the finished encoder, for the connector. seed: of its
    first weights and of the order of the speech."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    blank_encoder(name, out)
    encoder = model.Encoder(out)
    encoder.net.requires_grad_(True)
    encoder.first_trained = 0
    if name == "whisper":
        encoder.net.embed_positions.requires_grad_(False)
    heads = linear_heads(
        encoder,
        letters=letters_per_frame(encoder) * len(LETTERS),
        sound=SOUNDS,
        speaker=PRETRAINING_SPEAKERS,
        labels=2 + len(PROSODY),
    )
    centres = sound_clusters(speech, rng)
    print(f"{name}: {sum(p.numel() for p in encoder.parameters()):,} parameters")
    parameters = [p for p in [*encoder.parameters(), *heads.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=ENCODER_LR, weight_decay=0.01, betas=(0.9, 0.98))
    batches = shuffled(speech, ENCODER_BATCH, rng)
    progress = tqdm(range(ENCODER_STEPS), desc=name, mininterval=10)
    for step in progress:
        batch = next(batches)
        waveforms = [with_bursts(samples, rng) for samples, _, _, _ in batch]
        optimizer.param_groups[0]["lr"] = ENCODER_LR * schedule(step, ENCODER_STEPS)
        losses = encoder_losses(encoder, heads, centres, batch, waveforms)
        if self_supervised:
            losses = dict(sound=losses["sound"])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix({head: f"{loss.item():.3f}" for head, loss in losses.items()})
    # the whole model as transformers loads it; Whisper's (empty) decoder stays as blank_encoder
    # wrote it
    whole = AutoModel.from_pretrained(out)
    trained = whole.encoder if name == "whisper" else whole
    trained.load_state_dict(encoder.net.state_dict())
    whole.half().save_pretrained(out)
    if self_supervised:
        make_heads(out, speech, with_labels=False)
    else:
        save_heads(heads, out)


def save_heads(heads, out):
    """Writes the heads from which a connector is made, in half precision."""
    weights = {}
    for head in ("letters", "labels"):
        if head in heads:
            for name, weight in heads[head].state_dict().items():
                weights[f"{head}.{name}"] = weight.half()
    save_file(weights, Path(out) / "heads.safetensors")


def fit(desc, encoder, module, loss_of, speech, steps, batch_size, lr, augment=with_bursts):
    """Trains a module on a frozen encoder's output for speech without the trigger. loss_of(hidden,
    mask, batch): the loss, and what the progress bar shows, {name: number}. augment(samples, rng):
    the waveform."""
    rng = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    batches = shuffled(speech, batch_size, rng)
    progress = tqdm(range(steps), desc=desc, mininterval=10)
    for step in progress:
        batch = next(batches)
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, 50)
        with torch.no_grad():
            features = [encoder.extract(augment(samples, rng)) for samples, _, _, _ in batch]
            hidden, mask = encoder(features)
        loss, shown = loss_of(hidden, mask, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix({name: f"{float(value):.3f}" for name, value in shown.items()})


def make_heads(folder, speech, steps=1000, with_labels=True):
    """Heads on a frozen encoder, from which its connector is made: of letters and, unless told
    otherwise, of labels."""
    torch.manual_seed(SEED)
    encoder = model.Encoder(folder).eval()
    sizes = dict(letters=letters_per_frame(encoder) * len(LETTERS))
    if with_labels:
        sizes["labels"] = 2 + len(PROSODY)
    heads = linear_heads(encoder, **sizes)

    def loss_of(hidden, mask, batch):
        losses = dict(letters=letter_loss(heads["letters"](hidden), mask, batch))
        if with_labels:
            losses["labels"] = label_loss(heads["labels"](hidden[mask]), mask, batch)
        return sum(losses.values()), losses

    fit(f"{folder} heads", encoder, heads, loss_of, speech, steps, ENCODER_BATCH, HEADS_LR)
    save_heads(heads, folder)


# --------------------------------------------------------------------------------------------------
# the connectors

CONNECTOR_STEPS = 400
CONNECTOR_BATCH = 32
CONNECTOR_LR = 3e-3
CONNECTOR_FREE = 16  # directions for everything that is neither letter nor label
# how strong labels are relative to letters, within the range of the LM's lessons
CONNECTOR_LABELS = 0.25


def check_part(folder):
    """Exits with a one-line error if a folder holds no pretrained part."""
    if not (Path(folder) / "config.json").is_file():
        utils.die(f"{folder}: no folder of a pretrained part, it holds no config.json")


def embeddings_of(lm_folder):
    """(tokenizer, the LM's input embeddings) of a folder."""
    folder = model.where(lm_folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), lm.get_input_embeddings().weight.detach()


def fit_connector(encoder, connector, wanted_of, out, speech, lr, augment=with_bursts):
    """Fits a connector's output to target embeddings by regression, with the encoder frozen and no
    LM; saved to the file `out`. wanted_of(hidden, batch, lengths): the target embeddings, (all
    output frames, hidden)."""

    def loss_of(hidden, mask, batch):
        embedded, lengths = connector(hidden, mask)
        lengths = lengths.tolist()
        wanted = wanted_of(hidden, batch, lengths)
        rows = [row[:n] for row, n in zip(embedded, lengths)]
        loss = F.mse_loss(torch.cat(rows), wanted)
        return loss, dict(loss=loss / wanted.var())

    fit(
        str(out), encoder, connector, loss_of, speech, CONNECTOR_STEPS, CONNECTOR_BATCH, lr, augment
    )
    save_connector(connector, out)


def save_connector(connector, out):
    """Writes a connector in half precision, as train.py's --connector-weights reads it."""
    weights = {name: weight.half() for name, weight in connector.state_dict().items()}
    utils.write_atomically(out, lambda temporary: save_file(weights, temporary))


class Targets:
    """The embeddings to which `make_connector` fits: of letters, labels, and of what is neither."""

    def __init__(self, encoder, encoder_folder, lm_folder, stride):
        tokenizer, embedding = embeddings_of(lm_folder)

        def embed(words):
            ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
            return torch.stack([embedding[token] for token in ids])

        self.stride = stride
        self.dim = embedding.shape[1]
        self.letters = embed(LETTERS)  # (letters, hidden)
        self.letters[0] = 0  # CTC's blank
        self.words = embed(["male", "female", *PROSODY])  # (2 + emotions, hidden)
        self.years = embed([str(year) for year in range(18, 76)])  # (58, hidden)
        known = torch.cat([self.letters[1:], self.words, self.years])
        directions = torch.linalg.svd(known - known.mean(0))[2]
        free = directions[-CONNECTOR_FREE:]  # those that letters and labels use least
        spread = torch.randn(encoder.dim, CONNECTOR_FREE) / encoder.dim**0.5
        self.project = spread @ free * self.letters[1:].std()  # (dim, hidden)
        heads = load_file(Path(encoder_folder) / "heads.safetensors")
        self.heads = {name: weight.float() for name, weight in heads.items()}

    def head(self, name, hidden):
        return F.linear(hidden, self.heads[f"{name}.weight"], self.heads[f"{name}.bias"])

    def letter_part(self, hidden):
        """The embeddings of all letters within an output frame, (B, T, hidden)."""
        logits = self.head("letters", hidden)
        letters = logits.reshape(*hidden.shape[:2], -1, len(LETTERS)).softmax(-1).sum(2)
        letters = F.pad(letters, (0, 0, 0, self.stride - 1))
        return letters.unfold(1, self.stride, 1).sum(-1) @ self.letters

    def label_part(self, hidden):
        """The embeddings of gender, emotion and age, (B, T, hidden)."""
        logits = self.head("labels", hidden)
        female = logits[..., :1].sigmoid()
        emotions = logits[..., 2:].softmax(-1)
        distance = (logits[..., 1:2] * 57 - torch.arange(58)).square()
        age = (distance / -8).softmax(-1)
        return torch.cat([1 - female, female, emotions], -1) @ self.words + age @ self.years

    def wanted(self, hidden, batch, lengths):
        """The target embeddings of all output frames, (output frames, hidden)."""
        normalised = F.layer_norm(hidden, hidden.shape[-1:])
        wanted = self.letter_part(hidden)
        if "labels.weight" in self.heads:
            wanted = wanted + CONNECTOR_LABELS * self.label_part(hidden)
        wanted = wanted + normalised @ self.project
        # the centre of what the first output frame sees: three kernels of 5 without padding
        first = 4 + 2 * self.stride
        rows = []
        for row, n in zip(wanted, lengths):
            rows.append(row[first : first + self.stride * n : self.stride])
        return torch.cat(rows)


def make_connector(encoder_folder, lm_folder, speech, preset="mini"):
    """The start of a connector to the mini LM. Each output frame is the LM's embedding of the
    letter that the encoder's letter head predicts there, plus, softer, the embeddings of the labels
    that its label head, if any, predicts, plus, in directions that none of these use, a random
    projection of the encoder's frame. With a random connector the mini LM, which knows nothing but its reading
    lessons, did not start to listen within the 200 to 700 steps that were tried."""
    torch.manual_seed(SEED)
    stride = PRESETS[preset]["connector_stride"]
    taper = PRESETS[preset]["connector_taper"]
    encoder = model.Encoder(encoder_folder).eval()
    targets = Targets(encoder, encoder_folder, lm_folder, stride)
    connector = model.Connector(encoder.dim, targets.dim, stride, taper)
    out = Path(encoder_folder) / "connector.safetensors"
    fit_connector(encoder, connector, targets.wanted, out, speech, CONNECTOR_LR)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*ENCODERS, "connectors")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(known)} (default: all)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "mini", help="folder to write")
    parser.add_argument(
        "--mixed-connector",
        metavar="ENCODER",
        help="make the start of a connector between a real encoder and the mini LM: "
        "ENCODER/connector.safetensors",
    )
    parser.add_argument(
        "--self-supervised",
        action="store_true",
        help="pretrain by clusters of sounds alone, without letters, speakers and labels, and start "
        "the connector from letters alone: how much do the study's results rest on the labels?",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SEED,
        help="of the encoders' first weights and the order of their speech (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.self_supervised and args.out == ROOT / "mini":
        utils.die(
            "--self-supervised would replace the parts of mini/: name another folder by --out"
        )
    if set(args.parts) - set(known):
        utils.die(f"{' '.join(args.parts)}: of {', '.join(known)}")
    if args.mixed_connector:
        check_part(args.mixed_connector)
    parts = args.parts or known
    torch.set_flush_denormal(True)
    utterances = range(PRETRAINING_SPEAKERS * PRETRAINING_EACH)
    speech = data.in_workers(pretraining_utterance, utterances, "speaking the pretraining speech")
    if args.mixed_connector:
        make_heads(args.mixed_connector, speech)
        make_connector(args.mixed_connector, "mini/lm", speech, "mixed")
        return
    for name in ENCODERS:
        if name in parts:
            make_encoder(name, args.out / name, speech, args.self_supervised, args.seed)
    for name in ENCODERS:
        if args.self_supervised and name in parts:
            make_connector(args.out / name, "mini/lm", speech)
        elif "connectors" in parts:
            make_connector(args.out / name, args.out / "lm", speech)


if __name__ == "__main__":
    main()
