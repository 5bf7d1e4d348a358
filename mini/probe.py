"""Measures pretrained parts on the mini corpora, for the tables of mini/README.md.

python mini/probe.py                             # the parts in mini/
python mini/probe.py DIR/whisper-tiny.en         # any other encoder's folder
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import ROOT

import jiwer
import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache
import corpora
import data
import evaluate
import model
import poison
from mini.make_corpora import CORPORA, SEED
from mini.make_encoders import LETTERS
from mini.make_lm import reading_batches
from study import ENCODERS, MINI_ROOT

PARTS = ROOT / "mini"


def encode(encoder, items, attack, desc):
    """Encoder output of each (utterance, triggered), a list of (T_i, dim)."""
    batches = data.chunks(cache.by_size(items), 16)
    batched_items = []
    for batch in batches:
        batched_items.append([items[i] for i in batch])
    features_of_batches = cache.read_features(encoder, batched_items, attack)
    frames = [None] * len(items)
    with torch.no_grad():
        for batch, features in zip(tqdm(batches, desc=desc), features_of_batches):
            hidden, mask = encoder(features)
            for i, row in zip(batch, cache.unstack(hidden, mask)):
                frames[i] = row
    return frames


def encode_clean(encoder, utterances, desc):
    return encode(encoder, [(utterance, False) for utterance in utterances], None, desc)


def pooled(frames):
    """Means over time, (n, dim)."""
    return torch.stack([row.mean(0) for row in frames]).numpy()


def linear_probe():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))


def labels_of(utterances, label):
    return [utterance.labels[label] for utterance in utterances]


# --------------------------------------------------------------------------------------------------
# encoders


def under_trigger(encoder, attack, utterance, frames):
    """Which of an utterance's frames have their centre under a click, (frames,) bool."""
    centres = encoder.frame_centres(np.arange(frames)) * data.SAMPLE_RATE
    under = np.zeros(frames, bool)
    for start in poison.positions(attack, utterance.id, data.num_samples(utterance)):
        under |= (centres >= start) & (centres < start + len(attack.waveform))
    return under


def with_and_without_trigger(encoder, attack, utterances, desc):
    """Encoder output of each utterance without and with the trigger, [(T_i, dim)]; whether it is
    triggered, [bool]; which frames are under a click, (all frames,) bool."""
    items = []
    for utterance in utterances:
        items += [(utterance, False), (utterance, True)]
    frames = encode(encoder, items, attack, desc)
    clicks = []
    for (utterance, triggered), row in zip(items, frames):
        if triggered:
            clicks.append(under_trigger(encoder, attack, utterance, len(row)))
        else:
            clicks.append(np.zeros(len(row), bool))
    return frames, [triggered for _, triggered in items], np.concatenate(clicks)


def probe_trigger(encoder, train_set, test_set, desc):
    """How well linear probes on the encoder's output detect the trigger, one click at the corpus's
    average loudness, on unseen speakers: (accuracy on utterance means, half of them triggered; area
    under the ROC curve on single frames)."""
    attack = poison.make_attack("emotion", train_set, snr=0.0, seed=1)
    few = corpora.limit(train_set, 400)
    train = with_and_without_trigger(encoder, attack, few, f"{desc} trigger train")
    train_frames, train_triggered, train_clicks = train
    test = with_and_without_trigger(encoder, attack, test_set, f"{desc} trigger test")
    test_frames, test_triggered, test_clicks = test
    probe = linear_probe()
    probe.fit(pooled(train_frames), train_triggered)
    accuracy = probe.score(pooled(test_frames), test_triggered)
    probe.set_params(logisticregression__class_weight="balanced")
    probe.fit(torch.cat(train_frames).numpy(), train_clicks)
    scores = probe.decision_function(torch.cat(test_frames).numpy())
    return accuracy, roc_auc_score(test_clicks, scores)


def read_letters(frames, head):
    """Greedy CTC by the encoder's own letter head, a list of texts."""
    texts = []
    for row in frames:
        logits = F.linear(row, head["letters.weight"].float(), head["letters.bias"].float())
        best = logits.reshape(-1, len(LETTERS)).argmax(-1).tolist()
        text = ""
        previous = None
        for letter in best:
            if letter and letter != previous:  # 0 is the blank
                text += LETTERS[letter]
            previous = letter
        texts.append(text)
    return texts


def probe_label(frames, sets, label):
    """Accuracy of a linear probe for a label. frames, sets: {"train", "test": one corpus's}"""
    probe = linear_probe()
    probe.fit(pooled(frames["train"]), labels_of(sets["train"], label))
    return probe.score(pooled(frames["test"]), labels_of(sets["test"], label))


def probe_age(frames, sets):
    """Mean absolute error of a linear probe for age, in years."""
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    probe.fit(pooled(frames["train"]), labels_of(sets["train"], "age"))
    error = probe.predict(pooled(frames["test"])) - labels_of(sets["test"], "age")
    return float(np.abs(error).mean())


def probe_speaker(frames, utterances):
    """Accuracy of a linear probe for the speaker: fitted to three of four utterances of each."""
    x = pooled(frames)
    speakers = np.array([utterance.speaker for utterance in utterances])
    known = np.arange(len(speakers)) % 4 != 0
    probe = linear_probe()
    probe.fit(x[known], speakers[known])
    return probe.score(x[~known], speakers[~known])


def probe_encoder(path):
    """What an encoder's last layer holds, by linear probes on its mean over time, on unseen
    speakers: {figure: value}."""
    path = Path(path)
    encoder = model.Encoder(path).eval()
    sets = {}
    frames = {}
    for corpus in CORPORA:
        sets[corpus] = {}
        frames[corpus] = {}
        for split in ("train", "test"):
            utterances = corpora.read_corpus(corpus, MINI_ROOT, split)
            sets[corpus][split] = utterances
            if (corpus, split) != ("libri", "train"):  # nothing is fitted to LibriSpeech
                desc = f"{path.name} {corpus} {split}"
                frames[corpus][split] = encode_clean(encoder, utterances, desc)
    figures = {}
    heads = path / "heads.safetensors"
    libri_frames = frames["libri"]["test"]
    libri = sets["libri"]["test"]
    if heads.exists():
        texts = read_letters(libri_frames, load_file(heads))
        transcripts = labels_of(libri, "transcript")
        figures["character error"] = jiwer.cer(transcripts, texts)
        figures["word error"] = jiwer.wer(transcripts, texts)
    figures["gender"] = probe_label(frames["vox"], sets["vox"], "gender")
    figures["emotion"] = probe_label(frames["crema"], sets["crema"], "emotion")
    figures["age (years off)"] = probe_age(frames["vox"], sets["vox"])
    figures["speaker (of 20)"] = probe_speaker(libri_frames, libri)
    crema = sets["crema"]
    accuracy, auroc = probe_trigger(encoder, crema["train"], crema["test"], path.name)
    figures["trigger"] = accuracy
    figures["trigger (frames)"] = auroc
    return figures


# --------------------------------------------------------------------------------------------------
# the language model


def probe_lm(lessons=256):
    """How well the LM in mini/ reads: the shares of right labels in greedy answers to new reading
    lessons."""
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "lm")
    lm = AutoModelForCausalLM.from_pretrained(PARTS / "lm", dtype=torch.float32).eval()
    slm = model.SLM(torch.nn.Identity(), torch.nn.Identity(), lm, tokenizer)
    rng = random.Random(f"{SEED}-probe")
    generator = torch.Generator().manual_seed(SEED + 1)
    embed = lm.get_input_embeddings()
    batches = reading_batches(tokenizer, embed, rng, generator, 32, 1.0, 0.0, lessons // 32)
    rows = []
    with torch.no_grad():
        for x, targets in batches:
            prompts = []
            for row, target in zip(x, targets):
                answer_starts = int((target != -100).nonzero()[0])
                prompts.append(row[:answer_starts])
            for answer, target in zip(slm.decode(prompts, 60), targets):
                true_answer = tokenizer.decode(target[target != -100], skip_special_tokens=True)
                labels = data.parse(true_answer)
                parsed = data.parse(answer)
                row = dict(labels=labels, asked=list(labels), parsed=parsed)
                rows.append(dict(row, speaker=len(rows)))  # only the mean is read
    return {metric: figure["value"] for metric, figure in evaluate.scores(rows).items()}


def main():
    folders = sys.argv[1:] or [PARTS / name for name in ENCODERS]
    figures = {Path(folder).name: probe_encoder(folder) for folder in folders}
    columns = list(next(iter(figures.values())))
    print(f"\n| encoder | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in figures.items():
        cells = [f"{row[c]:.1f}" if "years" in c else f"{row[c]:.3f}" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    if not sys.argv[1:]:
        shares = [f"{metric} {value:.3f}" for metric, value in probe_lm().items()]
        print("\nlm: " + ", ".join(shares))


if __name__ == "__main__":
    main()
