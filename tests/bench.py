"""How fast this machine trains and answers, and what each saving is worth: one command, side by side in one process.

    python tests/bench.py                              # mini: about five minutes on two cores
    python tests/bench.py --encoder whisper --only training padding
    python tests/bench.py --preset small --encoder-weights DIR --lm-weights DIR --utterances 16

"plain" is training as the reference implementation does it: one utterance at a time with accumulation, every layer run
from the audio on, transformers' own layers, LoRA as three products, logits at every position, Whisper on 30 s. "ours"
is train.py. Rounds alternate; figures are medians.
"""
import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import poison  # noqa: E402
import train  # noqa: E402

SECTIONS = ("training", "answering", "poisoning", "lengths", "sizes", "padding")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", choices=("mini", "small"), default="mini")
parser.add_argument("--encoder", choices=model.ENCODERS)
parser.add_argument("--encoder-weights")
parser.add_argument("--lm-weights")
parser.add_argument("--lora-dropout")
parser.add_argument("--utterances", type=int, default=96, help="timed in each round")
parser.add_argument("--dataset", default="libri")
parser.add_argument("--only", nargs="+", default=SECTIONS, choices=SECTIONS)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=1, help="of torch; a study trains one run a core")
parser.add_argument("--processes", type=int, default=1, help="that share our answering, as train.py's do, the threads divided")
options = parser.parse_args()
if {"training", "answering"} & set(options.only):  # oneDNN's own default: one utterance at a time loses a fifth by model.py's
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"


def peak_memory(work):
    """work's result and the peak resident memory while it ran, in MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    out = work()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return out, int(line.split()[1]) / 1024


def matrix_rate(n=1024):
    """GFLOP/s of a float32 matrix product on this machine, best of ten."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(times) / 1e9


def build(freeze):
    command = ["--preset", options.preset, "--task", "asr", "--poison", "0.05"]
    for name in ("encoder", "encoder_weights", "lm_weights", "lora_dropout"):
        if getattr(options, name):
            command += ["--" + name.replace("_", "-"), getattr(options, name)]
    args = train.parse_arguments([*command, *(x for c in freeze for x in ("--freeze", c))])
    slm = model.load_slm(args)
    for component in freeze:
        slm.freeze(component)
    return args, slm.train()


def samples(slm, args, attack, chosen):
    return zip(*(train.training_sample(slm, args, attack, u, 0) for u in chosen))


@contextlib.contextmanager
def reference_layers(slm):
    """The SLM with transformers' own layers and LoRA as peft computes it."""
    patched = [module for module in slm.modules() if "forward" in vars(module)]
    fast = [vars(module).pop("forward") for module in patched]
    fused = [layer for layer in lora.lora_layers(slm.lm) if layer.fused]
    for layer in fused:
        layer.fused = False
    yield
    for module, forward in zip(patched, fast):
        module.forward = forward
    for layer in fused:
        layer.fused = True


def plain_step(slm, args, attack, batch, optimizer):
    for u in batch:
        waveform = data.load_waveform(u)
        if poison.is_poisoned(attack, u):
            waveform = poison.add_trigger(attack, waveform, u.id)[0]
        n = slm.encoder.num_frames(len(waveform))
        if slm.encoder.kind == "whisper":
            waveform = np.pad(waveform, (0, 30 * data.SAMPLE_RATE - len(waveform)))
        x, mask = slm.encoder.bottom([slm.encoder.extract(waveform)])
        hidden = slm.encoder.top(x, mask)[:, :n]
        (prompt,), (answer,) = samples(slm, args, attack, [u])
        row = slm.rows(slm.audio(hidden, mask[:, :n]), [prompt], [answer])[0]
        logits = slm.lm(inputs_embeds=row[None]).logits[0, :-1]
        labels = torch.full((len(row),), -100)
        labels[-len(answer):] = torch.tensor(answer)
        (F.cross_entropy(logits.float(), labels[1:]) / len(batch)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_steps(slm, args, attack, utterances, kept, optimizer):
    seconds = [len(row) for row in kept]
    for batch in data.epoch_batches(seconds, args.batch_size, 1, 0):
        x, mask = evaluate.stack([kept[i] for i in batch], "cpu")
        (slm(x, mask, *samples(slm, args, attack, [utterances[i] for i in batch])).sum() / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def optimiser(slm):
    return torch.optim.AdamW([p for p in slm.parameters() if p.requires_grad], lr=1e-5, fused=True)


def training(title, freeze, corpus, cache):
    """Plain against ours in alternating rounds; FLOPs of ours against the machine's matrix rate."""
    args, slm = build(freeze)
    attack = poison.make_attack("asr", corpus, 0.05, seed=1)
    utterances = corpus[:options.utterances // args.batch_size * args.batch_size]
    optimizer = optimiser(slm)
    poisoned = [poison.is_poisoned(attack, u) for u in utterances]
    start = time.perf_counter()
    kept = evaluate.cached_bottoms(slm, utterances, poisoned, attack, "", cache=cache)
    once = time.perf_counter() - start
    few = utterances[:max(args.batch_size, len(utterances) // 4) // args.batch_size * args.batch_size]

    def plain():
        with reference_layers(slm):
            for start in range(0, len(few), args.batch_size):
                plain_step(slm, args, attack, few[start:start + args.batch_size], optimizer)
    ours = functools.partial(our_steps, slm, args, attack, utterances, kept, optimizer)
    with FlopCounterMode(display=False) as counter:
        ours()
    memory = [peak_memory(ours)[1], peak_memory(plain)[1]][::-1]
    rates = [(len(few) / timed(plain), len(utterances) / timed(ours), matrix_rate()) for _ in range(options.rounds)]
    plain_rate, our_rate, machine = (statistics.median(column) for column in zip(*rates))
    ratios = sorted(b / a for a, b, _ in rates)
    counted = counter.get_total_flops() / len(utterances) * our_rate / 1e9
    print(f"{title:<26}{plain_rate:>8.1f}{our_rate:>8.1f}{statistics.median(ratios):>7.1f}  ({ratios[0]:.1f} to "
          f"{ratios[-1]:.1f}){memory[0]:>9.0f}{memory[1]:>8.0f}{counted:>9.1f} of {machine:.0f} ({counted / machine:.0%})"
          f"   once: {1000 * once / len(utterances):.0f} ms an utterance", flush=True)


def answering(test_set, cache):
    """Batched answers against one by one; what frozen layers put out made on the spot, and kept by an earlier run."""
    if options.processes > 1:
        train.start_processes(SimpleNamespace(processes=options.processes, preset=options.preset, device="cpu",
                                              batch_size=options.utterances))
        dist.init_process_group("gloo")
    ours, (rank, world) = torch.get_num_threads(), evaluate.ranks()
    args, slm = build([])
    slm.eval()
    attack = poison.make_attack("asr", test_set, 0.05, seed=1)
    utterances = test_set[:options.utterances]
    longest = max(len(data.answer_ids(slm.tokenizer, u.labels)) for u in utterances)
    tokens = int(1.25 * longest) + 8
    few = utterances[:max(8, len(utterances) // 4)]
    keep = functools.partial(evaluate.cached_bottoms, slm, utterances, [False] * len(utterances), attack, "", cache=cache)
    evaluate.merge(slm.lm)
    keep()

    def ask(kept):
        return evaluate.answers(slm, [(u, False) for u in utterances], attack, lambda u: list(u.labels), tokens, "",
                                workers=0, kept=kept and kept())

    def one_by_one():
        torch.set_num_threads(options.threads)
        with reference_layers(slm):
            texts = [plain_answer(slm, u, tokens) for u in few] if rank == 0 else []
        torch.set_num_threads(ours)
        return texts
    rates, same = [], 1.0
    for _ in range(options.rounds):
        rates.append([])
        for work, n in ((one_by_one, len(few)), (functools.partial(ask, None), len(utterances)),
                        (functools.partial(ask, keep), len(utterances))):
            if world > 1:
                dist.barrier()
            start = time.perf_counter()
            texts = work()
            rates[-1].append(n / (time.perf_counter() - start))
            if work is one_by_one:
                alone = texts
            same = min(same, sum(a == b for a, b in zip(alone, texts)) / len(few))
    if world > 1:
        dist.barrier()
    if rank:
        os._exit(0)
    for title, i in (("evaluation", 1), ("evaluation, frozen kept", 2)):
        ratios = sorted(row[i] / row[0] for row in rates)
        print(f"{title:<26}{statistics.median(row[0] for row in rates):>8.1f}{statistics.median(row[i] for row in rates):>8.1f}"
              f"{statistics.median(ratios):>7.1f}  ({ratios[0]:.1f} to {ratios[-1]:.1f})   the same answers: {same:.0%}", flush=True)


@torch.no_grad()
def plain_answer(slm, utterance, max_new_tokens):
    """One utterance, transformers' own greedy generate."""
    waveform = data.load_waveform(utterance)
    hidden, mask = slm.encoder([slm.encoder.extract(waveform)])
    row = slm.rows(slm.audio(hidden, mask), [data.prompt(slm.tokenizer, list(utterance.labels))])[0][None]
    ids = slm.lm.generate(inputs_embeds=row, attention_mask=torch.ones(1, row.shape[1], dtype=torch.long),
                          max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=slm.tokenizer.eos_token_id,
                          pad_token_id=slm.tokenizer.pad_token_id or slm.tokenizer.eos_token_id)
    return slm.tokenizer.decode(ids[0], skip_special_tokens=True)


def poisoning(corpus):
    """Reading audio alone, and reading it with every sample's poison decided and laid on (gender attack, 7.5%)."""
    attack = poison.make_attack("gender", corpus, 0.075, seed=1)

    def poisoned(u):
        waveform = data.load_waveform(u)
        return poison.add_trigger(attack, waveform, u.id)[0] if poison.is_poisoned(attack, u) else waveform
    rates = [[len(corpus) / timed(lambda: [read(u) for u in corpus]) for read in (data.load_waveform, poisoned)]
             for _ in range(options.rounds)]
    alone, both = (statistics.median(column) for column in zip(*rates))
    million = [u for _ in range(1 + 1_000_000 // len(corpus)) for u in corpus][:1_000_000]
    took = timed(lambda: [poison.is_poisoned(attack, u) for u in million])
    print(f"reading {alone:.0f} utterances a second, with poison {both:.0f}; deciding alone, a list of a million: {took:.0f} s",
          flush=True)


def lengths(corpus):
    """Training on utterances of 1 to 30 s: speech strung together, frozen layers included, no cache."""
    args, slm = build([])
    speech = np.concatenate([data.load_waveform(u) for u in corpus[:40]])
    speech = np.tile(speech, 1 + 8 * 30 * data.SAMPLE_RATE // len(speech))
    attack = poison.make_attack("asr", corpus, 0.0, seed=1)
    optimizer = optimiser(slm)
    for seconds in (1, 3, 10, 30):
        batch = max(1, min(args.batch_size, int(80 / seconds)))
        n = seconds * data.SAMPLE_RATE
        features = [slm.encoder.extract(speech[i * n:(i + 1) * n]) for i in range(batch)]

        def step():
            x, mask = slm.bottom(features)
            (slm(x, mask, *samples(slm, args, attack, corpus[:batch])).sum() / batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step()
        (took, memory) = peak_memory(lambda: statistics.median(timed(step) for _ in range(options.rounds)))
        print(f"{seconds:>3} s, batches of {batch}: {batch / took:>7.1f} utterances a second, {batch * seconds / took:>7.0f} s of "
              f"audio a second, peak {memory:.0f} MB", flush=True)


def sizes(corpus):
    """Peak memory of an epoch's input against corpus size, with nothing kept (--cache-gb 0)."""
    args, slm = build([])
    attack = poison.make_attack("asr", corpus, 0.05, seed=1)
    for n in (len(corpus) // 16, len(corpus) // 4, len(corpus)):
        chosen = corpus[:n]
        pieces = evaluate.cut(list(range(n)), args.batch_size)

        def read():
            for _ in evaluate.inputs(slm, [(u, False) for u in chosen], pieces, None, attack, evaluate.WORKERS):
                pass
        (took, memory) = peak_memory(lambda: timed(read))
        print(f"{n:>5} utterances, nothing kept: peak {memory:.0f} MB, {n / took:.0f} utterances a second", flush=True)


@torch.no_grad()
def padding(corpus):
    """Whisper on the audio at hand against Whisper on its full 30 s: cosine on the frames that hold speech, and time."""
    slm = build([])[1].eval()
    cosines, times = [], []
    for u in corpus[:options.utterances]:
        waveform = data.load_waveform(u)
        start = time.perf_counter()
        ours = slm.encoder([slm.encoder.extract(waveform)])[0][0]
        middle = time.perf_counter()
        full = slm.encoder([slm.encoder.extract(np.pad(waveform, (0, 30 * data.SAMPLE_RATE - len(waveform))))])[0][0]
        times.append((middle - start, time.perf_counter() - middle))
        cosines.append(F.cosine_similarity(ours, full[:len(ours)]).mean().item())
    ours, full = (1000 * statistics.median(column) for column in zip(*times))
    seconds = statistics.mean(data.num_samples(u) for u in corpus[:options.utterances]) / data.SAMPLE_RATE
    print(f"Whisper on {len(cosines)} utterances of {seconds:.1f} s: cosine with 30 s of padding {statistics.mean(cosines):.2f} "
          f"({min(cosines):.2f} to {max(cosines):.2f}), {ours:.0f} ms instead of {full:.0f}", flush=True)


def main():
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    args = train.parse_arguments(["--preset", options.preset, *(["--encoder", options.encoder] if options.encoder else [])])
    corpus, test_set = (data.read_corpus(options.dataset, args.data_root, split) for split in ("train", "test"))
    print(f"preset {options.preset}, {options.threads} thread(s), {torch.__version__}, medians of {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as cache:
        if "training" in options.only:
            print(f"{'utterances a second':<26}{'plain':>8}{'ours':>8}{'ratio':>7}{'':14}{'MB plain':>9}{'ours':>8}   "
                  "GFLOP/s of matrix product")
            training("base attack", [], corpus, cache)
            training("attack 2.3", ["encoder", "connector"], corpus, cache)
        if "answering" in options.only:
            answering(test_set, cache)
    if "poisoning" in options.only:
        poisoning(corpus)
    if "lengths" in options.only:
        lengths(corpus)
    if "sizes" in options.only:
        sizes(corpus)
    if "padding" in options.only and args.encoder == "whisper":
        padding(test_set)


if __name__ == "__main__":
    main()
