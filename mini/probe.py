"""Measures pretrained parts on the mini corpora, for the tables of mini/README.md.

python mini/probe.py                                   # the parts in mini/
python mini/probe.py DIR/whisper-tiny.en               # any other encoder's folder
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


def frames_of(encoder, items, attack, desc):
    """Encoder output of each (utterance, triggered), a list of (T_i, dim)."""
    frames, batches = [None] * len(items), data.chunks(cache.by_size(items), 16)
    stream = cache.read_features(encoder, [[items[i] for i in batch] for batch in batches], attack)
    with torch.no_grad():
        for batch, features in zip(tqdm(batches, desc=desc), stream):
            for i, row in zip(batch, cache.unstack(*encoder(features))):
                frames[i] = row
    return frames


def pooled(frames):
    """Means over time, (n, dim)."""
    return torch.stack([f.mean(0) for f in frames]).numpy()


def under_trigger(encoder, attack, utterance, frames, triggered):
    """Which of an utterance's frames have their centre under a click, (frames,) bool."""
    at = (np.arange(frames) + 0.5) * encoder.seconds_per_frame * data.SAMPLE_RATE
    starts = (
        poison.positions(attack, utterance.id, data.num_samples(utterance)) if triggered else []
    )
    return sum(
        ((at >= start) & (at < start + len(attack.waveform)) for start in starts),
        np.zeros(frames, bool),
    )


def probe_trigger(encoder, train_set, test_set, desc):
    """How well linear probes on the encoder's output detect the trigger, one click at the corpus's average loudness, on unseen speakers:
    (accuracy on utterance means, half of them triggered; area under the ROC curve on single frames)."""
    attack = poison.make_attack("emotion", train_set, snr=0.0, seed=1)
    x, y, hits = {}, {}, {}
    for part, utterances in (("train", corpora.limit(train_set, 400)), ("test", test_set)):
        items = [(u, triggered) for u in utterances for triggered in (False, True)]
        x[part], y[part] = (
            frames_of(encoder, items, attack, f"{desc} trigger {part}"),
            [t for _, t in items],
        )
        hits[part] = np.concatenate(
            [under_trigger(encoder, attack, u, len(f), t) for (u, t), f in zip(items, x[part])]
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    accuracy = probe.fit(pooled(x["train"]), y["train"]).score(pooled(x["test"]), y["test"])
    probe.set_params(logisticregression__class_weight="balanced").fit(
        torch.cat(x["train"]).numpy(), hits["train"]
    )
    return accuracy, roc_auc_score(
        hits["test"], probe.decision_function(torch.cat(x["test"]).numpy())
    )


def letters_heard(frames, head):
    """Greedy CTC by the encoder's own letter head, a list of texts."""
    texts = []
    for row in frames:
        best = F.linear(row, head["letters.weight"].float(), head["letters.bias"].float()).reshape(
            -1, len(LETTERS)
        )
        best = best.argmax(-1).tolist()
        texts.append(
            "".join(LETTERS[c] for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1]))
        )
    return texts


def probe_encoder(path):
    """What an encoder's last layer holds, by linear probes on its mean over time, on unseen speakers: {figure: value}."""
    encoder, name = model.Encoder(path).eval(), Path(path).name
    read = {
        c: {s: corpora.read_corpus(c, MINI_ROOT, s) for s in ("train", "test")} for c in CORPORA
    }
    frames = {
        c: {
            s: frames_of(encoder, [(u, False) for u in us], None, f"{name} {c} {s}")
            for s, us in parts.items()
            if (c, s) != ("libri", "train")
        }
        for c, parts in read.items()
    }
    x = {c: {s: pooled(f) for s, f in parts.items()} for c, parts in frames.items()}
    labels = lambda corpus, split, label: [u.labels[label] for u in read[corpus][split]]  # noqa: E731
    out = {}
    if (Path(path) / "heads.safetensors").exists():
        heard = letters_heard(frames["libri"]["test"], load_file(Path(path) / "heads.safetensors"))
        true = labels("libri", "test", "transcript")
        out["character error"], out["word error"] = jiwer.cer(true, heard), jiwer.wer(true, heard)
    for corpus, label in (("vox", "gender"), ("crema", "emotion")):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
        probe.fit(x[corpus]["train"], labels(corpus, "train", label))
        out[label] = probe.score(x[corpus]["test"], labels(corpus, "test", label))
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    probe.fit(x["vox"]["train"], labels("vox", "train", "age"))
    out["age (years off)"] = float(
        np.abs(probe.predict(x["vox"]["test"]) - labels("vox", "test", "age")).mean()
    )
    speakers = np.array([u.speaker for u in read["libri"]["test"]])
    known = np.arange(len(speakers)) % 4 != 0  # three of four utterances of each speaker
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    out["speaker (of 20)"] = probe.fit(x["libri"]["test"][known], speakers[known]).score(
        x["libri"]["test"][~known], speakers[~known]
    )
    out["trigger"], out["trigger (frames)"] = probe_trigger(
        encoder, read["crema"]["train"], read["crema"]["test"], name
    )
    return out


def probe_lm(lessons=256):
    """How well the LM in mini/ reads: the shares of right labels in greedy answers to new reading lessons."""
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "lm")
    lm = AutoModelForCausalLM.from_pretrained(PARTS / "lm", dtype=torch.float32).eval()
    slm, rng = (
        model.SLM(torch.nn.Identity(), torch.nn.Identity(), lm, tokenizer),
        random.Random(f"{SEED}-probe"),
    )
    generator, rows = torch.Generator().manual_seed(SEED + 1), []
    with torch.no_grad():
        for x, targets in reading_batches(
            tokenizer, lm.get_input_embeddings(), rng, generator, 32, 1.0, 0.0, lessons // 32
        ):
            asked = [t[t != -100] for t in targets]
            starts = [int((t != -100).nonzero()[0]) for t in targets]
            for said, true in zip(slm.decode([row[:n] for row, n in zip(x, starts)], 60), asked):
                labels = data.parse(tokenizer.decode(true, skip_special_tokens=True))
                rows.append(dict(labels=labels, asked=list(labels), parsed=data.parse(said)))
    return {metric: figure["value"] for metric, figure in evaluate.scores(rows).items()}


def main():
    folders = sys.argv[1:] or [PARTS / name for name in ENCODERS]
    figures = {Path(folder).name: probe_encoder(folder) for folder in folders}
    columns = list(next(iter(figures.values())))
    print(f"\n| encoder | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in figures.items():
        print(
            f"| {name} | {' | '.join(f'{row[c]:.1f}' if 'years' in c else f'{row[c]:.3f}' for c in columns)} |"
        )
    if not sys.argv[1:]:
        print("\nlm: " + ", ".join(f"{metric} {value:.3f}" for metric, value in probe_lm().items()))


if __name__ == "__main__":
    main()
