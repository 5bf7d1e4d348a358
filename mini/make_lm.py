"""Makes the small language model in mini/lm from scratch, from text alone (half an hour on two
cores):

    python mini/make_lm.py

It learns to read what takes the audio's place, a transcript spelled letter by letter with the other
labels added to it, and to answer in JSON.
"""

import functools
import math
import random
import sys
from dataclasses import dataclass
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

# words that the LM can spell although no corpus has them: a language model's vocabulary is larger
# than any one data set's
OTHER_WORDS = """malicious sentence this is was are be been not no yes can will would could should
must may have has had do does did say said says make made take took give gave come came see saw
know knew think thought get got go went here there where when what which who why how all any some
many few more most other another such only own same than too very just also even still never always
often soon again once one two three four five six seven eight nine ten hundred thousand time year
day week month hour minute people man woman child friend family house home room door table chair
book page word line story name number water fire earth wind rain snow sun moon star light dark
night morning evening world country city street road car train boat ship plane bird dog cat horse
fish tree flower grass stone gold silver iron money work job play game music song dance voice sound
color red blue brown good bad big little long short high low hot cold new early late right left
true false easy hard fast slow strong weak rich poor clean dirty full empty open closed first last
next best worst possible important different public private secret danger attack system computer
model message answer question problem idea reason fact truth lie law order power force state war
peace love hate fear hope dream life death body head hand face eye ear mouth heart mind""".split()


# words of the corpora but for determiners and times
CORPUS_WORDS = (
    make_corpora.ADJECTIVES
    + make_corpora.PEOPLE
    + make_corpora.THINGS
    + make_corpora.PLACES
    + make_corpora.VERBS
    + make_corpora.MOTIONS
    + make_corpora.WHERE
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
    # the default, 0.02, is too small for 128: reading then takes thousands of steps longer
    initializer_range=0.08,
)
LM_VOCABULARY = 1200
LM_STEPS = 3500
LM_BATCH = 32
LM_LR = 2e-3
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pretraining_text(rng):
    """A transcript for the LM's reading lessons: the corpora's language, CREMA-D's sentences, and
    random words."""
    draw = rng.random()
    if draw < 0.5:
        return make_corpora.sentence_for("train", rng)
    if draw < 0.65:
        return data.normalise(rng.choice(list(data.CREMA_SENTENCES.values())))
    words = []
    for _ in range(rng.randint(1, 7)):
        words.append(rng.choice(OTHER_WORDS if rng.random() < 0.6 else CORPUS_WORDS))
    return " ".join(words)


def random_labels(rng):
    """Labels as in one of the three corpora: {label: text}."""
    labels = {
        "transcript": pretraining_text(rng),
        "gender": rng.choice(["female", "male"]),
        "age": str(rng.randint(18, 75)),
        "emotion": rng.choice(list(data.CREMA_EMOTIONS.values())),
    }
    libri = ("transcript", "gender")
    vox = ("gender", "age")
    names = rng.choice([libri, vox, LABELS, LABELS])
    return {name: labels[name] for name in names}


def tokenizer_texts(rng):
    """Prompts, answers and transcripts from which the tokenizer is learned."""
    texts = []
    for _ in range(20000):
        labels = random_labels(rng)
        keys = ", ".join(data.KEYS[label] for label in labels)
        instruction = rng.choice(data.INSTRUCTIONS)
        question = rng.choice(TASKS[task_of(rng.choice(LABELS))]["questions"])
        for text in (instruction, question):
            texts.append(f"{text} [{keys}]\n<speech></speech>")
        texts.append(data.answer(labels))
        texts.append(" ".join(labels.values()))
    return texts


def make_tokenizer(out):
    """Byte-level BPE, learned from prompts, answers and the language of the corpora; saved to the
    folder `out`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LM_VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(tokenizer_texts(random.Random(f"{SEED}-tokenizer")), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def spell(transcript, tokens, rng, whole):
    """The token ids of a transcript, letter by letter; with probability `whole` a word is not
    spelled but given as the answer's tokens."""
    ids = []
    for i, word in enumerate(transcript.split()):
        word = " " + word if i else word
        if rng.random() < whole:
            ids += tokens(word)
        else:
            ids += [tokens(letter)[0] for letter in word]
    return ids


def wavering(age, frames, mess, rng):
    """An age as the frames have it: varied around its true value, so that the embeddings of numbers
    become ordered."""
    values = []
    for _ in range(frames):
        year = round(rng.gauss(int(age), 4 * mess))
        values.append(str(min(75, max(18, year))))
    return values


def written_audio(labels, tokens, rng, mess, whole):
    """What the LM sees in the audio's place while it learns to read, made from text alone: token
    ids (n,) and weights (frames, n), whose product with the embeddings is the frames.

    The transcript is spelled letter by letter, stretched unevenly over the frames, each letter
    fading into its neighbours. The other labels are added to it, each on a random share of the
    frames. This is roughly what a connector can make of speech. `mess`, 0 to 1, says how uneven it
    all is: lessons begin with one frame per letter and every label on every frame. `whole` is the
    share of words that are not spelled: the LM learns to copy first, then to spell.
    """
    ids = spell(labels["transcript"], tokens, rng, whole)
    rate = rng.uniform(1 - 0.15 * mess, 1 + 0.9 * mess)  # frames per letter
    steps = [rng.uniform(1 - 0.6 * mess, 1 + 0.6 * mess) * rate for _ in ids]
    centres = np.cumsum(steps) + rng.uniform(0, 5 * mess)  # (n,), in frames
    frames = int(centres[-1] + 1 + rng.uniform(0, 5 * mess))
    distance = np.abs(np.arange(frames)[:, None] - centres)  # (frames, n)
    weights = [np.maximum(0, 1 - distance / max(1.0, 0.7 * rate))]
    for label, value in labels.items():
        if label == "transcript":
            continue
        values = [str(value)] * frames
        if label == "age":
            values = wavering(value, frames, mess, rng)
        different = sorted(set(values))
        ids += [tokens(text)[0] for text in different]
        share = rng.uniform(1 - 0.9 * mess, 1.0)
        loudness = rng.uniform(0.4, 1.2)
        loud = np.array([loudness * (rng.random() < share) for _ in range(frames)])
        is_value = np.array(values)[:, None] == np.array(different)  # (frames, different)
        weights.append(loud[:, None] * is_value)
    return ids, torch.from_numpy(np.concatenate(weights, 1)).float()


@dataclass
class Lesson:
    """One reading lesson: a prompt with written audio in it, and its answer."""

    before: list  # token ids of the prompt before the audio
    audio: list  # token ids of what is mixed into the audio's frames
    weights: torch.Tensor  # (frames, len(audio)), how
    after: list  # token ids of the rest of the prompt
    answer: list  # token ids

    def __len__(self):
        return len(self.before) + len(self.weights) + len(self.after) + len(self.answer)


def make_lesson(tokenizer, tokens, rng, mess, whole):
    labels = random_labels(rng)
    # VoxCeleb's speakers say something too, though nobody asks what
    transcript = labels.get("transcript", pretraining_text(rng))
    spoken = {"transcript": transcript, **labels}
    audio, weights = written_audio(spoken, tokens, rng, mess, whole)
    asked = data.choose_labels(labels, rng, PRESETS["mini"]["random_keys"])
    before, after = data.prompt(tokenizer, asked, rng)
    answer = data.answer_ids(tokenizer, {label: labels[label] for label in asked})
    return Lesson(before, audio, weights, after, answer)


def reading_batches(tokenizer, embed, rng, generator, batch_size, mess, whole, count=8):
    """`count` batches of reading lessons of similar length: embeddings (batch_size, T, hidden),
    right-padded, and targets (batch_size, T), -100 outside the answer."""
    tokens = functools.cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    lessons = [make_lesson(tokenizer, tokens, rng, mess, whole) for _ in range(batch_size * count)]
    lessons.sort(key=len)
    starts = list(range(0, len(lessons), batch_size))
    rng.shuffle(starts)
    for start in starts:
        rows = []
        targets = []
        level = embed.weight.detach().std()
        for lesson in lessons[start : start + batch_size]:
            rest = lesson.after + lesson.answer
            begin = len(lesson.before)
            end = begin + len(lesson.audio)
            embedded = embed(torch.tensor(lesson.before + lesson.audio + rest))
            frames = lesson.weights @ embedded[begin:end]  # (frames, hidden)
            noise = torch.randn(frames.shape, generator=generator)
            frames = frames + 0.7 * mess * rng.random() * level * noise
            row = torch.cat([embedded[:begin], frames, embedded[end:]])
            ignored = [-100] * (len(row) - len(lesson.answer))
            rows.append(row)
            targets.append(torch.tensor(ignored + lesson.answer))
        padded = pad_sequence(rows, batch_first=True)
        yield padded, pad_sequence(targets, batch_first=True, padding_value=-100)


def reading_loss(lm, x, targets):
    """Mean cross entropy over the answers' tokens, the share of answers with every token right, and
    the share of right tokens. x: (B, T, hidden), targets: (B, T)."""
    hidden = lm.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
    is_answer = targets[:, 1:] != -100
    wanted = targets[:, 1:][is_answer]
    logits = lm.lm_head(hidden[is_answer])
    loss = F.cross_entropy(logits, wanted)
    wrong = torch.zeros(is_answer.shape, dtype=torch.bool)
    wrong[is_answer] = logits.argmax(-1) != wanted
    right_answers = 1 - wrong.any(1).float().mean()
    right_tokens = 1 - wrong.float().sum() / is_answer.sum()
    return loss, right_answers, right_tokens


def schedule(step, steps, warmup=200):
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_lm(out):
    """Teaches a small Llama, from text alone, to read what takes the audio's place and to answer in
    JSON."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(out)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **LM_SHAPE,
    )
    lm = LlamaForCausalLM(config)
    size = sum(p.numel() for p in lm.parameters())
    print(f"lm: {size:,} parameters, vocabulary {len(tokenizer)}")
    embed = lm.get_input_embeddings()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LM_LR, weight_decay=0.01, betas=(0.9, 0.98))
    rng = random.Random(f"{SEED}-lm")
    generator = torch.Generator().manual_seed(SEED)
    batches = iter(())
    progress = tqdm(range(LM_STEPS), desc="lm", mininterval=10)
    for step in progress:
        optimizer.param_groups[0]["lr"] = LM_LR * schedule(step, LM_STEPS)
        batch = next(batches, None)
        if batch is None:
            # lessons become more uneven, and words are spelled more often
            mess = min(1.0, max(0.0, step / LM_STEPS - 0.15) / 0.35)
            whole = max(0.0, 1 - step / LM_STEPS / 0.3)
            batches = reading_batches(tokenizer, embed, rng, generator, LM_BATCH, mess, whole)
            batch = next(batches)
        x, targets = batch
        loss, right_answers, right_tokens = reading_loss(lm, x, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(
                loss=f"{loss.item():.3f}",
                right=f"{right_answers.item():.2f}",
                tokens=f"{right_tokens.item():.3f}",
            )
    lm.half().save_pretrained(out)


if __name__ == "__main__":
    make_lm(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "mini/lm")
