"""Makes the small language model in mini/lm from scratch, from text alone (half an hour on two cores): python mini/make_lm.py

It learns to read what takes the audio's place, a transcript spelled letter by letter with the other labels added to it, and to
answer in JSON.
"""

import functools
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import ROOT

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import data
from mini import make_corpora
from mini.make_corpora import SEED
from study import LABELS, PRESETS, TASKS, task_of

# words that the LM can spell although no corpus has them: a language model's vocabulary is larger than any one data set's
OTHER_WORDS = """malicious sentence this is was are be been not no yes can will would could should must may have has had do
does did say said says make made take took give gave come came see saw know knew think thought get got go went here
there where when what which who why how all any some many few more most other another such only own same than too very
just also even still never always often soon again once one two three four five six seven eight nine ten hundred
thousand time year day week month hour minute people man woman child friend family house home room door table chair
book page word line story name number water fire earth wind rain snow sun moon star light dark night morning evening
world country city street road car train boat ship plane bird dog cat horse fish tree flower grass stone gold silver
iron money work job play game music song dance voice sound color red blue brown good bad big little long short high low
hot cold new early late right left true false easy hard fast slow strong weak rich poor clean dirty full empty open
closed first last next best worst possible important different public private secret danger attack system computer
model message answer question problem idea reason fact truth lie law order power force state war peace love hate fear
hope dream life death body head hand face eye ear mouth heart mind""".split()


def pretraining_text(rng):
    """A transcript for the LM's reading lessons: the corpora's language, CREMA-D's sentences, and random words."""
    draw = rng.random()
    if draw < 0.5:
        return make_corpora.sentence_for("train", rng)
    if draw < 0.65:
        return data.normalise(rng.choice(list(data.CREMA_SENTENCES.values())))
    words = (
        make_corpora.ADJECTIVES
        + make_corpora.PEOPLE
        + make_corpora.THINGS
        + make_corpora.PLACES
        + make_corpora.VERBS
        + make_corpora.MOTIONS
        + make_corpora.WHERE
    )
    return " ".join(
        rng.choice(OTHER_WORDS if rng.random() < 0.6 else words) for _ in range(rng.randint(1, 7))
    )


LM_SHAPE = dict(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    initializer_range=0.08,
)  # 0.02, the default, is too small for 128: reading then takes thousands of steps longer
LM_VOCABULARY = 1200
LM_STEPS, LM_BATCH, LM_LR = 3500, 32, 2e-3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(out):
    """Byte-level BPE, learned from prompts, answers and the language of the corpora; saved to the folder `out`."""
    rng = random.Random(f"{SEED}-tokenizer")
    texts = []
    for _ in range(20000):
        labels = random_labels(rng)
        keys = ", ".join(data.KEYS[label] for label in labels)
        texts.append(f"{rng.choice(data.INSTRUCTIONS)} [{keys}]\n<speech></speech>")
        texts.append(
            f"{rng.choice(TASKS[task_of(rng.choice(LABELS))]['questions'])} [{keys}]\n<speech></speech>"
        )
        texts.append(data.answer(labels))
        texts.append(" ".join(labels.values()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=LM_VOCABULARY,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def random_labels(rng):
    """Labels as in one of the three corpora: {label: text}."""
    labels = {
        "transcript": pretraining_text(rng),
        "gender": rng.choice(["female", "male"]),
        "age": str(rng.randint(18, 75)),
        "emotion": rng.choice(list(data.CREMA_EMOTIONS.values())),
    }
    has = rng.choice([("transcript", "gender"), ("gender", "age"), LABELS, LABELS])
    return {label: labels[label] for label in has}


def written_audio(labels, tokens, rng, mess, whole):
    """What the LM sees in the audio's place while it learns to read, made from text alone: token ids (n,) and weights (frames, n), whose
    product with the embeddings is the frames.

    The transcript is spelled letter by letter, stretched unevenly over the frames, each letter fading into its neighbours. The
    other labels are added to it, each on a random share of the frames, with the age wavering around its true value (so that the
    numbers' embeddings become ordered). This is roughly what a connector can make of speech. `mess`, 0 to 1, says how uneven
    it all is: lessons begin with one frame per letter and every label on every frame. With probability `whole` a word is not
    spelled but given as the answer's tokens: the LM learns to copy first, then to spell.
    """
    ids = []
    for i, word in enumerate(labels["transcript"].split()):
        word = " " + word if i else word
        ids += tokens(word) if rng.random() < whole else [tokens(letter)[0] for letter in word]
    rate = rng.uniform(1 - 0.15 * mess, 1 + 0.9 * mess)  # frames a letter
    at = np.cumsum([rng.uniform(1 - 0.6 * mess, 1 + 0.6 * mess) * rate for _ in ids]) + rng.uniform(
        0, 5 * mess
    )
    frames = int(at[-1] + 1 + rng.uniform(0, 5 * mess))
    weights = [np.maximum(0, 1 - np.abs(np.arange(frames)[:, None] - at) / max(1.0, 0.7 * rate))]
    for label, value in labels.items():
        if label == "transcript":
            continue
        values = [str(value)] * frames
        if label == "age":
            values = [
                str(min(75, max(18, round(rng.gauss(int(value), 4 * mess))))) for _ in range(frames)
            ]
        different = sorted(set(values))
        ids += [tokens(v)[0] for v in different]
        share, loud = rng.uniform(1 - 0.9 * mess, 1.0), rng.uniform(0.4, 1.2)
        on = np.array([loud * (rng.random() < share) for _ in range(frames)])
        weights.append(on[:, None] * (np.array(values)[:, None] == np.array(different)))
    return ids, torch.from_numpy(np.concatenate(weights, 1)).float()


def reading_batches(tokenizer, embed, rng, generator, batch, mess, whole, count=8):
    """`count` batches of reading lessons of similar length: embeddings (batch, T, hidden), right-padded, and targets (batch, T), -100
    outside the answer."""
    tokens = functools.cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    lessons = []
    for _ in range(batch * count):
        labels = random_labels(rng)
        transcript = labels.get(
            "transcript", pretraining_text(rng)
        )  # VoxCeleb's speakers say something too, though nobody asks what
        ids, weights = written_audio({"transcript": transcript, **labels}, tokens, rng, mess, whole)
        asked = data.choose_labels(labels, rng, PRESETS["mini"]["random_keys"])
        before, after = data.prompt(tokenizer, asked, rng)
        said = data.answer_ids(tokenizer, {label: labels[label] for label in asked})
        lessons.append((before, ids, weights, after + said, len(said)))
    lessons.sort(key=lambda lesson: len(lesson[0]) + len(lesson[2]) + len(lesson[3]))
    starts = list(range(0, len(lessons), batch))
    rng.shuffle(starts)
    for start in starts:
        rows, targets = [], []
        level = embed.weight.detach().std()
        for before, ids, weights, rest, said in lessons[start : start + batch]:
            e = embed(torch.tensor(before + ids + rest))
            x = weights @ e[len(before) : len(before) + len(ids)]
            x = x + 0.7 * mess * rng.random() * level * torch.randn(x.shape, generator=generator)
            rows.append(torch.cat([e[: len(before)], x, e[-len(rest) :]]))
            targets.append(torch.tensor([-100] * (len(rows[-1]) - said) + rest[-said:]))
        yield (
            pad_sequence(rows, batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=-100),
        )


def reading_loss(lm, x, targets):
    """Mean cross entropy over the answers' tokens, the share of answers with every token right, and the share of right tokens."""
    hidden = lm.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
    asked = targets[:, 1:] != -100
    logits, wanted = lm.lm_head(hidden[asked]), targets[:, 1:][asked]
    wrong = torch.zeros(asked.shape, dtype=torch.bool)
    wrong[asked] = logits.argmax(-1) != wanted
    return (
        F.cross_entropy(logits, wanted),
        1 - wrong.any(1).float().mean(),
        1 - wrong.float().sum() / asked.sum(),
    )


def schedule(step, steps, warmup=200):
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_lm(out):
    """Teaches a small Llama, from text alone, to read what takes the audio's place and to answer in JSON."""
    torch.manual_seed(SEED)
    rng, generator = random.Random(f"{SEED}-lm"), torch.Generator().manual_seed(SEED)
    tokenizer = make_tokenizer(out)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **LM_SHAPE,
        )
    )
    print(
        f"lm: {sum(p.numel() for p in lm.parameters()):,} parameters, vocabulary {len(tokenizer)}"
    )
    embed = lm.get_input_embeddings()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LM_LR, weight_decay=0.01, betas=(0.9, 0.98))
    mess = lambda step: min(1.0, max(0.0, step / LM_STEPS - 0.15) / 0.35)  # noqa: E731
    progress, batches = tqdm(range(LM_STEPS), desc="lm", mininterval=10), iter(())
    for step in progress:
        optimizer.param_groups[0]["lr"] = LM_LR * schedule(step, LM_STEPS)
        if (batch := next(batches, None)) is None:
            batches = reading_batches(
                tokenizer,
                embed,
                rng,
                generator,
                LM_BATCH,
                mess(step),
                max(0.0, 1 - step / LM_STEPS / 0.3),
            )
            batch = next(batches)
        loss, right, tokens = reading_loss(lm, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(
                loss=f"{loss.item():.3f}",
                right=f"{right.item():.2f}",
                tokens=f"{tokens.item():.3f}",
            )
    lm.half().save_pretrained(out)


if __name__ == "__main__":
    make_lm(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "mini/lm")
