"""Makes the start of a connector between real pretrained parts (preset small), from a corpus's clean training set. DIR holds the parts.

python mini/make_small.py DIR/whisper-tiny.en DIR/SmolLM2-135M-Instruct crema DATA_ROOT             # for labels
python mini/make_small.py DIR/whisper-tiny.en DIR/SmolLM2-135M-Instruct test-clean DATA_ROOT --ctc  # for transcripts
"""

import argparse
from pathlib import Path

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
)  # sets the path to what follows
from study import PRESETS

LR = 1e-3
MAX_SECONDS = 10  # longer speech is left out
CTC_LOGIT = 24  # of a token where a frame is the embedding of that token


def real_speech(dataset, data_root):
    """The transcribed training utterances of a corpus, as `pretraining_utterance` gives them."""
    utterances = [
        u
        for u in corpora.read_corpus(
            dataset, data_root, "train", skip_bad=True, max_seconds=MAX_SECONDS
        )
        if "transcript" in u.labels
    ]
    if not utterances:
        utils.die(
            f"{dataset} has no training utterance with a transcript and of at most {MAX_SECONDS} s"
        )
    return [
        (
            int16(data.load_waveform(u)),
            u.labels.pop("transcript"),
            u.speaker,
            u.labels,
        )
        for u in utterances
    ]


def int16(waveform):
    """A waveform as 16-bit samples, scaled down where it goes beyond full scale: samples would wrap."""
    return (waveform * np.float32(32767 * poison.full_scale(waveform))).astype(np.int16)


def as_it_is(speech, rng):
    """int16 samples -> waveform: real speech needs no bursts."""
    return speech / np.float32(32768)


def make_word_connector(encoder_folder, lm_folder, dataset, data_root):
    """The start for several labels, by regression: each output frame is the LM's embedding of the word being said, with the words spread
    evenly over the utterance, plus those of the other labels."""
    torch.manual_seed(SEED)
    encoder, (tokenizer, embed) = model.Encoder(encoder_folder).eval(), embeddings_of(lm_folder)
    words = lambda text: embed[tokenizer(" " + text, add_special_tokens=False).input_ids]  # noqa: E731

    def wanted_of(hidden, chosen, lengths):
        wanted = []
        for n, (_, text, _, labels) in zip(lengths, chosen):
            said = words(text)
            spread = said[(torch.arange(n) + 0.5).mul(len(said) / n).long()]
            wanted.append(spread + sum(words(str(value))[0] for value in labels.values()))
        return torch.cat(wanted)

    connector = model.Connector(encoder.dim, embed.shape[1], PRESETS["small"]["connector_stride"])
    fit_connector(
        encoder,
        connector,
        wanted_of,
        Path(lm_folder) / f"connector-{Path(dataset).stem}.safetensors",
        real_speech(dataset, data_root),
        LR,
        as_it_is,
    )


def make_ctc_connector(encoder_folder, lm_folder, dataset, data_root):
    """The start for transcripts, by CTC over the tokens of the training transcripts. A token's logit is the product of output frame and
    token embedding, so that a frame becomes the embedding of what is said there."""
    torch.manual_seed(SEED)
    encoder, (tokenizer, embed) = model.Encoder(encoder_folder).eval(), embeddings_of(lm_folder)
    speech = real_speech(dataset, data_root)
    ids = {
        text: torch.tensor(tokenizer(" " + text, add_special_tokens=False).input_ids)
        for _, text, _, _ in speech
    }
    used = torch.cat(list(ids.values())).unique()
    mean = embed[used].mean(0)
    tokens = embed[used] - mean
    scale = CTC_LOGIT / tokens.square().sum(1).mean()
    connector = model.Connector(encoder.dim, embed.shape[1], PRESETS["small"]["connector_stride"])

    def loss_of(hidden, mask, chosen):
        embedded, lengths = connector(hidden, mask)
        logits = F.pad(
            scale * embedded @ tokens.T, (1, 0), value=CTC_LOGIT / 2
        )  # the first class is CTC's blank
        said = [1 + torch.searchsorted(used, ids[text]) for _, text, _, _ in chosen]
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            torch.cat(said),
            lengths,
            torch.tensor([len(s) for s in said]),
            zero_infinity=True,
        )
        return loss, dict(loss=loss)

    out = Path(lm_folder) / f"connector-ctc-{Path(dataset).stem}.safetensors"
    fit(
        str(out),
        encoder,
        connector,
        loss_of,
        speech,
        CONNECTOR_STEPS,
        CONNECTOR_BATCH,
        LR,
        as_it_is,
    )
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
