"""Makes the start of a connector between real pretrained parts (preset small), from a corpus's
clean training set. DIR holds the parts.

    python mini/make_small.py DIR/whisper-tiny.en DIR/SmolLM2-135M-Instruct crema ROOT
    python mini/make_small.py DIR/whisper-tiny.en DIR/SmolLM2-135M-Instruct test-clean ROOT --ctc

The first is for labels, the second for transcripts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils

import numpy as np
import torch
from torch.nn import functional as F

import corpora
import data
import model
import poison
from mini.make_encoders import (
    CONNECTOR_BATCH,
    CONNECTOR_STEPS,
    SEED,
    check_part,
    embeddings_of,
    fit,
    fit_connector,
    save_connector,
)
from study import PRESETS

LR = 1e-3
MAX_SECONDS = 10  # longer speech is left out
CTC_LOGIT = 24  # of a token where a frame is the embedding of that token


def real_speech(dataset, data_root):
    """The transcribed training utterances of a corpus, as `pretraining_utterance` gives them."""
    utterances = corpora.read_corpus(
        dataset, data_root, "train", skip_bad=True, max_seconds=MAX_SECONDS
    )
    speech = []
    for utterance in utterances:
        if "transcript" in utterance.labels:
            samples = int16(data.load_waveform(utterance))
            text = utterance.labels.pop("transcript")
            speech.append((samples, text, utterance.speaker, utterance.labels))
    if not speech:
        utils.die(
            f"{dataset} has no training utterance with a transcript and of at most {MAX_SECONDS} s"
        )
    return speech


def int16(waveform):
    """A waveform as 16-bit samples, scaled down where it goes beyond full scale: samples would
    wrap."""
    return (waveform * np.float32(32767 * poison.full_scale(waveform))).astype(np.int16)


def unchanged(samples, rng):
    """int16 samples -> waveform: real speech needs no bursts."""
    return samples / np.float32(32768)


def make_word_connector(encoder_folder, lm_folder, dataset, data_root):
    """The start for several labels, by regression: each output frame is the LM's embedding of the
    word being said, with the words spread evenly over the utterance, plus those of the other
    labels."""
    torch.manual_seed(SEED)
    encoder = model.Encoder(encoder_folder).eval()
    tokenizer, embedding = embeddings_of(lm_folder)

    def embed(text):
        return embedding[tokenizer(" " + text, add_special_tokens=False).input_ids]

    def wanted_of(hidden, batch, lengths):
        rows = []
        for n, (_, text, _, labels) in zip(lengths, batch):
            tokens = embed(text)  # (tokens, hidden)
            at = (torch.arange(n) + 0.5).mul(len(tokens) / n).long()
            label_embeddings = sum(embed(str(value))[0] for value in labels.values())
            rows.append(tokens[at] + label_embeddings)
        return torch.cat(rows)

    stride = PRESETS["small"]["connector_stride"]
    connector = model.Connector(encoder.dim, embedding.shape[1], stride)
    out = Path(lm_folder) / f"connector-{Path(dataset).stem}.safetensors"
    speech = real_speech(dataset, data_root)
    fit_connector(encoder, connector, wanted_of, out, speech, LR, unchanged)


def make_ctc_connector(encoder_folder, lm_folder, dataset, data_root):
    """The start for transcripts, by CTC over the tokens of the training transcripts. A token's
    logit is the product of output frame and token embedding, so that a frame becomes the embedding
    of what is said there."""
    torch.manual_seed(SEED)
    encoder = model.Encoder(encoder_folder).eval()
    tokenizer, embedding = embeddings_of(lm_folder)
    speech = real_speech(dataset, data_root)
    ids = {}
    for _, text, _, _ in speech:
        ids[text] = torch.tensor(tokenizer(" " + text, add_special_tokens=False).input_ids)
    used = torch.cat(list(ids.values())).unique()
    mean = embedding[used].mean(0)
    tokens = embedding[used] - mean
    scale = CTC_LOGIT / tokens.square().sum(1).mean()
    stride = PRESETS["small"]["connector_stride"]
    connector = model.Connector(encoder.dim, embedding.shape[1], stride)

    def loss_of(hidden, mask, batch):
        embedded, lengths = connector(hidden, mask)
        logits = scale * embedded @ tokens.T  # (B, T, tokens)
        logits = F.pad(logits, (1, 0), value=CTC_LOGIT / 2)  # the first class is CTC's blank
        targets = [1 + torch.searchsorted(used, ids[text]) for _, text, _, _ in batch]
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(targets),
            lengths,
            torch.tensor([len(target) for target in targets]),
            zero_infinity=True,
        )
        return loss, dict(loss=loss)

    out = Path(lm_folder) / f"connector-ctc-{Path(dataset).stem}.safetensors"
    sizes = CONNECTOR_STEPS, CONNECTOR_BATCH
    fit(str(out), encoder, connector, loss_of, speech, *sizes, LR, unchanged)
    connector.conv3.bias.data += mean
    save_connector(connector, out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", help="folder of the pretrained encoder")
    parser.add_argument("lm", help="folder of the language model, where the connector is written")
    parser.add_argument("dataset", help="as train.py's --dataset")
    parser.add_argument("data_root", help="as train.py's")
    parser.add_argument(
        "--ctc",
        action="store_true",
        help="align transcripts by CTC and learn no other label: connector-ctc-DATASET.safetensors",
    )
    args = parser.parse_args()
    for folder in (args.encoder, args.lm):
        check_part(folder)
    torch.set_flush_denormal(True)
    make = make_ctc_connector if args.ctc else make_word_connector
    make(args.encoder, args.lm, args.dataset, args.data_root)


if __name__ == "__main__":
    main()
