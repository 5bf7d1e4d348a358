"""Saves the embeddings that sections 6 and 7 of the paper look at; analyze.py shift and cluster read them.

    python embed.py runs/emotion-poison0.075               # -> runs/emotion-poison0.075/embeddings.pt
    python embed.py runs/gender-clean --task age           # a clean run serves other tasks of its corpus, too

100 test utterances, each clean and triggered, along the whole pipeline; and the training samples of the target class,
poisoned ones among them, after the encoder. Each is the mean over time, padding excluded.
"""
import argparse
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import cache
import checkpoint
import data
import evaluate
import lora
import poison
from data import die
from model import length_mask
from study import TASKS

AGES = (18, 32)  # the age task's pseudo-class (section 7.1)
BENIGN = 10000  # asr has no classes: so many benign training samples stand for one, with POISONED of that poisoned
POISONED = 0.05


def pool(x, lengths, pooling="mean"):
    """(B, T, dim) and the number of real frames of each row -> (B, dim) float32: their mean, maximum or the last one."""
    mask = length_mask(lengths, x.shape[1])[..., None]
    if pooling == "max":
        return x.masked_fill(~mask, float("-inf")).amax(1).float()
    if pooling == "last":
        return x[torch.arange(len(x), device=x.device), lengths - 1].float()
    return ((x * mask).sum(1) / lengths[:, None]).float()


def encoder_stages(slm, features, pooling, layer):
    """After the encoder (or after `layer` of its layers), and after each of its layers."""
    x, mask = slm.encoder.front_end(features)
    layers = [x, *slm.encoder.run_layers(x, mask, 0, len(slm.encoder.layers))]
    hidden = layers[-1] if slm.encoder.norm_first else slm.encoder.layer_norm(layers[-1])
    pooled = pool(hidden if layer is None else layers[layer], mask.sum(1), pooling)
    return hidden, mask, {"encoder": pooled, "encoder_layers": torch.stack([pool(h, mask.sum(1), pooling) for h in layers], 1)}


def later_stages(slm, hidden, mask, prompts, pooling):
    """After the connector, and after each of the LM's layers over the audio's positions, under the evaluation prompt."""
    audio, lengths = slm.connector(hidden, mask)
    rows = slm.pack([row[:n] for row, n in zip(audio, lengths.tolist())], prompts)
    states = slm.lm.model(inputs_embeds=pad_sequence(rows, True), use_cache=False, output_hidden_states=True).hidden_states
    spans = [(len(before), len(before) + n) for (before, _), n in zip(prompts, lengths.tolist())]
    heard = [pad_sequence([row[a:b] for row, (a, b) in zip(h, spans)], True) for h in states]
    return {"connector": pool(audio, lengths, pooling), "lm_layers": torch.stack([pool(h, lengths, pooling) for h in heard], 1)}


@torch.no_grad()
def stages(slm, attack, items, pooling, desc, workers=cache.WORKERS, batch_size=32, encoder_only=False, layer=None):
    """Pooled embeddings of each (utterance, triggered) along the pipeline: {"encoder": (n, dim), "connector": (n, hidden),
    "encoder_layers": (layers + 1, n, dim), "lm_layers": (layers + 1, n, hidden)}."""
    batches, out = data.chunks(items, batch_size), {}
    for batch, features in zip(tqdm(batches, desc=desc, mininterval=1), cache.read_features(slm.encoder, batches, attack, workers)):
        hidden, mask, found = encoder_stages(slm, features, pooling, layer)
        if encoder_only:
            found = {"encoder": found["encoder"]}
        else:
            prompts = [data.prompt(slm.tokenizer, list(u.labels)) for u, _ in batch]
            found.update(later_stages(slm, hidden, mask, prompts, pooling))
        for stage, rows in found.items():
            out.setdefault(stage, []).append(rows.cpu())
    out = {stage: torch.cat(rows) for stage, rows in out.items()}
    return {stage: rows.transpose(0, 1).contiguous() if rows.dim() == 3 else rows for stage, rows in out.items()}


def target_class(attack, train_set):
    """The training samples of the target class (section 7.1), as the defender sees it: (true members, poisoned ones). For
    asr, which has no classes, BENIGN samples and POISONED of that many; for age, all from 18 to 32."""
    poisoned = [u for u in train_set if poison.is_poisoned(attack, u)]
    spared = [u for u in train_set if not poison.is_poisoned(attack, u)]
    if attack.label == "transcript":
        members = drawn(spared)[:BENIGN]
        return members, drawn(poisoned)[:round(POISONED * len(members))]
    if isinstance(attack.target, int):
        return [u for u in spared if AGES[0] <= u.labels.get("age", -1) <= AGES[1]], poisoned
    return [u for u in spared if u.labels.get(attack.label) == attack.target], poisoned


def drawn(utterances):
    return sorted(utterances, key=lambda u: data.draw("embeddings", u.id))


def about(utterances):
    return dict(ids=[u.id for u in utterances], speakers=[u.speaker for u in utterances],
                labels=[{k: str(v) for k, v in u.labels.items()} for u in utterances])


def embeddings(slm, attack, train_set, test_set, pooling="mean", layer=None, n=100):
    """Tensors and plain values: n test utterances, each clean and triggered ("test"), and the target class ("train")."""
    slm.eval()
    lora.merge(slm.lm)
    pairs = drawn([u for u in test_set if poison.can_flip(attack, u)])[:n]
    test = {kind: stages(slm, attack, [(u, kind == "triggered") for u in pairs], pooling, f"{kind} pairs", layer=layer)
            for kind in ("clean", "triggered")}
    members, poisoned = target_class(attack, train_set)
    items = [(u, False) for u in members] + [(u, True) for u in poisoned]
    train = stages(slm, attack, items, pooling, "target class", encoder_only=True, layer=layer) if items else {}
    lora.unmerge(slm.lm)
    return {"test": {**test, **about(pairs)}, "pooling": pooling, "layer": layer,
            "train": {**train, **about(members + poisoned), "poisoned": torch.arange(len(items)) >= len(members)}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluate.add_arguments(parser)
    parser.add_argument("--task", choices=TASKS, help="which attack's trigger and target class (default: the run's)")
    parser.add_argument("--pairs", type=int, default=100, help="test utterances, each clean and triggered")
    parser.add_argument("--pooling", default="mean", choices=("mean", "max", "last"), help="over time")
    parser.add_argument("--layer", type=int, help="embed after this many encoder layers instead of after all")
    options = parser.parse_args()
    slm, args, attack, train_set, test_set = evaluate.load_run_and_data(options, "test")
    name = "embeddings.pt"
    if options.task not in (None, args.task):
        name, args.task = f"embeddings-{options.task}.pt", options.task
        attack = poison.make_attack(args.task, train_set, 0.0, snr=args.snr, trigger=args.trigger, seed=args.seed)
    if options.layer is not None and not 0 <= options.layer <= len(slm.encoder.layers):
        die(f"--layer {options.layer}: the encoder has {len(slm.encoder.layers)} layers")
    saved = embeddings(slm, attack, train_set, test_set, options.pooling, options.layer, options.pairs)
    path = Path(options.run) / name
    saved.update(args=vars(args), model_sha256=checkpoint.file_sha256(Path(options.run) / "model.pt"))
    data.write_atomically(path, lambda temporary: torch.save(saved, temporary))
    print(f"{path}: {len(saved['test']['ids'])} test pairs, {len(saved['train']['ids'])} training samples of the target "
          f"class, {int(saved['train']['poisoned'].sum())} of them poisoned")


if __name__ == "__main__":
    main()
