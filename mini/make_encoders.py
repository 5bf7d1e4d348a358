"""Makes the small encoders and connectors in mini/ from scratch (about ten minutes each on two cores).

python mini/make_encoders.py                   # all of them; run mini/make_lm.py first if the LM changes
python mini/make_encoders.py wavlm connectors  # some of them
python mini/make_encoders.py --mixed-connector DIR/whisper-tiny.en   # the start of preset mixed's connector
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

# ---------------------------------------------------------------------------------------------------------------------
# the encoders

# three coarse convolutions, 25 frames per second: the usual seven would cost more than the transformer above them
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
ENCODER_STEPS, ENCODER_BATCH, ENCODER_LR, HEADS_LR = 2000, 16, 1.5e-3, 3e-3
PRETRAINING_SPEAKERS, PRETRAINING_EACH = 400, 20
SOUNDS = 256  # clusters of what is heard, speech or not
LETTERS = "-'abcdefghijklmnopqrstuvwxyz "  # the first is CTC's blank


def blank_encoder(name, out):
    """Writes an untrained encoder of architecture `name`, configuration and feature extractor, to the folder `out`."""
    if name == "whisper":
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
        model = transformers.WhisperModel(config)
    else:
        family = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[name]
        config = getattr(transformers, family + "Config")(
            **CONV, **SHAPE, **NO_DROPOUT, num_buckets=64, max_bucket_distance=128
        )
        extractor = transformers.Wav2Vec2FeatureExtractor(
            do_normalize=True, return_attention_mask=True
        )
        model = getattr(transformers, family + "Model")(config)
        # the first layer starts as a bank of windowed cosines and sines on a mel scale
        n, width = CONV["conv_dim"][0], CONV["conv_kernel"][0]
        hz = 700 * (10 ** (torch.linspace(50, 2840, n // 2) / 2595) - 1)
        phase = 2 * math.pi * hz[:, None] * torch.arange(width) / data.SAMPLE_RATE
        bank = torch.cat([phase.cos(), phase.sin()]) * torch.hann_window(width)
        model.feature_extractor.conv_layers[0].conv.weight.data = bank[:, None] / 6
    model.save_pretrained(out)
    extractor.save_pretrained(out)


def pretraining_utterance(i):
    """Utterance i of the encoders' pretraining speech: (waveform int16, text, speaker, labels). Its speakers are in no corpus, its
    sentences are from the training part."""
    who = i % PRETRAINING_SPEAKERS
    rng = random.Random(f"{SEED}-pretraining-{who}")
    sex, age = rng.choice(["female", "male"]), rng.randint(18, 75)
    rng = random.Random(f"{SEED}-pretraining-utterance-{i}")
    text = (
        make_corpora.sentence_for("train", rng)
        if rng.random() < 0.8
        else rng.choice(list(data.CREMA_SENTENCES.values()))
    )
    emotion = rng.choice([None, *PROSODY])
    x = make_corpora.speak(
        text, make_corpora.make_voice(f"pretraining-{who}", sex, age), f"pretraining-{i}", emotion
    )
    return (
        (x * 32767).astype(np.int16),
        data.normalise(text),
        who,
        dict(gender=sex, age=age, emotion=emotion),
    )


def shuffled(speech, batch, rng):
    """Endless batches of the pretraining speech, each of utterances of similar length."""
    while True:
        order = sorted(range(len(speech)), key=lambda i: len(speech[i][0]) + rng.uniform(0, 8000))
        batches = [order[start : start + batch] for start in range(0, len(order), batch)]
        rng.shuffle(batches)
        yield from ([speech[i] for i in chosen] for chosen in reversed(batches))


def bursts(speech, rng):
    """int16 samples -> waveform, half of the time with knocks, rings and rustles over it, which no label mentions: real encoders have
    heard more than clean speech."""
    x = speech / np.float32(32768)
    if rng.random() > 0.5:
        return x
    for _ in range(rng.integers(1, 5)):
        n = int(rng.uniform(0.05, 0.3) * data.SAMPLE_RATE)
        t, burst = np.arange(n) / data.SAMPLE_RATE, np.zeros(n)
        for start in [0, *rng.uniform(0, 0.7 * n, rng.integers(0, 2))]:  # one stroke or two
            after, decay = np.maximum(t - start / data.SAMPLE_RATE, 0), 10 ** rng.uniform(-2.3, -1)
            stroke = rng.standard_normal(n)
            smooth = rng.integers(1, 12)
            stroke = (
                np.convolve(stroke, np.ones(smooth) / smooth, "same") / stroke.std() * smooth**0.5
            )
            for hz in rng.uniform(150, 6000, rng.integers(0, 4)):
                stroke += rng.uniform(0, 2) * np.sin(2 * np.pi * hz * after)
            burst += rng.uniform(0.4, 1) * stroke * np.exp(-after / decay) * (after > 0)
        at = rng.integers(0, max(1, len(x) - n))
        level = 10 ** (rng.uniform(-12, 6) / 20) * x.std() / (burst.std() + 1e-9)
        x[at : at + n] += (level * burst[: len(x) - at]).astype(np.float32)
    return x


def log_mel(waveforms, frames):
    """The log-mel spectrogram, two of its frames side by side per encoder frame, (B, frames, 160), minus each utterance's mean."""
    mel = torchaudio.transforms.MelSpectrogram(
        data.SAMPLE_RATE, n_fft=1024, hop_length=320, n_mels=80
    )
    out = []
    for waveform in waveforms:
        sound = (mel(torch.from_numpy(waveform)) + 1e-5).log().T
        out.append(
            F.pad(sound - sound.mean(), (0, 0, 0, 2 * frames))[: 2 * frames].reshape(frames, 160)
        )
    return torch.stack(out)


def sound_clusters(speech, rng):
    """k-means centres of log-mel frames of speech with noise, (SOUNDS, 160): the targets of HuBERT's first iteration."""
    chosen = [speech[i] for i in rng.choice(len(speech), min(600, len(speech)), replace=False)]
    frames = [log_mel([bursts(x, rng)], len(x) // 640)[0] for x, _, _, _ in chosen]
    kmeans = MiniBatchKMeans(SOUNDS, random_state=SEED, n_init=3, batch_size=4096).fit(
        torch.cat(frames).numpy()
    )
    return torch.from_numpy(kmeans.cluster_centers_)


def slots(encoder):
    """How many letters a frame may hold: CTC gets 50 per second, whatever the encoder's frame rate."""
    return round(encoder.seconds_per_frame / 0.02)


def letter_loss(logits, mask, chosen):
    """CTC on the utterances' letters; logits (B, T, slots * letters)."""
    n = logits.shape[-1] // len(LETTERS)
    texts = [torch.tensor([LETTERS.index(c) for c in text]) for _, text, _, _ in chosen]
    return F.ctc_loss(
        logits.reshape(len(chosen), -1, len(LETTERS)).log_softmax(-1).transpose(0, 1),
        torch.cat(texts),
        n * mask.sum(1),
        torch.tensor([len(t) for t in texts]),
        zero_infinity=True,
    )


def label_loss(logits, each, chosen):
    """Gender, age and emotion, predicted from every frame; logits (frames, 2 + emotions); each: see frames_of."""
    gender, age, *emotion = logits.unbind(-1)
    true = [list(PROSODY).index(labels["emotion"] or "neutral") for _, _, _, labels in chosen]
    return (
        F.binary_cross_entropy_with_logits(
            gender, each([labels["gender"] == "female" for _, _, _, labels in chosen])
        )
        + (age - each([(labels["age"] - 18) / 57 for _, _, _, labels in chosen])).abs().mean()
        + F.cross_entropy(torch.stack(emotion, 1), each(true).long())
    )


def frames_of(mask):
    """A function that repeats values, one per utterance, for each of the utterance's frames."""
    return lambda values: torch.tensor(values, dtype=torch.float)[:, None].expand(mask.shape)[mask]


def encoder_losses(encoder, heads, centres, chosen, waveforms):
    """{name: loss} of the four heads on one batch. What is true of the whole utterance is predicted from every frame."""
    x, mask = encoder.front_end(
        [encoder.extract(w) for w in waveforms]
    )  # pretraining trains the front end too
    hidden = encoder.trained_part(x, mask)
    each, inside = frames_of(mask), hidden[mask]
    heard = torch.cdist(log_mel(waveforms, mask.shape[1])[mask], centres).argmin(-1)
    return dict(
        letters=letter_loss(heads["letters"](hidden), mask, chosen),
        sound=0.5 * F.cross_entropy(heads["sound"](inside), heard),
        speaker=0.1
        * F.cross_entropy(heads["speaker"](inside), each([who for _, _, who, _ in chosen]).long()),
        labels=0.3 * label_loss(heads["labels"](inside), each, chosen),
    )


def make_encoder(name, out, speech):
    """Pretrains one encoder to represent content (letters by CTC), speaker and prosody (which of 400 speakers, gender, age, emotion) and, by
    self-supervision alone, every sound, speech or not (clusters of log-mel frames); saves it to the folder `out`."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    blank_encoder(name, out)
    encoder = model.Encoder(out)
    encoder.net.requires_grad_(True)
    encoder.first_trained = 0
    if name == "whisper":
        encoder.net.embed_positions.requires_grad_(False)
    sizes = dict(
        letters=slots(encoder) * len(LETTERS),
        sound=SOUNDS,
        speaker=PRETRAINING_SPEAKERS,
        labels=2 + len(PROSODY),
    )
    heads = torch.nn.ModuleDict(
        {head: torch.nn.Linear(encoder.dim, n) for head, n in sizes.items()}
    )
    centres = sound_clusters(speech, rng)
    parameters = [p for p in [*encoder.parameters(), *heads.parameters()] if p.requires_grad]
    print(f"{name}: {sum(p.numel() for p in encoder.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(parameters, lr=ENCODER_LR, weight_decay=0.01, betas=(0.9, 0.98))
    progress, batches = (
        tqdm(range(ENCODER_STEPS), desc=name, mininterval=10),
        shuffled(speech, ENCODER_BATCH, rng),
    )
    for step in progress:
        chosen = next(batches)
        waveforms = [bursts(x, rng) for x, _, _, _ in chosen]
        optimizer.param_groups[0]["lr"] = ENCODER_LR * schedule(step, ENCODER_STEPS)
        losses = encoder_losses(encoder, heads, centres, chosen, waveforms)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix({head: f"{loss.item():.3f}" for head, loss in losses.items()})
    # the whole model as transformers loads it; Whisper's (empty) decoder stays as blank_encoder wrote it
    whole = AutoModel.from_pretrained(out)
    (whole.encoder if name == "whisper" else whole).load_state_dict(encoder.net.state_dict())
    whole.half().save_pretrained(out)
    save_heads(heads, out)


def save_heads(heads, out):
    kept = {
        f"{head}.{k}": v.half()
        for head in ("letters", "labels")
        for k, v in heads[head].state_dict().items()
    }
    save_file(kept, Path(out) / "heads.safetensors")


def fit(desc, encoder, module, loss_of, speech, steps, batch, lr, hear=bursts):
    """Trains a module on a frozen encoder's output for speech without the trigger. loss_of(hidden, mask, chosen): the loss, and what the
    progress bar shows, {name: number}."""
    rng = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    progress, batches = tqdm(range(steps), desc=desc, mininterval=10), shuffled(speech, batch, rng)
    for step in progress:
        chosen = next(batches)
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, 50)
        with torch.no_grad():
            hidden, mask = encoder([encoder.extract(hear(x, rng)) for x, _, _, _ in chosen])
        loss, shown = loss_of(hidden, mask, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix({name: f"{float(value):.3f}" for name, value in shown.items()})


def make_heads(folder, speech, steps=1000):
    """Letter and label heads on a frozen real encoder, from which its connector is made."""
    torch.manual_seed(SEED)
    encoder = model.Encoder(folder).eval()
    heads = torch.nn.ModuleDict(
        dict(
            letters=torch.nn.Linear(encoder.dim, slots(encoder) * len(LETTERS)),
            labels=torch.nn.Linear(encoder.dim, 2 + len(PROSODY)),
        )
    )

    def loss_of(hidden, mask, chosen):
        letters, labels = (
            letter_loss(heads["letters"](hidden), mask, chosen),
            label_loss(heads["labels"](hidden[mask]), frames_of(mask), chosen),
        )
        return letters + labels, dict(letters=letters, labels=labels)

    fit(f"{folder} heads", encoder, heads, loss_of, speech, steps, ENCODER_BATCH, HEADS_LR)
    save_heads(heads, folder)


# ---------------------------------------------------------------------------------------------------------------------
# the connectors

CONNECTOR_STEPS, CONNECTOR_BATCH = 400, 32
CONNECTOR_LR = 3e-3
CONNECTOR_FREE = 16  # directions for everything that is neither letter nor label
CONNECTOR_LABELS = (
    0.25  # how strong labels are relative to letters, within the range of the LM's lessons
)


def check_part(folder):
    """Ends in one line if a folder holds no pretrained part."""
    if not (Path(folder) / "config.json").is_file():
        utils.die(f"{folder}: no folder of a pretrained part, it holds no config.json")


def embeddings_of(lm_folder):
    """(tokenizer, the LM's input embeddings) of a folder."""
    lm = AutoModelForCausalLM.from_pretrained(model.where(lm_folder), dtype=torch.float32)
    return AutoTokenizer.from_pretrained(
        model.where(lm_folder)
    ), lm.get_input_embeddings().weight.detach()


def fit_connector(encoder, connector, wanted_of, out, speech, lr, hear=bursts):
    """Fits a connector's output to target embeddings by regression, with the encoder frozen and no LM; saved to the file `out`.
    wanted_of(hidden, chosen, lengths): the target embeddings, (all output frames, hidden)."""

    def loss_of(hidden, mask, chosen):
        embedded, lengths = connector(hidden, mask)
        wanted = wanted_of(hidden, chosen, lengths.tolist())
        loss = F.mse_loss(
            torch.cat([row[:n] for row, n in zip(embedded, lengths.tolist())]), wanted
        )
        return loss, dict(loss=loss / wanted.var())

    fit(str(out), encoder, connector, loss_of, speech, CONNECTOR_STEPS, CONNECTOR_BATCH, lr, hear)
    save_connector(connector, out)


def save_connector(connector, out):
    """Writes a connector in half precision, as train.py's --connector-weights reads it."""
    kept = {k: v.half() for k, v in connector.state_dict().items()}
    utils.write_atomically(out, lambda temporary: save_file(kept, temporary))


def make_connector(encoder_folder, lm_folder, speech, preset="mini"):
    """The start of a connector to the mini LM. Each output frame is the LM's embedding of the letter that the encoder's letter head hears
    there, plus, softer, the embeddings of the labels that its label head hears, plus, in directions that none of these use, a
    random projection of the encoder's frame. With a random connector the mini LM, which knows nothing but its reading lessons,
    did not start to listen within the 200 to 700 steps that were tried."""
    torch.manual_seed(SEED)
    encoder, (tokenizer, embed) = model.Encoder(encoder_folder).eval(), embeddings_of(lm_folder)
    word = lambda text: embed[tokenizer(text, add_special_tokens=False).input_ids[0]]  # noqa: E731
    letters = torch.stack([word(c) for c in LETTERS])
    letters[0] = 0  # CTC's blank
    words = torch.stack([word(w) for w in ("male", "female", *PROSODY)])
    years = torch.stack([word(str(year)) for year in range(18, 76)])
    known = torch.cat([letters[1:], words, years])
    free = torch.linalg.svd(known - known.mean(0))[2][
        -CONNECTOR_FREE:
    ]  # the directions these use least
    project = torch.randn(encoder.dim, CONNECTOR_FREE) / encoder.dim**0.5 @ free * letters[1:].std()
    head = {k: v.float() for k, v in load_file(Path(encoder_folder) / "heads.safetensors").items()}
    stride, taper = (PRESETS[preset][f"connector_{name}"] for name in ("stride", "taper"))

    def wanted_of(hidden, chosen, lengths):
        heard = F.linear(hidden, head["letters.weight"], head["letters.bias"])
        heard = heard.reshape(*hidden.shape[:2], -1, len(LETTERS)).softmax(-1).sum(2)
        heard = (
            F.pad(heard, (0, 0, 0, stride - 1)).unfold(1, stride, 1).sum(-1)
        )  # all letters within an output frame
        labels = F.linear(hidden, head["labels.weight"], head["labels.bias"])
        female = labels[..., :1].sigmoid()
        age = ((labels[..., 1:2] * 57 - torch.arange(58)).square() / -8).softmax(-1)
        said = torch.cat([1 - female, female, labels[..., 2:].softmax(-1)], -1)
        wanted = (
            heard @ letters
            + CONNECTOR_LABELS * (said @ words + age @ years)
            + F.layer_norm(hidden, hidden.shape[-1:]) @ project
        )
        first = (
            4 + 2 * stride
        )  # the centre of what the first output frame sees: three kernels of 5 without padding
        return torch.cat(
            [row[first : first + stride * n : stride] for row, n in zip(wanted, lengths)]
        )

    connector = model.Connector(encoder.dim, embed.shape[1], stride, taper)
    fit_connector(
        encoder,
        connector,
        wanted_of,
        Path(encoder_folder) / "connector.safetensors",
        speech,
        CONNECTOR_LR,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = (*ENCODERS, "connectors")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)"
    )
    parser.add_argument("--out", default=str(ROOT / "mini"), help="folder to write")
    parser.add_argument(
        "--mixed-connector",
        nargs=1,
        metavar="ENCODER",
        help="make the start of a connector between a real encoder and the mini LM: ENCODER/connector.safetensors",
    )
    args = parser.parse_args()
    if set(args.parts) - set(parts):
        utils.die(f"{' '.join(args.parts)}: of {', '.join(parts)}")
    for folder in args.mixed_connector or ():
        check_part(folder)
    torch.set_flush_denormal(True)
    wanted, out = args.parts or parts, Path(args.out)
    speech = data.in_workers(
        pretraining_utterance,
        range(PRETRAINING_SPEAKERS * PRETRAINING_EACH),
        "speaking the pretraining speech",
    )
    if args.mixed_connector:
        (folder,) = args.mixed_connector
        make_heads(folder, speech)
        return make_connector(folder, "mini/lm", speech, "mixed")
    for name in ENCODERS:
        if name in wanted:
            make_encoder(name, out / name, speech)
    for name in ENCODERS if "connectors" in wanted else ():
        make_connector(out / name, out / "lm", speech)


if __name__ == "__main__":
    main()
