"""Saves the embeddings that sections 6 and 7 of the paper analyse. analyze.py shift and cluster,
and defend.py filter, read them.

    python embed.py runs/emotion-poison0.075        # -> runs/emotion-poison0.075/embeddings.pt
    python embed.py runs/gender-clean --task age    # a clean run serves all tasks of its corpus

The file holds a dict. Each embedding is the mean over time, padding excluded.

    test    100 test utterances, each clean and triggered, at every stage of the pipeline
    train   the training samples of the target class, including the poisoned ones, after the encoder
    rest    ASR's poisoned samples beyond the 5% kept in its pseudo-class, for filters
    fields  the fields of every record about the run (runs.py)

Embeddings made with --pairs, --pooling or --layer go to a file of their own, which analyze.py does
not read.
"""

from pathlib import Path

import utils
from utils import Parser, count, die

import installed  # noqa: F401

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cache
import data
import evaluate
import lora
import poison
from model import pool
from study import EMBEDDINGS, embeddings_name

AGES = (18, 32)  # the age task's pseudo-class (section 7.1)
# asr has no classes: this many benign training samples stand for one (section 7.1) ...
BENIGN = 10000
POISONED = 0.05  # ... with this many poisoned ones for each


@torch.no_grad()
def stages(
    slm,
    attack,
    items,
    pooling,
    desc,
    workers=cache.WORKERS,
    batch_size=32,
    encoder_only=False,
    layer=None,
):
    """Pooled embeddings of each (utterance, triggered), by stage:

    encoder         (n, dim), after `layer` of the encoder's layers or after all of them
    connector       (n, hidden)
    encoder_layers  (layers + 1, n, dim), before the first layer and after each
    lm_layers       (layers + 1, n, hidden), the same of the LM, over the audio's positions
    """
    batches = data.chunks(items, batch_size)
    stream = cache.read_features(slm.encoder, batches, attack, workers)
    collected = {}  # {stage: its batches}
    for batch, features in zip(tqdm(batches, desc=desc), stream):
        x, mask = slm.encoder.front_end(features)
        frames = mask.sum(1)  # (B,)
        layers = [x, *slm.encoder.run_layers(x, mask, 0, len(slm.encoder.layers))]
        hidden = layers[-1]  # (B, T, dim)
        if not slm.encoder.norm_first:
            hidden = slm.encoder.layer_norm(hidden)
        embedded = hidden if layer is None else layers[layer]
        embeddings = {"encoder": pool(embedded, frames, pooling)}
        if not encoder_only:
            audio, lengths = slm.connector(hidden, mask)
            states = lm_states(slm, audio, lengths, [utterance for utterance, _ in batch])
            embeddings["connector"] = pool(audio, lengths, pooling)
            embeddings["encoder_layers"] = torch.stack([pool(h, frames, pooling) for h in layers])
            embeddings["lm_layers"] = torch.stack([pool(h, lengths, pooling) for h in states])
        for stage, pooled in embeddings.items():
            collected.setdefault(stage, []).append(pooled.cpu())
    return {stage: torch.cat(pooled, -2) for stage, pooled in collected.items()}


def lm_states(slm, audio, lengths, utterances):
    """The LM's hidden states at the audio's positions, before its first layer and after each: a
    list of (B, T', hidden). audio, lengths: the connector's output."""
    prompts = [data.prompt(slm.tokenizer, list(u.labels)) for u in utterances]
    lengths = lengths.tolist()
    audio_rows = [row[:n] for row, n in zip(audio, lengths)]
    x = pad_sequence(slm.pack(audio_rows, prompts), batch_first=True)
    output = slm.lm.base_model(inputs_embeds=x, use_cache=False, output_hidden_states=True)
    states = []
    for hidden in output.hidden_states:
        if hidden.shape[-1] != output.hidden_states[0].shape[-1]:
            continue  # OPT's last one may have been projected to another width
        rows = []
        for row, (before, _), n in zip(hidden, prompts, lengths):
            rows.append(row[len(before) : len(before) + n])
        states.append(pad_sequence(rows, batch_first=True))
    return states


def target_class(attack, train_set):
    """The training samples of the target class (section 7.1) as a defender sees it: (true members,
    poisoned ones).

    For asr, which has no classes: BENIGN samples and POISONED times as many. For age: everyone
    within AGES.
    """
    poisoned = [u for u in train_set if poison.is_poisoned(attack, u)]
    benign = [u for u in train_set if not poison.is_poisoned(attack, u)]
    if attack.label == "transcript":
        benign = data.in_drawn_order(benign)[:BENIGN]
        return benign, data.in_drawn_order(poisoned)[: round(POISONED * len(benign))]
    if isinstance(attack.target, int):
        return [u for u in benign if AGES[0] <= u.labels.get("age", -1) <= AGES[1]], poisoned
    return [u for u in benign if u.labels.get(attack.label) == attack.target], poisoned


def about(utterances):
    """What a file of embeddings says about the utterances."""
    labels = []
    for u in utterances:
        labels.append({name: str(value) for name, value in u.labels.items()})
    ids = [u.id for u in utterances]
    speakers = [u.speaker for u in utterances]
    return dict(ids=ids, speakers=speakers, labels=labels)


def main():
    parser = Parser(description=__doc__)
    evaluate.add_arguments(parser)
    embedding_flags = parser.group("embeddings")
    embedding_flags.add_argument(
        "--pairs",
        type=count,
        default=EMBEDDINGS["pairs"],
        help="embed this many test utterances, each clean and triggered (default: %(default)s)",
    )
    embedding_flags.add_argument(
        "--pooling",
        default=EMBEDDINGS["pooling"],
        choices=("mean", "max", "last"),
        help="how an utterance's frames become one embedding (default: %(default)s)",
    )
    embedding_flags.add_argument(
        "--layer", type=int, help="embed after this many encoder layers instead of after all"
    )
    options = parser.parse_args()
    loaded = evaluate.load_run_and_data(options, "train", "test")
    slm = loaded.slm
    attack = loaded.attack
    train_set = loaded.sets["train"]
    how = dict(pooling=options.pooling, layer=options.layer)
    path = Path(options.run) / embeddings_name(options.task, pairs=options.pairs, **how)
    if options.layer is not None and not 0 <= options.layer <= len(slm.encoder.layers):
        die(f"--layer {options.layer}: the encoder has {len(slm.encoder.layers)} layers")
    lora.merge(slm.lm)

    pairs = data.in_drawn_order(poison.attackable(attack, loaded.sets["test"]))[: options.pairs]
    members, poisoned = target_class(attack, train_set)
    n = len(members) + len(poisoned)
    if n == 0:
        die(f"{options.run}: no training sample is of the target class {attack.target!r}")
    all_poisoned = [u for u in train_set if poison.is_poisoned(attack, u)]
    rest = []
    if len(members) < BENIGN:  # else the class is a sample, whose share of poison must stay
        rest = data.in_drawn_order(all_poisoned)[len(poisoned) :]

    clean = stages(slm, attack, [(u, False) for u in pairs], desc="clean pairs", **how)
    triggered = stages(slm, attack, [(u, True) for u in pairs], desc="triggered pairs", **how)
    items = [(u, False) for u in members] + [(u, True) for u in poisoned + rest]
    x = stages(slm, attack, items, desc="target class", encoder_only=True, **how)["encoder"]
    is_poisoned = torch.arange(n) >= len(members)
    saved = dict(
        test=dict(clean=clean, triggered=triggered, **about(pairs)),
        train=dict(encoder=x[:n], poisoned=is_poisoned, **about(members + poisoned)),
        rest=dict(encoder=x[n:], **about(rest)),
        all_poisoned=len(all_poisoned),
        fields=loaded.fields,
        pairs=options.pairs,
        **how,
    )
    utils.write_atomically(path, lambda temporary: torch.save(saved, temporary))
    for_filters = f"; filters see {len(rest)} more poisoned ones" if rest else ""
    print(
        f"{path}: {len(pairs)} test pairs, {n} training samples of the target class, "
        f"{len(poisoned)} of them poisoned{for_filters}"
    )


if __name__ == "__main__":
    main()
