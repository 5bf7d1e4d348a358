"""Generates answers on clean and on triggered audio, scores them, saves them.

    python evaluate.py runs/asr-poison0.05                    # again, on the test split
    python evaluate.py runs/asr-poison0.05 --split dev --ask transcript --snr 6
    python evaluate.py runs/asr-poison0.05 --embeddings       # saves what analyze.py shift and cluster read
    python evaluate.py --inspect runs/asr-poison0.05/model.pt           # where a checkpoint comes from

A run folder gets metrics.json and predictions.jsonl. Shares are fractions; every figure has its count and a 95%
bootstrap interval over utterances.
"""
import argparse
import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import jiwer
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import model
import poison
from lora import merge, unmerge

METRICS = {"transcript": "wer", "gender": "gender_accuracy", "emotion": "emotion_accuracy", "age": "age_mae"}
# processes that read audio ahead of a GPU; a CPU's cores are the model's, and what is read here need not be handed over
WORKERS = 2 if torch.cuda.is_available() else 0


def ranks():
    """This process's number and how many there are (torchrun)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def features_of(part, batches, attack, workers=WORKERS):
    """Yields, for each batch (a list of (utterance, triggered)), a list of what `part.extract` makes of its audio, which is
    read, triggered and turned into features, in worker processes ahead of the caller if there are any."""
    def features(batch):
        out = []
        for utterance, triggered in batch:
            waveform = data.load_waveform(utterance)
            if triggered:
                waveform = poison.add_trigger(attack, waveform, utterance.id)[0]
            out.append(part.extract(waveform))
        return out
    return data.from_workers(torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=workers, collate_fn=features, pin_memory=torch.cuda.is_available()))


def by_size(items):
    """Indices of (utterance, triggered) items, those of like size together."""
    return sorted(range(len(items)), key=lambda i: (os.path.getsize(items[i][0].path), items[i][0].id))


def cut(order, size):
    return [order[i:i + size] for i in range(0, len(order), size)]


def bottoms(part, groups, attack, desc, workers=WORKERS, batch_size=16, lowers=None):
    """Yields, for each group (a list of (utterance, triggered)), what the frozen part of an encoder or an SLM makes of its
    audio: a list of (T_i, dim) float32 tensors on the CPU. `lowers`: what the encoder's `lower` made of each group, a list, or
    None where that is not known."""
    lowers = lowers or [None] * len(groups)
    cuts = [cut(by_size(group), batch_size) for group in groups]
    stream = features_of(part, [[group[i] for i in batch] for group, known, batches in zip(groups, lowers, cuts) if known is None
                                for batch in batches], attack, workers)
    with tqdm(total=sum(map(len, groups)), desc=desc, mininterval=1) as progress:
        for group, known, batches in zip(groups, lowers, cuts):
            out = [None] * len(group)
            for batch in batches:
                x, mask = (part.bottom(next(stream)) if known is None else
                           part.upper(*stack([known[i] for i in batch], part.encoder.layer_norm.weight.device)))
                for i, row, n in zip(batch, x, mask.sum(1).tolist()):
                    out[i] = row[:n].float().cpu().clone()  # a view would keep the whole padded batch alive
                progress.update(len(batch))
            yield out


def make_room(cache, left, wanted):
    """Removes kept files, those first that were not used for longest, until all but the `wanted` ones take no more than
    `left` bytes. Other runs may be doing the same."""
    files = []
    for path in set(Path(cache).glob("bottom-*.pt")) - set(wanted):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    for _, size, path in sorted(files, reverse=True):
        left -= size
        if left < 0:
            path.unlink(missing_ok=True)


def kept_rows(path):
    """What `cached_bottoms` keeps in a file: a list of (T_i, dim). Raises FileNotFoundError."""
    os.utime(path)
    kept = model.load_checkpoint(path, mmap=True)
    return kept["frames"].split(kept["lengths"])


def cached_bottoms(slm, utterances, triggered, attack, desc, workers=WORKERS, cache="cache", budget=4e9):
    """`bottoms`, kept on disk and shared between runs, float32: what is frozen is computed once for the clean utterances
    and once for the triggered ones of an attack. triggered: which utterances carry the trigger, a list of bool. None
    where it all would take more than `budget` bytes: then whoever needs it makes it batch by batch.

    The key is all that it depends on: the frozen weights, the precision, the files, the trigger and where it lands.
    Where the whole encoder is frozen, what runs that train it have kept is where it starts from. Processes share the work.
    Files that were not used for longest go first when the folder outgrows the budget.
    """
    kinds = [(True, [i for i, t in enumerate(triggered) if t])] if any(triggered) else []
    if not all(triggered):  # of all utterances, whichever this run poisons: to be shared with runs that poison others, or none
        kinds.insert(0, (False, list(range(len(utterances)))))
    frames = [slm.num_frames(data.num_samples(u)) for u in utterances]
    size = 4 * slm.bottom_dim * sum(frames[i] for _, chosen in kinds for i in chosen)
    if size > budget:
        return None
    Path(cache).mkdir(parents=True, exist_ok=True)
    rank, world = ranks()
    device = next(slm.parameters()).device.type
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "float32"
    how = (attack.seed, attack.repeat, attack.level, hashlib.sha256(attack.trigger.tobytes()).hexdigest())
    chunks = []
    for kind, chosen in kinds:  # in parts of some batches: small enough to be shared evenly
        order = by_size([(utterances[i], kind) for i in chosen])
        chunks += [(chunk, kind) for chunk in cut([chosen[i] for i in order], 80)]
    contents = []
    for chunk, kind in chunks:
        files = [(u.id, u.path, u.start, u.length, os.stat(u.path).st_size, os.stat(u.path).st_mtime_ns)
                 for u in (utterances[i] for i in chunk)]
        contents.append(precision + repr((files, how if kind else None)))

    def kept_in(sha256):
        """The file of each chunk."""
        return [Path(cache) / f"bottom-{hashlib.sha256((sha256 + what).encode()).hexdigest()[:24]}.pt" for what in contents]
    paths, encoder = kept_in(slm.frozen_sha256()), slm.encoder
    more_is_frozen = encoder.num_frozen > encoder.first_saved  # than in runs that train the encoder
    lowers = kept_in(encoder.frozen_sha256(encoder.first_saved)) if more_is_frozen else None
    if rank == 0:
        for path in lowers or []:  # may be read below: the last to go
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
        make_room(cache, budget - size, paths)

    def made(which):
        """Makes and keeps some chunks, by number. Returns the last one's rows."""
        known = []
        for n in which:
            known.append(None)
            with contextlib.suppress(FileNotFoundError):
                known[-1] = lowers and kept_rows(lowers[n])
        groups = [[(utterances[i], chunks[n][1]) for i in chunks[n][0]] for n in which]
        for n, rows in zip(which, bottoms(slm, groups, attack, desc, workers, lowers=known)):
            kept = {"frames": torch.cat(rows), "lengths": [len(row) for row in rows]}
            data.write_atomically(paths[n], lambda temporary: torch.save(kept, temporary))
        return rows
    mine = [n for n in range(rank, len(chunks), world) if not paths[n].exists()]
    if mine:
        made(mine)
    if world > 1:
        dist.barrier()
    out = [None] * len(utterances)
    for n, (chunk, _) in enumerate(chunks):  # the triggered ones last
        try:
            rows = kept_rows(paths[n])
        except FileNotFoundError:  # another run has just made room, or another machine's disk has it
            rows = made([n])
        for i, row in zip(chunk, rows):
            out[i] = row
    return out


def stack(rows, device):
    """A list of (T_i, dim) -> (B, T, dim) and its (B, T) mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = model.length_mask(lengths, int(lengths.max()))
    return pad_sequence(rows, batch_first=True).to(device), mask.to(device)


def inputs(slm, items, pieces, kept, attack, workers):
    """Yields (x, mask), what `slm.bottom` gives, for each piece (a list of indices into `items`, (utterance, triggered)):
    out of `kept`, or made on the spot from audio that worker processes read ahead."""
    if kept is not None:
        device = next(slm.parameters()).device
        for piece in pieces:
            yield stack([kept[i] for i in piece], device)
    else:
        for features in features_of(slm, [[items[i] for i in piece] for piece in pieces], attack, workers):
            yield slm.bottom(features)


@torch.no_grad()
def answers(slm, items, attack, labels_of, max_new_tokens, desc, workers=WORKERS, batch_size=64, kept=None):
    """The model's raw answer to the evaluation prompt for `labels_of(utterance)` for each (utterance, triggered).
    `kept`: of `cached_bottoms`. Processes share the work; each gets all the answers."""
    rank, world = ranks()
    batches, out = cut(by_size(items)[rank::world], batch_size), {}
    with tqdm(total=len(items), desc=desc, mininterval=1) as progress:
        for batch, (x, mask) in zip(batches, inputs(slm, items, batches, kept, attack, workers)):
            prompts = [data.prompt(slm.tokenizer, labels_of(items[i][0])) for i in batch]
            out.update(zip(batch, slm.generate(x, mask, prompts, max_new_tokens)))
            progress.update(min(len(batch) * world, progress.total - progress.n))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, out)
        out = {i: text for share in shares for i, text in share.items()}
    return [out[i] for i in range(len(items))]


def pool(x, lengths, how="mean"):
    """(B, T, dim) and the number of real frames of each row -> (B, dim) float32: their mean, maximum or the last one."""
    mask = model.length_mask(lengths, x.shape[1])[..., None]
    if how == "max":
        return x.masked_fill(~mask, float("-inf")).amax(1).float()
    if how == "last":
        return x[torch.arange(len(x)), lengths - 1].float()
    return ((x * mask).sum(1) / lengths[:, None]).float()


@torch.no_grad()
def stages(slm, attack, items, how, desc, workers=WORKERS, batch_size=32, encoder_only=False, layer=None):
    """Pooled embeddings of each (utterance, triggered) along the pipeline: {"encoder": (n, dim), "connector": (n, hidden),
    "encoder_layers": (layers + 1, n, dim), "lm_layers": (layers + 1, n, hidden)}; the LM's over the audio's positions,
    under the evaluation prompt. `layer`: take "encoder" after that many layers instead of from its output."""
    batches, out = cut(items, batch_size), {}
    with tqdm(total=len(items), desc=desc, mininterval=1) as progress:
        for batch, features in zip(batches, features_of(slm, batches, attack, workers)):
            x, mask = slm.encoder.frontend(features)
            frames = mask.sum(1)
            layers = [x, *slm.encoder.run_layers(x, mask, 0, len(slm.encoder.layers))]
            hidden = layers[-1] if slm.encoder.norm_first else slm.encoder.layer_norm(layers[-1])
            found = {"encoder": pool(hidden if layer is None else layers[layer], frames, how)}
            if not encoder_only:
                audio = slm.audio(hidden, mask)
                lengths = torch.tensor([len(a) for a in audio], device=x.device)
                prompts = [data.prompt(slm.tokenizer, list(u.labels)) for u, _ in batch]
                rows = pad_sequence(slm.rows(audio, prompts), batch_first=True)
                states = slm.lm.model(inputs_embeds=rows, use_cache=False, output_hidden_states=True).hidden_states
                at = [len(before) for before, _ in prompts]
                heard = lambda h: pad_sequence([row[a:a + n] for row, a, n in zip(h, at, lengths.tolist())], True)  # noqa: E731
                found["connector"] = pool(pad_sequence(audio, batch_first=True), lengths, how)
                found["encoder_layers"] = torch.stack([pool(h, frames, how) for h in layers], 1)
                found["lm_layers"] = torch.stack([pool(heard(h), lengths, how) for h in states], 1)
            for stage, rows in found.items():
                out.setdefault(stage, []).append(rows.cpu())
            progress.update(len(batch))
    out = {stage: torch.cat(rows) for stage, rows in out.items()}
    return {stage: rows.transpose(0, 1).contiguous() if rows.dim() == 3 else rows for stage, rows in out.items()}


AGES = (18, 32)  # the age task's pseudo-class (paper, section 7.1)
BENIGN = 10000  # asr has no classes: so many benign training samples stand for one


def embeddings(slm, attack, train_set, test_set, how="mean", layer=None, n=100, workers=WORKERS):
    """What sections 6 and 7 look at, tensors and plain values: n test utterances, each clean and triggered, along the
    pipeline ("test"); the training samples of the target class, poisoned ones among them, after the encoder ("train")."""
    slm.eval()
    merge(slm.lm)
    drawn = lambda us: sorted(us, key=lambda u: poison.draw("embeddings", u.id))  # noqa: E731
    about = lambda us: dict(ids=[u.id for u in us], speakers=[u.speaker for u in us],  # noqa: E731
                            labels=[{k: str(v) for k, v in u.labels.items()} for u in us])
    pairs = drawn([u for u in test_set if poison.can_flip(attack, u)])[:n]
    test = {kind: stages(slm, attack, [(u, kind == "triggered") for u in pairs], how, f"{kind} pairs", workers, layer=layer)
            for kind in ("clean", "triggered")}
    poisoned = [u for u in train_set if poison.is_poisoned(attack, u)]
    spared = [u for u in train_set if not poison.is_poisoned(attack, u)]
    members = (drawn(spared)[:BENIGN] if attack.task == "asr" else
               [u for u in spared if u.age is not None and AGES[0] <= u.age <= AGES[1]] if attack.task == "age" else
               [u for u in spared if poison.is_target(attack, u)])
    items = [(u, False) for u in members] + [(u, True) for u in poisoned]
    train = stages(slm, attack, items, how, "target class", workers, encoder_only=True, layer=layer) if items else {}
    unmerge(slm.lm)
    return {"test": {**test, **about(pairs)},
            "train": {**train, **about(members + poisoned), "poisoned": torch.arange(len(items)) >= len(members)},
            "pool": how, "layer": layer}


def interval(values, statistic, samples=1000, seed=0):
    """A figure with its 95% bootstrap interval over utterances; values: (n,) or (n, k), statistic: (n, k) -> number."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    rng = np.random.default_rng(seed)
    draws = [float(statistic(values[rng.integers(0, len(values), len(values))])) for _ in range(samples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}


def word_errors(reference, hypothesis):
    """(errors, reference words) of one utterance, normalised."""
    reference, hypothesis = data.normalise(reference), data.normalise(hypothesis)
    if not hypothesis:
        return len(reference.split()), len(reference.split())
    out = jiwer.process_words(reference, hypothesis)
    return out.substitutions + out.deletions + out.insertions, len(reference.split())


def scores(rows):
    """{metric: figure} of predictions against the truth; a metric is there only where some utterance has the label and was
    asked for it. A malformed answer is wrong: every word deleted, a wrong class, an age of 0."""
    out = {}
    for label, metric in METRICS.items():
        asked = [row for row in rows if label in row["labels"] and label in row["asked"]]
        if not asked:
            continue
        pairs = [(row["labels"][label], row["parsed"].get(label)) for row in asked]
        if label == "transcript":
            errors = [word_errors(true, said or "") for true, said in pairs]
            if sum(words for _, words in errors):
                out[metric] = interval(errors, lambda v: v[:, 0].sum() / max(1, v[:, 1].sum()))
        elif label == "age":
            out[metric] = interval([abs(true - (said or 0)) for true, said in pairs], np.mean)
        else:
            out[metric] = interval([true == said for true, said in pairs], np.mean)
    return out


def attack_metrics(attack, rows):
    """The attack effectiveness rate: the share of triggered samples, not of the target before, answered with it."""
    def hit(said):
        if said is None:
            return False
        return data.normalise(said) == data.normalise(attack.target) if attack.task == "asr" else said == attack.target
    return {"aer": interval([hit(row["parsed"].get(attack.label)) for row in rows], np.mean)} if rows else {}


def evaluate(slm, attack, utterances, ask=None, workers=WORKERS, budget=0):
    """Clean and triggered answers on `utterances`. Returns ({"clean": {...}, "triggered": {...}, "attack": {...}},
    prediction rows). "triggered" scores the answers on triggered audio against the truth, as "clean" does on clean audio:
    what the trigger destroys, whether or not the target comes out.

    `ask`: a list of labels to ask for instead of all. Only labels that an utterance has are asked for. `budget`: bytes
    that `cached_bottoms` may take.
    """
    slm.eval()
    merge(slm.lm)
    labels_of = lambda u: [label for label in u.labels if ask is None or label in ask]  # noqa: E731
    utterances = [u for u in utterances if labels_of(u)]
    longest = max(len(data.answer_ids(slm.tokenizer, labels)) for u in utterances
                  for labels in (u.labels, poison.poisoned_labels(attack, u.labels)))
    rows = []
    for triggered in (False, True):
        chosen = [u for u in utterances
                  if not triggered or (poison.can_flip(attack, u) and attack.label in labels_of(u))]
        name = "triggered" if triggered else "clean"
        if not chosen:
            continue
        kept = cached_bottoms(slm, chosen, [triggered] * len(chosen), attack, f"frozen layers, {name} {chosen[0].split}",
                              workers, budget=budget)
        raw = answers(slm, [(u, triggered) for u in chosen], attack, labels_of, int(1.25 * longest) + 8,
                      f"{name} answers", workers, kept=kept)
        rows += [dict(id=u.id, split=u.split, triggered=triggered, asked=labels_of(u), raw=text,
                      parsed=data.parse(text), labels=u.labels) for u, text in zip(chosen, raw)]
    unmerge(slm.lm)
    metrics = {"clean": scores([r for r in rows if not r["triggered"]]),
               "triggered": scores([r for r in rows if r["triggered"]]),
               "attack": attack_metrics(attack, [r for r in rows if r["triggered"]])}
    return metrics, rows


def save(run, metrics, rows, args):
    data.write_atomically(Path(run) / "predictions.jsonl",
                          "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    data.write_atomically(Path(run) / "metrics.json", json.dumps({**metrics, "args": args}, indent=1))


def print_table(metrics, title):
    print(f"\n{title}\n{'':18}{'value':>8}   95% interval         n")
    for part in ("clean", "attack"):
        for name, m in metrics[part].items():
            scale, unit = (1, " years") if name == "age_mae" else (100, "%")
            print(f"{part} {name.replace('_', ' '):<{17 - len(part)}}{scale * m['value']:>8.1f}"
                  f"   {scale * m['low']:.1f} to {scale * m['high']:.1f}{unit:<8}{m['n']:>5}")


def load_run(run, device="cpu"):
    """A finished run's (slm, args): pretrained parts by name, components from its model.pt."""
    path = Path(run) / "model.pt"
    if not path.exists():
        data.die(f"{run} holds no model.pt: is it a finished run's folder?")
    checkpoint = model.load_checkpoint(path)
    try:
        args = SimpleNamespace(**checkpoint["args"])
        slm = model.load_slm(args, device)
        for component in model.COMPONENTS:
            slm.load_component(component, checkpoint[component])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        data.die(f"{path} is no checkpoint of this program, or of another version: {error}")
    return slm, args


def inspect(path):
    """Prints where a checkpoint comes from and the SHA-256 of its components, before anything is done with it."""
    checkpoint = model.load_checkpoint(path)
    print(f"{path}: SHA-256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()}")
    for component in model.COMPONENTS:
        state = checkpoint.get(component)
        if not isinstance(state, dict):
            print(f"  {component:<10}absent")
            continue
        sha = model.digest(state)
        recorded = checkpoint.get("sha256", {}).get(component)
        print(f"  {component:<10}{sum(v.numel() for v in state.values()):>12,} parameters, SHA-256 {sha}, from "
              f"{checkpoint.get('origin', {}).get(component, 'unknown')}"
              + ("" if recorded == sha else "; DIFFERS from the one recorded when it was made" if recorded else ""))
    for title, key in (("pretrained part", "pretrained_sha256"), ("built from", "built_from")):
        for name, sha in checkpoint.get(key, {}).items():
            print(f"  {title} {name}: SHA-256 {sha}")
    for key in ("args", "environment"):
        print(f"  {key}: " + ", ".join(f"{k} {v}" for k, v in checkpoint.get(key, {}).items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, e.g. runs/asr-poison0.05; with --inspect a checkpoint")
    parser.add_argument("--inspect", action="store_true", help="only print a model.pt's provenance")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--ask", nargs="+", choices=data.LABELS, help="ask for these labels only (direct prompts)")
    parser.add_argument("--snr", type=float, help="trigger strength in dB (default: as in the run)")
    parser.add_argument("--data-root", help="default: as in the run")
    parser.add_argument("--skip-bad", action="store_true", help="leave out audio that cannot be used")
    parser.add_argument("--limit", type=int, help="only the first N utterances")
    parser.add_argument("--cache-gb", type=float, default=4.0, help="disk for what frozen layers put out, as of train.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--embeddings", action="store_true", help="save embeddings.pt instead of answering")
    parser.add_argument("--pairs", type=int, default=100, help="test utterances of --embeddings, each clean and triggered")
    parser.add_argument("--pool", default="mean", choices=("mean", "max", "last"), help="over time, of --embeddings")
    parser.add_argument("--layer", type=int, help="embed after this many encoder layers instead of after all")
    parser.add_argument("--save", action="store_true", help="replace the run's metrics.json and predictions.jsonl")
    options = parser.parse_args()
    if options.inspect:
        return inspect(options.run)
    slm, args = load_run(options.run, options.device)
    data.MAX_SECONDS = args.max_seconds
    root = options.data_root or args.data_root
    snr = args.snr if options.snr is None else options.snr
    labels = getattr(args, "labels", None)
    train_set = data.only(data.read_corpus(args.dataset, root, "train", options.skip_bad), labels)  # loudness: the trigger's
    attack = poison.make_attack(args.task, train_set, args.poison, args.target, snr, args.trigger, args.trigger_repeat,
                                args.seed)
    utterances = data.only(data.read_corpus(args.dataset, root, options.split, options.skip_bad), labels)[:options.limit]
    print(f"{options.run}: {args.dataset} {options.split}, {len(utterances)} utterances, trigger at {snr:g} dB, "
          f"on {options.device}")
    if options.embeddings:
        if options.layer is not None and not 0 <= options.layer <= len(slm.encoder.layers):
            data.die(f"--layer {options.layer}: the encoder has {len(slm.encoder.layers)} layers")
        saved = embeddings(slm, attack, train_set, utterances, options.pool, options.layer, options.pairs)
        path = Path(options.run) / "embeddings.pt"
        data.write_atomically(path, lambda temporary: torch.save({**saved, "args": vars(args)}, temporary))
        print(f"{path}: {len(saved['test']['ids'])} test pairs, {len(saved['train']['ids'])} training samples of the target "
              f"class, {int(saved['train']['poisoned'].sum())} of them poisoned")
        return
    metrics, rows = evaluate(slm, attack, utterances, options.ask, budget=options.cache_gb * 1e9)
    if options.save:
        save(options.run, metrics, rows, vars(args))
    print_table(metrics, f"{options.run}, {options.split} split")


if __name__ == "__main__":
    main()
