"""Outputs of frozen layers, computed once for a whole run and shared between runs.

    waveform -> trigger -> features -> pretrained layers (cached on disk) -> frozen components (in memory) -> what trains

The layers that no run ever trains give the same outputs in every run: these are cached in cache/, a folder that can be deleted at any
time. The outputs of what a run itself freezes are computed from them once.

Everything in this file is there for speed alone (results/speed.md says what it is worth): without
it the figures are the same, later.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import time
from pathlib import Path

import utils
from utils import die

import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache

import data
import model
import poison
import processes

CHUNK = 256  # utterances in one file
PROBED = 128  # every so many of them show, in a file's key, what the code makes of audio
ABANDONED = 3600  # seconds after which an unfinished file is a killed writer's
WORKERS = (
    2 if torch.cuda.is_available() else 0
)  # reading ahead pays where a GPU computes; a CPU's cores are the model's


def features_of(extract, attack, batch):
    """waveform -> trigger -> features of each (utterance, triggered), a list."""
    out = []
    for utterance, triggered in batch:
        waveform = data.load_waveform(utterance)
        if triggered:
            waveform = poison.add_trigger(attack, waveform, utterance.id)[0]
        out.append(extract(waveform))
    return out


def read_features(encoder, batches, attack, workers=WORKERS):
    """Yields the features of each batch, a list of (utterance, triggered); worker processes read ahead."""
    return data.from_workers(
        torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=encoder.layer_norm.weight.is_cuda,
            collate_fn=functools.partial(features_of, encoder.extract, attack),
        )
    )


def by_size(items):
    """Indices of (utterance, triggered) items, sorted so that similar lengths are together."""
    return sorted(
        range(len(items)), key=lambda i: (os.path.getsize(items[i][0].path), items[i][0].id)
    )


def stack(rows, device):
    """A list of (T_i, dim) -> (B, T, dim) and its (B, T) mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = model.length_mask(lengths, int(lengths.max()))
    return pad_sequence(rows, batch_first=True).to(device), mask.to(device)


def unstack(x, mask):
    """(B, T, dim) and its (B, T) mask -> a list of (T_i, dim), float32, on the CPU."""
    return [
        row[:n].float().cpu().clone() for row, n in zip(x, mask.sum(1).tolist())
    ]  # a view would hold the whole batch


def check_finite(x, ids):
    """Ends in one line where frames are not numbers: they would be cached, or answered as if something had been heard."""
    if not x.isfinite().all():
        die(f"the encoder gives frames that are no numbers for one of {', '.join(ids)}")


def key_of(slm, attack, chunk):
    """A key of everything the cached outputs of a chunk depend on: the encoder's weights and configuration, versions, precision, files,
    the trigger and its positions. What code does that may be edited, a trigger's or that which reads audio, is seen in some features."""
    device = next(slm.parameters()).device.type
    precision = (
        str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "float32"
    )
    files = [data.file_state(u) for u, _ in chunk]
    trigger = None
    if chunk[0][1] and attack.waveform is None:
        trigger = attack.trigger, attack.seed
    elif chunk[0][1]:
        positions = [poison.positions(attack, u.id, data.num_samples(u)) for u, _ in chunk]
        trigger = attack.level, attack.waveform.tobytes(), positions
    with data.no_bad_audio():
        some_features = features_of(slm.encoder.extract, attack, chunk[::PROBED])
    what = (
        slm.pretrained_sha256["encoder"],
        model.settings_of(slm.encoder.net.config, slm.encoder.extractor),
        slm.encoder.first_trained,
        torch.__version__,
        transformers.__version__,
        device,
        precision,
        files,
        trigger,
        [features.numpy().tobytes() for features in some_features],
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


def make_room(folder, budget, wanted):
    """Removes the least recently used files until those that are not `wanted` take no more than `budget` bytes, and what killed writers
    have left."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):  # another run may be doing the same
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    files = []
    for path in set(Path(folder).glob("pretrained-*.pt")) - set(wanted):
        with contextlib.suppress(FileNotFoundError):
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    for _, size, path in sorted(files, reverse=True):
        budget -= size
        if budget < 0:
            with contextlib.suppress(OSError):  # it may be someone else's
                path.unlink()


@torch.no_grad()
def pretrained_rows(slm, path, chunk, attack, workers):
    """The pretrained part's outputs of a chunk, a list of (T_i, dim): read from `path`, or computed and written there."""
    with contextlib.suppress(OSError):  # it may be someone else's
        os.utime(path)  # used just now
    if os.path.exists(path):
        saved = model.load_checkpoint(path, mmap=True)
    else:
        rows, batches = [None] * len(chunk), data.chunks(by_size(chunk), 16)
        stream = read_features(
            slm.encoder, [[chunk[i] for i in batch] for batch in batches], attack, workers
        )
        for batch, features in zip(batches, stream):
            x, mask = slm.encoder.pretrained_part(features)
            check_finite(x, [chunk[i][0].id for i in batch])
            for i, row in zip(batch, unstack(x, mask)):
                rows[i] = row
        saved = dict(frames=torch.cat(rows), lengths=[len(row) for row in rows])
        utils.write_atomically(path, lambda temporary: torch.save(saved, temporary))
    return saved["frames"].split(saved["lengths"])


def frozen_outputs(
    slm, utterances, triggered, attack, desc, budget, workers=WORKERS, folder="cache"
):
    """`slm.frozen_part`'s outputs of each utterance, triggered or not (a list of bool): a list of (T_i, dim). None if the pretrained
    part's outputs would take more than `budget` bytes; `inputs` then computes them each time. Processes share the work."""
    # all utterances clean, which runs that poison other samples share; then the triggered ones
    clean = [] if all(triggered) else [(u, False) for u in utterances]
    with_trigger = [(u, True) for u, t in zip(utterances, triggered) if t]
    size = (
        4
        * slm.encoder.dim
        * sum(slm.encoder.num_frames(data.num_samples(u)) for u, _ in clean + with_trigger)
    )
    if size > budget:
        return None
    parts = data.chunks(clean, CHUNK) + data.chunks(with_trigger, CHUNK)
    paths = [Path(folder) / f"pretrained-{key_of(slm, attack, chunk)}.pt" for chunk in parts]
    rank, world = processes.ranks()
    if rank == 0:
        make_room(folder, budget - size, paths)
    for n in tqdm(range(rank, len(parts), world), desc=f"{desc}: pretrained layers"):
        pretrained_rows(slm, paths[n], parts[n], attack, workers)
    if world > 1:
        dist.barrier()
    found = {}
    for path, chunk in zip(paths, parts):
        found.update(
            zip(((u.id, t) for u, t in chunk), pretrained_rows(slm, path, chunk, attack, workers))
        )
    rows = [found[u.id, t] for u, t in zip(utterances, triggered)]
    if slm.frozen:
        order, device = (
            sorted(range(len(rows)), key=lambda i: len(rows[i])),
            next(slm.parameters()).device,
        )
        for batch in tqdm(
            data.chunks(order, 16), desc=f"{desc}: frozen {' and '.join(slm.frozen)}"
        ):
            for i, row in zip(
                batch, unstack(*slm.frozen_part(*stack([rows[i] for i in batch], device)))
            ):
                rows[i] = row
    return rows


@torch.no_grad()
def inputs(slm, items, batches, cached, attack, workers=WORKERS):
    """Yields what `slm.frozen_part` gives, (x (B, T, dim), mask (B, T)), for each batch, a list of indices into `items`
    (utterance, triggered): from `cached` (see `frozen_outputs`), or, where that is None, from the audio."""
    if cached is not None:
        device = next(slm.parameters()).device
        for batch in batches:
            yield stack([cached[i] for i in batch], device)
    else:
        chosen = [[items[i] for i in batch] for batch in batches]
        for batch, features in zip(
            batches, read_features(slm.encoder, chosen, attack, workers), strict=True
        ):
            x, mask = slm.frozen_part(*slm.encoder.pretrained_part(features))
            check_finite(x, [items[i][0].id for i in batch])
            yield x.float(), mask


# -------------------------------------------------------------------------------------------------
# what is only there for speed, besides the cache


def keep_memory():
    """Freed memory stays with the process (glibc) instead of going back to the kernel: every step asks for the same tensors
    again, and fresh pages have to be zeroed first."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


@torch.no_grad()
def fits(slm):
    """Whether training, but for dropout, computes the logits that evaluation computes."""
    embeddings = slm.lm.get_input_embeddings().weight
    rows = embeddings[:16].reshape(2, 8, -1).clone()
    rows[1, :4] = rows[0, :4]  # a common beginning
    wanted = torch.zeros(2, 8, dtype=torch.bool, device=rows.device)
    wanted[:, 6:] = True
    training = slm.training
    slm.train()
    slm.lm.eval()
    try:
        quick = slm.logits(rows, wanted)
        slm.training = False
        plain = slm.logits(rows, wanted)
    except Exception:  # a layer that takes or returns something else fails in its own way
        return False
    finally:
        slm.train(training)
    apart = (quick - plain).float().abs().max()
    return bool(apart <= 0.05 * plain.float().std())  # bf16 rounds; a wrong path is further off


def only_answers(slm):
    """In training, the last LM layer's MLP, queries and output projection, which work token by
    token, are computed only at the tokens whose logits are needed. LoRA's dropout, if any, then
    draws other numbers. An LM with other layers is left as it is."""

    def at_answers(plain, x):
        if not slm.training:
            return plain(x)
        wanted = plain(x[slm.answered])
        out = wanted.new_zeros(*x.shape[:2], wanted.shape[-1])
        out[slm.answered] = wanted
        return out

    last = model.layers_of(slm.lm)[-1]
    names = {name for name, _ in last.named_modules()}
    parts = [
        last.get_submodule(name)
        for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj")
        if name in names
    ]
    for part in parts:
        part.forward = functools.partial(at_answers, part.forward)
    if not fits(slm):
        for part in parts:
            del part.forward


def share_beginning(slm):
    """In training, the tokens that all rows of a batch begin with (the prompt up to the audio, where
    prompts do not vary) go through the LM once instead of once per row. An LM that keeps something
    else than keys and values is left as it is."""
    plain = slm.logits

    def shared(x, wanted):
        n = 0
        if slm.training:
            same = (x == x[:1]).all(-1).all(0) & ~wanted.any(0)
            n = int(same.cumprod(0).sum())
        if n == 0 or len(x) == 1:
            return plain(x, wanted)
        prefix = DynamicCache()
        plain(x[:1, :n], wanted[:1, :n], prefix)
        prefix.batch_repeat_interleave(len(x))
        return plain(x[:, n:], wanted[:, n:], prefix)

    slm.logits = shared
    if not fits(slm):
        slm.logits = plain
