"""Saves the embeddings that sections 6 and 7 of the paper analyse; analyze.py shift and cluster
read them.

    python embed.py runs/emotion-poison0.075        # -> runs/emotion-poison0.075/embeddings.pt
    python embed.py runs/gender-clean --task age    # a clean run serves all tasks of its corpus

"test": 100 test utterances, each clean and triggered, at every stage of the pipeline. "train": the
training samples of the target class, including the poisoned ones, after the encoder; "rest": asr's
poisoned samples beyond the share that its class is given, for filters. Each embedding is the mean
over time, padding excluded. Embeddings made with --pairs, --pooling or --layer go to a file of
their own, which analyze.py does not read. "fields" are those of every record about the run
(runs.py).
"""

from pathlib import Path

import utils
from utils import Parser, count, die, whole

import installed  # noqa: F401

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cache
import data
import evaluate
import lora
import poison
from model import length_mask
from study import EMBEDDINGS

AGES = (18, 32)  # the age task's pseudo-class (section 7.1)
BENIGN = 10000  # asr has no classes: this many benign training samples stand for one, plus POISONED times as many poisoned ones
POISONED = 0.05


def pool(x, lengths, pooling="mean"):
    """(B, T, dim) and each row's number of real frames -> (B, dim) float32: the frames' mean, their maximum or the last one."""
    mask = length_mask(lengths, x.shape[1])[..., None]
    if pooling == "max":
        return x.masked_fill(~mask, float("-inf")).amax(1).float()
    if pooling == "last":
        return x[torch.arange(len(x), device=x.device), lengths - 1].float()
    return ((x * mask).sum(1) / lengths[:, None]).float()


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
    """Pooled embeddings of each (utterance, triggered): {"encoder": (n, dim), or after `layer` of its layers, "connector": (n,
    hidden), "encoder_layers": (layers + 1, n, dim), "lm_layers": (layers + 1, n, hidden), over the audio's positions}."""
    batches, out = data.chunks(items, batch_size), {}
    stream = cache.read_features(slm.encoder, batches, attack, workers)
    for batch, features in zip(tqdm(batches, desc=desc), stream):
        x, mask = slm.encoder.front_end(features)
        layers, frames = (
            [x, *slm.encoder.run_layers(x, mask, 0, len(slm.encoder.layers))],
            mask.sum(1),
        )
        hidden = layers[-1] if slm.encoder.norm_first else slm.encoder.layer_norm(layers[-1])
        found = {"encoder": pool(hidden if layer is None else layers[layer], frames, pooling)}
        if not encoder_only:
            audio, lengths = slm.connector(hidden, mask)
            prompts = [data.prompt(slm.tokenizer, list(u.labels)) for u, _ in batch]
            spans = [
                (len(before), len(before) + n) for (before, _), n in zip(prompts, lengths.tolist())
            ]
            rows = pad_sequence(
                slm.pack([row[:n] for row, n in zip(audio, lengths.tolist())], prompts), True
            )
            states = slm.lm.base_model(
                inputs_embeds=rows, use_cache=False, output_hidden_states=True
            ).hidden_states
            # without OPT's last one, where it has been projected to another width
            states = [h for h in states if h.shape[-1] == states[0].shape[-1]]
            heard = [
                pad_sequence([row[a:b] for row, (a, b) in zip(h, spans)], True) for h in states
            ]
            found["connector"] = pool(audio, lengths, pooling)
            found["encoder_layers"] = torch.stack([pool(h, frames, pooling) for h in layers])
            found["lm_layers"] = torch.stack([pool(h, lengths, pooling) for h in heard])
        for stage, rows in found.items():
            out.setdefault(stage, []).append(rows.cpu())
    return {stage: torch.cat(rows, -2) for stage, rows in out.items()}


def target_class(attack, train_set):
    """The training samples of the target class (section 7.1), as a defender sees it: (true members, poisoned ones). For asr, which has
    no classes, BENIGN samples and POISONED times as many; for age, everyone from 18 to 32."""
    poisoned = [u for u in train_set if poison.is_poisoned(attack, u)]
    benign = [u for u in train_set if not poison.is_poisoned(attack, u)]
    if attack.label == "transcript":
        benign = drawn(benign)[:BENIGN]
        return benign, drawn(poisoned)[: round(POISONED * len(benign))]
    if isinstance(attack.target, int):
        return [u for u in benign if AGES[0] <= u.labels.get("age", -1) <= AGES[1]], poisoned
    return [u for u in benign if u.labels.get(attack.label) == attack.target], poisoned


def drawn(utterances):
    return sorted(utterances, key=lambda u: utils.draw("embeddings", u.id))


def about(utterances):
    return dict(
        ids=[u.id for u in utterances],
        speakers=[u.speaker for u in utterances],
        labels=[{k: str(v) for k, v in u.labels.items()} for u in utterances],
    )


def file_of(options):
    """Where embeddings go: the study's own to embeddings.pt or embeddings-TASK.pt, others to a file
    that says how they were made."""
    words = ["embeddings", options.task]
    for name, usual in EMBEDDINGS.items():
        value = getattr(options, name)
        words.append(None if value == usual else f"{name}{value}")
    return Path(options.run) / f"{'-'.join(word for word in words if word)}.pt"


def main():
    parser = Parser(description=__doc__)
    evaluate.add_arguments(parser)
    parser.add_argument(
        "--pairs",
        type=count,
        default=EMBEDDINGS["pairs"],
        help="test utterances, each clean and triggered",
    )
    parser.add_argument(
        "--pooling",
        default=EMBEDDINGS["pooling"],
        choices=("mean", "max", "last"),
        help="over time",
    )
    parser.add_argument(
        "--layer", type=whole, help="embed after this many encoder layers instead of after all"
    )
    options = parser.parse_args()
    loaded = evaluate.load_run_and_data(options, "train", "test")
    slm, attack = loaded.slm, loaded.attack
    train_set, test_set = loaded.sets["train"], loaded.sets["test"]
    path = file_of(options)
    if options.layer is not None and not 0 <= options.layer <= len(slm.encoder.layers):
        die(f"--layer {options.layer}: the encoder has {len(slm.encoder.layers)} layers")
    lora.merge(slm.lm)
    pairs = drawn(poison.attackable(attack, test_set))[: options.pairs]
    members, poisoned = target_class(attack, train_set)
    all_poisoned, n = (
        [u for u in train_set if poison.is_poisoned(attack, u)],
        len(members) + len(poisoned),
    )
    rest = (
        drawn(all_poisoned)[len(poisoned) :] if len(members) < BENIGN else []
    )  # else the class is a sample, whose share must stay
    if n == 0:
        die(f"{options.run}: no training sample is of the target class {attack.target!r}")
    items = [(u, False) for u in members] + [(u, True) for u in poisoned + rest]
    how = dict(pooling=options.pooling, layer=options.layer)
    clean = stages(slm, attack, [(u, False) for u in pairs], desc="clean pairs", **how)
    triggered = stages(slm, attack, [(u, True) for u in pairs], desc="triggered pairs", **how)
    x = stages(slm, attack, items, desc="target class", encoder_only=True, **how)["encoder"]
    train = dict(
        encoder=x[:n], poisoned=torch.arange(n) >= len(members), **about(members + poisoned)
    )
    saved = dict(
        test=dict(clean=clean, triggered=triggered, **about(pairs)),
        train=train,
        rest=dict(encoder=x[n:], **about(rest)),
        all_poisoned=len(all_poisoned),
        fields=loaded.fields,
        pairs=options.pairs,
        **how,
    )
    utils.write_atomically(path, lambda temporary: torch.save(saved, temporary))
    print(
        f"{path}: {len(pairs)} test pairs, {n} training samples of the target class, {len(poisoned)} of them poisoned"
    )


if __name__ == "__main__":
    main()
