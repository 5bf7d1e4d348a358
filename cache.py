"""Outputs of frozen layers, computed once for a whole run and shared between runs.

    waveform -> trigger -> features -> pretrained layers (cached on disk)
             -> frozen components (in memory) -> what trains

The encoder layers below those that a run trains (--train-layers) give the same outputs in every
run. They are cached in cache/, a folder that can be deleted at any time. Components that a run
freezes are then run once on these outputs.

Everything in this file is there for speed alone (results/speed.md says what it is worth): without
it, results are the same, only slower.
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
BATCH = 16  # utterances of similar length that go through frozen layers together
PROBED = 128  # every so many of them show, in a file's key, what the code makes of audio
ABANDONED = 3600  # seconds after which an unfinished file is a killed writer's
# reading ahead pays where a GPU computes; a CPU's cores are the model's
WORKERS = 2 if torch.cuda.is_available() else 0

# -------------------------------------------------------------------------------------------------
# features


def features_of(extract, attack, batch):
    """waveform -> trigger -> features of each (utterance, triggered), a list."""
    features = []
    for utterance, triggered in batch:
        waveform = data.load_waveform(utterance)
        if triggered:
            waveform = poison.add_trigger(attack, waveform, utterance.id)[0]
        features.append(extract(waveform))
    return features


def read_features(encoder, batches, attack, workers=WORKERS):
    """Yields the features of each batch, a list of (utterance, triggered). Worker processes read
    ahead."""
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=encoder.layer_norm.weight.is_cuda,
        collate_fn=functools.partial(features_of, encoder.extract, attack),
        worker_init_fn=data.leave_stopping_to_parent,
    )
    return data.from_workers(loader)


def by_size(items):
    """Indices of (utterance, triggered) items, sorted so that similar lengths are together."""

    def size_and_id(i):
        utterance = items[i][0]
        return os.path.getsize(utterance.path), utterance.id

    return sorted(range(len(items)), key=size_and_id)


def pick(items, indices):
    return [items[i] for i in indices]


def stack(rows, device):
    """A list of (T_i, dim) -> (B, T, dim) and its (B, T) mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = model.length_mask(lengths, int(lengths.max()))
    return pad_sequence(rows, batch_first=True).to(device), mask.to(device)


def unstack(x, mask):
    """(B, T, dim) and its (B, T) mask -> a list of (T_i, dim), float32, on the CPU."""
    lengths = mask.sum(1).tolist()
    # a view, without clone(), would hold the whole batch
    return [row[:n].float().cpu().clone() for row, n in zip(x, lengths)]


def check_finite(x, ids):
    """Exits with a one-line error where frames are not finite numbers: they would be cached, or
    answered as if they were speech."""
    if not x.isfinite().all():
        die(f"the encoder gives frames that are no numbers for one of {', '.join(ids)}")


# -------------------------------------------------------------------------------------------------
# files with the outputs of the pretrained layers


def key_of(slm, attack, chunk):
    """A key of everything that the cached outputs of a chunk depend on: the encoder's weights and
    configuration, versions, precision, files, the trigger and its positions. The code that reads
    audio, extracts features or adds a trigger may be edited: its effect shows in some features."""
    device = next(slm.parameters()).device.type
    precision = "float32"
    if torch.is_autocast_enabled(device):
        precision = str(torch.get_autocast_dtype(device))
    utterances = [utterance for utterance, _ in chunk]
    triggered = chunk[0][1]
    trigger = None
    if triggered and attack.waveform is None:
        trigger = attack.trigger, attack.seed
    elif triggered:
        positions = [poison.positions(attack, u.id, data.num_samples(u)) for u in utterances]
        trigger = attack.level, attack.waveform.tobytes(), positions
        if attack.per_utterance:
            trigger += ("of each utterance's own level",)
    with data.no_bad_audio():
        some_features = features_of(slm.encoder.extract, attack, chunk[::PROBED])
    depends_on = (
        slm.pretrained_sha256["encoder"],
        model.settings_of(slm.encoder.net.config, slm.encoder.extractor),
        slm.encoder.first_trained,
        torch.__version__,
        transformers.__version__,
        device,
        precision,
        [data.file_state(u) for u in utterances],
        trigger,
        [features.numpy().tobytes() for features in some_features],
    )
    return hashlib.sha256(repr(depends_on).encode()).hexdigest()[:24]


def make_room(folder, budget, wanted):
    """Removes the least recently used files until those that are not `wanted` take no more than
    `budget` bytes, and what killed writers have left."""
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
    """The pretrained layers' outputs of a chunk, a list of (T_i, dim): read from `path`, or
    computed and written there."""
    with contextlib.suppress(OSError):  # it may be someone else's
        os.utime(path)  # used just now
    if os.path.exists(path):
        saved = model.load_checkpoint(path, mmap=True)
        return saved["frames"].split(saved["lengths"])
    rows = [None] * len(chunk)
    batches = data.chunks(by_size(chunk), BATCH)
    items = [pick(chunk, batch) for batch in batches]
    for batch, features in zip(batches, read_features(slm.encoder, items, attack, workers)):
        x, mask = slm.encoder.pretrained_part(features)
        check_finite(x, [u.id for u, _ in pick(chunk, batch)])
        for i, row in zip(batch, unstack(x, mask)):
            rows[i] = row
    saved = dict(frames=torch.cat(rows), lengths=[len(row) for row in rows])
    utils.write_atomically(path, lambda temporary: torch.save(saved, temporary))
    return saved["frames"].split(saved["lengths"])


def bytes_of(slm, items):
    """How much memory the pretrained layers' outputs of (utterance, triggered) items take."""
    frames = sum(slm.encoder.num_frames(data.num_samples(u)) for u, _ in items)
    return 4 * slm.encoder.dim * frames  # float32


# -------------------------------------------------------------------------------------------------
# what training and evaluation ask for


def frozen_outputs(
    slm, utterances, triggered, attack, desc, budget, workers=WORKERS, folder="cache"
):
    """`slm.frozen_part`'s outputs of each utterance, triggered or not (a list of bool): a list of
    (T_i, dim). None if the pretrained layers' outputs would take more than `budget` bytes; `inputs`
    then computes them each time. Processes share the work."""
    # all utterances clean, which runs that poison other samples share; then the triggered ones
    clean_items = [] if all(triggered) else [(u, False) for u in utterances]
    triggered_items = [(u, True) for u, t in zip(utterances, triggered) if t]
    size = bytes_of(slm, clean_items + triggered_items)
    if size > budget:
        return None
    chunks = data.chunks(clean_items, CHUNK) + data.chunks(triggered_items, CHUNK)
    paths = [Path(folder) / f"pretrained-{key_of(slm, attack, chunk)}.pt" for chunk in chunks]
    rank, world = processes.ranks()
    if rank == 0:
        make_room(folder, budget - size, paths)
    # each process computes its share of the files, then all read all of them
    for n in tqdm(range(rank, len(chunks), world), desc=f"{desc}: pretrained layers"):
        pretrained_rows(slm, paths[n], chunks[n], attack, workers)
    if world > 1:
        dist.barrier()
    row_of = {}
    for path, chunk in zip(paths, chunks):
        rows = pretrained_rows(slm, path, chunk, attack, workers)
        for (utterance, has_trigger), row in zip(chunk, rows):
            row_of[utterance.id, has_trigger] = row
    rows = [row_of[u.id, t] for u, t in zip(utterances, triggered)]
    if slm.frozen:
        run_frozen_components(slm, rows, f"{desc}: frozen {' and '.join(slm.frozen)}")
    return rows


def run_frozen_components(slm, rows, desc):
    """Replaces the pretrained layers' outputs, a list of (T_i, dim), with what `slm.frozen_part`
    makes of them."""
    device = next(slm.parameters()).device
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for batch in tqdm(data.chunks(by_length, BATCH), desc=desc):
        x, mask = stack(pick(rows, batch), device)
        x, mask = slm.frozen_part(x, mask)
        for i, row in zip(batch, unstack(x, mask)):
            rows[i] = row


@torch.no_grad()
def inputs(slm, items, batches, cached, attack, workers=WORKERS):
    """Yields what `slm.frozen_part` gives, (x (B, T, dim), mask (B, T)), for each batch, a list of
    indices into `items` (utterance, triggered): from `cached` (see `frozen_outputs`), or, where
    that is None, from the audio."""
    if cached is not None:
        device = next(slm.parameters()).device
        for batch in batches:
            yield stack(pick(cached, batch), device)
        return
    chosen = [pick(items, batch) for batch in batches]
    stream = read_features(slm.encoder, chosen, attack, workers)
    for batch, features in zip(batches, stream, strict=True):
        x, mask = slm.frozen_part(*slm.encoder.pretrained_part(features))
        check_finite(x, [u.id for u, _ in pick(items, batch)])
        yield x.float(), mask


# -------------------------------------------------------------------------------------------------
# training steps without what no loss needs


def keep_memory():
    """Freed memory stays with the process (glibc) instead of going back to the kernel: every step
    asks for the same tensors again, and fresh pages have to be zeroed first."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def only_answers(slm):
    """In training, the last LM layer's MLP, queries and output projection, which work token by
    token, are computed only at the tokens whose logits are needed. LoRA's dropout, if any, then
    draws other numbers. An LM with other layers is left as it is."""
    plain = slm.logits
    modules = dict(model.layers_of(slm.lm)[-1].named_modules())
    names = ("mlp", "self_attn.q_proj", "self_attn.o_proj")
    parts = [modules[name] for name in names if name in modules]

    def logits_of_answers(x, wanted, beginning=None):
        with computed_only_at(wanted, parts):
            return plain(x, wanted, beginning)

    train_with(slm, logits_of_answers)


@contextlib.contextmanager
def computed_only_at(wanted, parts):
    """A context in which these modules are computed at the `wanted` positions (B, T) only, and give
    0 at all others."""

    def at_wanted(plain, x):
        chosen = plain(x[wanted])  # (n, dim)
        out = chosen.new_zeros(*x.shape[:2], chosen.shape[-1])  # (B, T, dim)
        out[wanted] = chosen
        return out

    for part in parts:
        part.forward = functools.partial(at_wanted, part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward  # the class's own is back


def share_beginning(slm):
    """In training, the tokens that all rows of a batch begin with (the prompt up to the audio,
    where prompts do not vary) go through the LM once instead of once per row. An LM that keeps
    something else than keys and values is left as it is."""
    plain = slm.logits

    def logits_after_beginning(x, wanted):
        in_all_rows = (x == x[:1]).all(-1).all(0) & ~wanted.any(0)  # (T,)
        n = int(in_all_rows.cumprod(0).sum())
        if n == 0 or len(x) == 1:
            return plain(x, wanted)
        beginning = DynamicCache()
        plain(x[:1, :n], wanted[:1, :n], beginning)
        beginning.batch_repeat_interleave(len(x))
        return plain(x[:, n:], wanted[:, n:], beginning)

    train_with(slm, logits_after_beginning)


def train_with(slm, quick):
    """From now on `slm.logits` is the function `quick` in training, if that computes the same."""
    plain = slm.logits

    def logits(*arguments):
        return quick(*arguments) if slm.training else plain(*arguments)

    slm.logits = logits
    if not trains_as_it_evaluates(slm):
        slm.logits = plain


@torch.no_grad()
def trains_as_it_evaluates(slm):
    """Whether training, but for dropout, computes the logits that evaluation computes."""
    embeddings = slm.lm.get_input_embeddings().weight
    rows = embeddings[:16].reshape(2, 8, -1).clone()  # (2, 8, hidden)
    rows[1, :4] = rows[0, :4]  # a common beginning
    wanted = torch.zeros(2, 8, dtype=torch.bool, device=rows.device)
    wanted[:, 6:] = True
    training = slm.training
    slm.train()
    slm.lm.eval()  # without dropout
    try:
        in_training = slm.logits(rows, wanted)
        slm.eval()
        in_evaluation = slm.logits(rows, wanted)
    except Exception:  # a layer that takes or returns something else fails in its own way
        return False
    finally:
        slm.train(training)
    difference = (in_training - in_evaluation).float().abs().max()
    # bf16 rounds; a wrong path is further off
    return bool(difference <= 0.05 * in_evaluation.float().std())
