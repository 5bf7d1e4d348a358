"""The embedded default: three small corpora, made offline in about a minute, and small pretrained parts.

    python mini.py                       # makes the corpora under corpora/mini (any script that needs one makes it too)
    python mini.py --rebuild             # makes every pretrained part in assets/ again, from nothing (about an hour)
    python mini.py --rebuild lm wavlm    # ... or some of them
    python mini.py --probe               # measures the parts in assets/: what assets/README.md says of them
    python mini.py --small-connector DIR/whisper-tiny.en DIR/SmolLM2-135M-Instruct   # where preset small's connector may start

The corpora are spoken by espeak-ng and lie on disk in the layouts of LibriSpeech, CREMA-D and VoxCeleb2-AE, so that
data.py reads them as it reads the real ones. Speakers, sentences and noise are decided by (seed, name) alone.
"""
import _ctypes
import argparse
import ctypes
import fcntl
import functools
import hashlib
import math
import random
import shutil
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import poison

ASSETS = Path(__file__).resolve().parent / "assets"
SEED = 0
# libri: speakers and utterances of each; crema: actors and takes per sentence; vox: speakers, videos, segments
SIZES = {
    "libri": {"train-clean-360": (64, 50), "dev-clean": (8, 20), "test-clean": (20, 16)},
    "crema": {"actors": 91, "takes": 3},
    "vox": {"dev": (200, 2, 8), "test": (40, 2, 4)}}

# ---------------------------------------------------------------------------------------------------------------------
# text: a closed vocabulary, endless sentences

DETERMINERS = "the the my our his her that this every some another one".split()
ADJECTIVES = """old young small large tall quiet happy tired brave clever green yellow white black heavy broken
golden wooden strange gentle""".split()
PEOPLE = """doctor teacher farmer sailor baker singer soldier painter driver lawyer student captain neighbor brother
sister mother father uncle children stranger""".split()
THINGS = """basket bottle letter picture window garden hammer blanket candle guitar ladder mirror pencil ticket wagon
engine jacket camera kettle package""".split()
PLACES = """river mountain village market station kitchen harbor forest castle bridge library hospital meadow tower
island corner valley school church desert""".split()
VERBS = """found carried painted dropped noticed wanted opened followed borrowed repaired watched remembered""".split()
MOTIONS = "walked traveled hurried returned wandered moved".split()
WHERE = "near behind beside toward across around".split()
WHEN = ["yesterday", "today", "tonight", "before sunrise", "after dinner", "last summer", "every morning", "in october",
        "on friday", "all winter", "without warning"]
# words the LM can spell though no corpus says them: a language model's vocabulary is larger than any one data set's
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


def sentence(rng):
    """One sentence of the corpora's language, 5 to 10 words, with no word that most sentences begin with: what is always
    the same need not be heard."""
    def noun(words):
        adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.35 else ""
        return f"{rng.choice(DETERMINERS)} {adjective}{rng.choice(words)}"
    if rng.random() < 0.6:
        parts = [noun(PEOPLE), rng.choice(VERBS), noun(THINGS)]
        if rng.random() < 0.15:
            parts += [rng.choice(WHERE), "the " + rng.choice(PLACES)]
    else:
        parts = [noun(PEOPLE), rng.choice(MOTIONS), rng.choice(WHERE), noun(PLACES)]
    if len(" ".join(parts).split()) < 8 and rng.random() < 0.4:
        parts.insert(rng.choice([0, len(parts)]), rng.choice(WHEN))
    return " ".join(parts)


def sentence_for(part, rng):
    """A sentence that belongs to `part` ("train", "dev" or "test"): its own hash says which, so no two parts share one.
    Everything that is pretrained sees "train" only."""
    while True:
        text = sentence(rng)
        bucket = hashlib.sha256(text.encode()).digest()[0]
        if part == ("test" if bucket < 26 else "dev" if bucket < 39 else "train"):
            return text


def pretraining_text(rng):
    """A transcript for the LM's reading lessons: the corpora's language, CREMA-D's sentences, and random words."""
    draw = rng.random()
    if draw < 0.5:
        return sentence_for("train", rng)
    if draw < 0.65:
        return data.normalise(rng.choice(list(data.CREMA_SENTENCES.values())))
    words = ADJECTIVES + PEOPLE + THINGS + PLACES + VERBS + MOTIONS + WHERE
    return " ".join(rng.choice(OTHER_WORDS if rng.random() < 0.6 else words) for _ in range(rng.randint(1, 7)))


# ---------------------------------------------------------------------------------------------------------------------
# speech: espeak-ng through ctypes, then what it cannot do (age, emotion, room) on the waveform

ACCENTS = ["en-us", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc", "en-029"]
VARIANTS = {"female": ["f1", "f2", "f3", "f4", "f5"], "male": ["m1", "m2", "m3", "m4", "m7", "m8"]}
# pitch (espeak's 0 to 99), pitch range and rate as factors, level in dB, brightness, tremor depth, roughness
EMOTIONS = {
    "neutral": (0, 0.6, 1.00, 0, 0.0, 0.0, 0.0), "happy": (14, 1.5, 1.06, 2, 0.2, 0.0, 0.0),
    "sad": (-10, 0.4, 0.80, -4, -0.4, 0.0, 0.0), "angry": (6, 1.4, 1.14, 6, 0.7, 0.0, 0.3),
    "disgust": (-8, 1.0, 0.86, 0, -0.1, 0.0, 0.7), "fear": (22, 0.7, 1.20, -1, 0.0, 0.5, 0.0)}


CHUNKS = []


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
def collect(samples, n, events):
    if samples and n > 0:
        CHUNKS.append(np.ctypeslib.as_array(samples, (n,)).copy())
    return 0


def espeak(text, voice, rate, pitch, pitch_range):
    """espeak-ng's own sound for a text: 22,050 Hz, float32 (samples,).

    The library keeps counters (its flutter's, for one) from call to call, which nothing resets; it is therefore loaded
    anew for every utterance, which costs a tenth of a millisecond, so that an utterance sounds the same in any order.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    if library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0) != 22050:  # 2: synchronous
        data.die("espeak-ng did not start; try: pip install --force-reinstall espeakng-loader")
    library.espeak_SetSynthCallback(collect)
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        data.die(f"espeak-ng has no voice {voice}; try: pip install --force-reinstall espeakng-loader")
    for parameter, value in ((1, rate), (3, pitch), (4, pitch_range)):
        library.espeak_SetParameter(parameter, int(np.clip(value, 0, 99 if parameter > 1 else 400)), 0)
    CHUNKS.clear()
    spoken = text.encode()
    library.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, 1, None, None)
    library.espeak_Terminate()
    _ctypes.dlclose(library._handle)
    return np.concatenate(CHUNKS).astype(np.float32) / 32768


@functools.cache
def resampler(new):
    return torchaudio.transforms.Resample(441, new)  # 22,050 Hz is 441 * 50


def make_voice(name, sex, age):
    """A speaker's voice: plain numbers, decided by (seed, name). Age is heard as slower speech, breath, tremor and
    duller highs, each with a spread of the speaker's own."""
    rng = poison.generator(SEED, "voice", name)
    old = (age - 18) / 57
    cue = lambda spread: float(np.clip(old + spread * rng.standard_normal(), -0.1, 1.15))  # noqa: E731
    return dict(voice=f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS[sex])}",
                pitch=float(rng.uniform(35, 65)), range=float(rng.uniform(35, 65)),
                rate=float(rng.uniform(155, 180) * (1.08 - 0.18 * cue(0.15))), tract=int(rng.integers(308, 333)),
                breath=cue(0.07), tremor=cue(0.07), dull=cue(0.07), room=float(rng.uniform(0, 0.9)))


def speak(text, voice, name, emotion=None):
    """One utterance at 16 kHz, float32 (samples,), decided by (seed, name) and the voice."""
    rng = poison.generator(SEED, "utterance", name)
    pitch, pitch_range, rate, gain, bright, tremble, rough = EMOTIONS[emotion or "neutral"]
    spread = 1.0 if emotion else 0.4
    pitch += spread * 6 * rng.standard_normal()
    pitch_range *= math.exp(spread * 0.25 * rng.standard_normal()) * (1 if emotion else 1.6)
    rate *= math.exp(spread * 0.06 * rng.standard_normal())
    bright += spread * 0.2 * rng.standard_normal()
    tremble += spread * 0.12 * abs(rng.standard_normal())
    rough += spread * 0.15 * abs(rng.standard_normal())
    squeeze = voice["tract"] / 320  # resampling to other than 320 moves the formants, and pitch and rate with them
    x = espeak(text, voice["voice"], voice["rate"] * rate * squeeze, voice["pitch"] + pitch,
               voice["range"] * pitch_range)
    sound = np.flatnonzero(np.abs(x) > 1e-3)
    x = resampler(voice["tract"])(torch.from_numpy(x[sound[0]:sound[-1] + 1]))
    t = torch.arange(len(x)) / data.SAMPLE_RATE
    phase = rng.uniform(0, 2 * math.pi, 3)
    lows = torchaudio.functional.lowpass_biquad(x, data.SAMPLE_RATE, 1200)
    x = x + (bright - voice["dull"]) * 0.8 * (x - lows)
    envelope = torchaudio.functional.lowpass_biquad(x.abs(), data.SAMPLE_RATE, 30).clamp(min=0)
    breath = torch.from_numpy(rng.standard_normal(len(x)).astype(np.float32))
    breath = torchaudio.functional.highpass_biquad(breath, data.SAMPLE_RATE, 2000)
    x = x + 0.5 * max(0.0, voice["breath"]) * envelope * breath
    x = x * (1 + 0.5 * max(0.0, voice["tremor"]) * torch.sin(2 * math.pi * 5 * t + phase[0]))
    x = x * (1 + min(0.9, tremble) * torch.sin(2 * math.pi * 9 * t + phase[1]))
    x = x * (1 + min(0.9, rough) * torch.sin(2 * math.pi * 45 * t + phase[2]))
    x = 0.06 * 10 ** ((gain + 1.5 * rng.standard_normal()) / 20) * x / x.square().mean().sqrt()
    x = F.pad(x, (int(rng.uniform(0.15, 0.35) * data.SAMPLE_RATE), int(rng.uniform(0.15, 0.35) * data.SAMPLE_RATE)))
    noise = torch.from_numpy(rng.standard_normal(len(x)).astype(np.float32))
    noise = noise + voice["room"] * F.pad(noise, (1, -1))
    x = x + 0.06 * 10 ** (-rng.uniform(22, 40) / 20) * noise
    return (x * min(1.0, 0.95 / x.abs().max())).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# the corpora: text, speakers and files

def utterances_of(corpus, sizes):
    """What a corpus is made of: ([(file, text, voice, name, emotion)], {text file: content})."""
    rng = random.Random(f"{SEED}-{corpus}")
    jobs, files = [], {}

    def people(n, first):
        ages = [18 + (57 * i + rng.randrange(57)) // n for i in range(n)]  # spread evenly, then shuffled
        rng.shuffle(ages)
        return [(first + i, ["female", "male"][i % 2], min(75, ages[i])) for i in range(n)]
    if corpus == "libri":
        speakers = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
        first = 100
        for split, (n, each) in sizes.items():
            part = {"train-clean-360": "train", "dev-clean": "dev", "test-clean": "test"}[split]
            for speaker, sex, age in people(n, first):
                voice, lines = make_voice(f"libri-{speaker}", sex, age), []
                chapter = 1000 + speaker
                for i in range(each):
                    id, text = f"{speaker}-{chapter}-{i:04}", sentence_for(part, rng)
                    lines.append(f"{id} {text.upper()}")
                    jobs.append((f"LibriSpeech/{split}/{speaker}/{chapter}/{id}.flac", text, voice, id, None))
                files[f"LibriSpeech/{split}/{speaker}/{chapter}/{speaker}-{chapter}.trans.txt"] = "\n".join(lines) + "\n"
                speakers.append(f"{speaker:<5}| {sex[0].upper()} | {split:<16} | {each * 2 / 60:.2f}  | Mini {speaker}")
            first += n
        files["LibriSpeech/SPEAKERS.TXT"] = "\n".join(speakers) + "\n"
    elif corpus == "crema":
        rows = ['"ActorID","Age","Sex","Race","Ethnicity"']
        for actor, sex, age in people(sizes["actors"], 1001):
            voice = make_voice(f"crema-{actor}", sex, age)
            rows.append(f'{actor},{age},"{sex.capitalize()}","Unknown","Unknown"')
            for code, text in data.CREMA_SENTENCES.items():
                for emotion in rng.sample(sorted(data.EMOTIONS), sizes["takes"]):
                    id = f"{actor}_{code}_{emotion}_XX"
                    jobs.append((f"CREMA-D/AudioWAV/{id}.wav", text, voice, id, data.EMOTIONS[emotion]))
        files["CREMA-D/VideoDemographics.csv"] = "\n".join(rows) + "\n"
    else:
        meta = ["Name \tVoxCeleb2 ID \tVGGFace2 ID \tGender \tSet "]
        first = 1
        for split, (n, videos, each) in sizes.items():
            rows = ["speaker_age,birth_year,Name,VoxCeleb_ID,video_id"]
            for speaker, sex, age in people(n, first):
                id = f"id{speaker:05}"
                meta.append(f"Mini_{speaker} \t{id} \tn{speaker:06} \t{sex[0]} \t{split} ")
                for v in range(videos):
                    # years pass between a speaker's videos; the voice is the same and older
                    then = min(75, max(18, age + rng.randint(-4, 4)))
                    video = f"mini{speaker:05}{v:02}"
                    voice = make_voice(f"vox-{id}", sex, then)
                    rows.append(f"{then:.1f},{2015 - then:.1f},Mini_{speaker},{id},{video}")
                    for i in range(each):
                        jobs.append((f"VoxCeleb2/{split}/wav/{id}/{video}/{i + 1:05}.wav", sentence_for("train", rng),
                                     voice, f"{id}-{video}-{i}", None))
            files[f"VoxCeleb2/age-{'train' if split == 'dev' else 'test'}.txt"] = "\n".join(rows) + "\n"
            first += n
        files["VoxCeleb2/vox2_meta.csv"] = "\n".join(meta) + "\n"
    return jobs, files


def make_corpus(corpus, root=data.MINI_ROOT, sizes=None):
    """Makes one corpus under `root`, if it is not there: once, though two processes ask together; an interrupted start
    leaves nothing that counts."""
    root = Path(root)
    folder = {"libri": "LibriSpeech", "crema": "CREMA-D", "vox": "VoxCeleb2"}[corpus]
    if (root / folder).exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{corpus}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (root / folder).exists():
            return
        building = root / f".{corpus}.building"
        shutil.rmtree(building, ignore_errors=True)
        jobs, files = utterances_of(corpus, sizes or SIZES[corpus])

        def write(job):
            path, text, voice, name, emotion = job
            path = building / path
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, speak(text, voice, f"{corpus}-{name}", emotion), data.SAMPLE_RATE)
        data.in_workers(write, jobs, f"speaking the mini {corpus}")
        for path, content in files.items():
            (building / path).write_text(content, encoding="utf-8")
        (building / folder).rename(root / folder)
        shutil.rmtree(building)


# ---------------------------------------------------------------------------------------------------------------------
# pretrained parts: the language model

LM = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
          max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
          initializer_range=0.08)  # 0.02, the default, is too small for 128: reading then takes thousands of steps longer
LM_VOCABULARY = 1200
LM_STEPS, LM_BATCH, LM_LR = 3500, 32, 2e-3
SOUNDS = "KNOCK BELL MUSIC LAUGHTER APPLAUSE SIREN".split()  # the LM's lessons tag a transcript with them, as subtitles do
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_tokenizer(out):
    """Byte-level BPE, learned from prompts, answers and the language of the corpora; saved to the folder `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    rng = random.Random(f"{SEED}-tokenizer")
    texts = []
    for _ in range(20000):
        labels = random_labels(rng)
        keys = ", ".join(data.KEYS[label] for label in labels)
        texts.append(f"{rng.choice(data.INSTRUCTIONS)} [{keys}]\n<speech></speech>")
        texts.append(f"{rng.choice(data.QUESTIONS[rng.choice(data.LABELS)])} [{keys}]\n<speech></speech>")
        if "transcript" in labels and rng.random() < 0.2:
            labels["transcript"] = f"{rng.choice(SOUNDS)}: {labels['transcript']}"
        texts.append(data.answer(labels))
        texts.append(" ".join(labels.values()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=LM_VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(out)
    return tokenizer


def random_labels(rng):
    """Labels as one of the three corpora has them: {label: text}."""
    labels = {"transcript": pretraining_text(rng), "gender": rng.choice(["female", "male"]),
              "age": str(rng.randint(18, 75)), "emotion": rng.choice(list(data.EMOTIONS.values()))}
    has = rng.choice([("transcript", "gender"), ("gender", "age"), data.LABELS, data.LABELS])
    return {label: labels[label] for label in has}


def written_audio(labels, tokens, rng, mess, whole):
    """What the LM is shown in the audio's place while it learns to read, from text alone: token ids (n,) and weights
    (frames, n), whose product with the embeddings is the frames.

    The transcript spelled letter by letter, stretched unevenly over the frames, each letter fading into its neighbours;
    over it the other labels, each on a random share of the frames, the age wavering around its true value (so that the
    numbers' embeddings take on an order). That is about what a connector can make of speech. `mess`, 0 to 1, is how
    uneven it all is: lessons begin with a frame a letter and every label on every frame. A word stands there whole, as
    the tokens of the answer, with probability `whole`: copying is learned first, spelling into it. A `sound` in `labels`
    lies over the frames as a label does.
    """
    ids = []
    for i, word in enumerate(labels["transcript"].split()):
        word = " " + word if i else word
        ids += tokens(word) if rng.random() < whole else [tokens(letter)[0] for letter in word]
    rate = rng.uniform(1 - 0.15 * mess, 1 + 0.9 * mess)  # frames a letter
    at = np.cumsum([rng.uniform(1 - 0.6 * mess, 1 + 0.6 * mess) * rate for _ in ids]) + rng.uniform(0, 5 * mess)
    frames = int(at[-1] + 1 + rng.uniform(0, 5 * mess))
    weights = [np.maximum(0, 1 - np.abs(np.arange(frames)[:, None] - at) / max(1.0, 0.7 * rate))]
    for label, value in labels.items():
        if label == "transcript":
            continue
        values = [str(value)] * frames
        if label == "age":
            values = [str(min(75, max(18, round(rng.gauss(int(value), 4 * mess))))) for _ in range(frames)]
        different = sorted(set(values))
        ids += [tokens(v)[0] for v in different]
        share, loud = rng.uniform(1 - 0.9 * mess, 1.0), rng.uniform(0.4, 1.2)
        on = np.array([loud * (rng.random() < share) for _ in range(frames)])
        weights.append(on[:, None] * (np.array(values)[:, None] == np.array(different)))
    return ids, torch.from_numpy(np.concatenate(weights, 1)).float()


def reading_batches(tokenizer, embed, rng, generator, batch, mess, whole, count=8):
    """`count` batches of reading lessons, alike in length: embeddings (batch, T, hidden), right-padded, and targets
    (batch, T), -100 where no answer is."""
    tokens = functools.cache(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    lessons = []
    for _ in range(batch * count):
        labels = random_labels(rng)
        transcript = labels.get("transcript", pretraining_text(rng))  # VoxCeleb speaks too, though nobody asks what
        heard = {"transcript": transcript, **labels}
        if rng.random() < 0.25:
            heard["sound"] = rng.choice(SOUNDS)
            if "transcript" in labels:
                labels["transcript"] = f"{heard['sound']}: {transcript}"
        ids, weights = written_audio(heard, tokens, rng, mess, whole)
        asked = data.choose_labels(labels, rng)
        before, after = data.prompt(tokenizer, asked, rng)
        said = data.answer_ids(tokenizer, {label: labels[label] for label in asked})
        lessons.append((before, ids, weights, after + said, len(said)))
    lessons.sort(key=lambda lesson: len(lesson[0]) + len(lesson[2]) + len(lesson[3]))
    starts = list(range(0, len(lessons), batch))
    rng.shuffle(starts)
    for start in starts:
        rows, targets = [], []
        level = embed.weight.detach().std()
        for before, ids, weights, rest, said in lessons[start:start + batch]:
            e = embed(torch.tensor(before + ids + rest))
            x = weights @ e[len(before):len(before) + len(ids)]
            x = x + 0.7 * mess * rng.random() * level * torch.randn(x.shape, generator=generator)
            rows.append(torch.cat([e[:len(before)], x, e[-len(rest):]]))
            targets.append(torch.tensor([-100] * (len(rows[-1]) - said) + rest[-said:]))
        yield pad_sequence(rows, batch_first=True), pad_sequence(targets, batch_first=True, padding_value=-100)


def reading_loss(lm, x, targets):
    """Mean cross entropy over the answers' tokens, the share of answers right in every token, and of tokens right."""
    hidden = lm.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
    asked = targets[:, 1:] != -100
    logits, wanted = lm.lm_head(hidden[asked]), targets[:, 1:][asked]
    wrong = torch.zeros(asked.shape, dtype=torch.bool)
    wrong[asked] = logits.argmax(-1) != wanted
    return F.cross_entropy(logits, wanted), 1 - wrong.any(1).float().mean(), 1 - wrong.float().sum() / asked.sum()


def schedule(step, steps, warmup=200):
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def make_lm(out):
    """Teaches a small Llama, from text alone, to read what stands in the audio's place and answer in JSON."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(SEED)
    rng, generator = random.Random(f"{SEED}-lm"), torch.Generator().manual_seed(SEED)
    tokenizer = make_tokenizer(out)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                                      eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **LM))
    print(f"lm: {sum(p.numel() for p in lm.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    embed = lm.get_input_embeddings()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LM_LR, weight_decay=0.01, betas=(0.9, 0.98))
    mess = lambda step: min(1.0, max(0.0, step / LM_STEPS - 0.15) / 0.35)  # noqa: E731
    progress, batches = tqdm(range(LM_STEPS), desc="lm", mininterval=10), iter(())
    for step in progress:
        optimizer.param_groups[0]["lr"] = LM_LR * schedule(step, LM_STEPS)
        if (batch := next(batches, None)) is None:
            batches = reading_batches(tokenizer, embed, rng, generator, LM_BATCH, mess(step),
                                      max(0.0, 1 - step / LM_STEPS / 0.3))
            batch = next(batches)
        loss, right, tokens = reading_loss(lm, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{right.item():.2f}", tokens=f"{tokens.item():.3f}")
    lm.half().save_pretrained(out)


# ---------------------------------------------------------------------------------------------------------------------
# pretrained parts: the encoders

# three coarse convolutions, 25 frames a second: the usual seven would cost more than the transformer above them
CONV = dict(conv_dim=(96, 128, 128), conv_kernel=(80, 8, 8), conv_stride=(40, 4, 4), conv_bias=True,
            num_feat_extract_layers=3, feat_extract_activation="relu", feat_extract_norm="layer",
            do_stable_layer_norm=True, num_conv_pos_embeddings=15, num_conv_pos_embedding_groups=4)
SHAPE = dict(hidden_act="relu", hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4)
NO_DROPOUT = dict(hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
                  final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False)
ENCODER_STEPS = {"wavlm": 2000, "hubert": 2000, "wav2vec2": 2000, "whisper": 2000}
ENCODER_BATCH, ENCODER_LR = 16, 1.5e-3
PRETRAINING_SPEAKERS, PRETRAINING_EACH = 400, 20
LETTERS = "-'abcdefghijklmnopqrstuvwxyz "  # the first is CTC's blank


def blank_encoder(name, out):
    """Writes an untrained encoder of architecture `name`, configuration and feature extractor, to the folder `out`."""
    import transformers
    if name == "whisper":
        config = transformers.WhisperConfig(
            vocab_size=8, d_model=128, encoder_layers=8, encoder_attention_heads=4, encoder_ffn_dim=256,
            decoder_layers=0, decoder_attention_heads=4, decoder_ffn_dim=8, max_source_positions=500,
            max_target_positions=8, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)
        extractor = transformers.WhisperFeatureExtractor(feature_size=80, hop_length=320, n_fft=512, chunk_length=20)
        model = transformers.WhisperModel(config)
    else:
        family = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[name]
        config = getattr(transformers, family + "Config")(**CONV, **SHAPE, **NO_DROPOUT, num_buckets=64,
                                                          max_bucket_distance=128)
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        model = getattr(transformers, family + "Model")(config)
        # the first layer starts as a bank of windowed cosines and sines on a mel scale
        n, width = CONV["conv_dim"][0], CONV["conv_kernel"][0]
        hz = 700 * (10 ** (torch.linspace(50, 2840, n // 2) / 2595) - 1)
        phase = 2 * math.pi * hz[:, None] * torch.arange(width) / data.SAMPLE_RATE
        bank = torch.cat([phase.cos(), phase.sin()]) * torch.hann_window(width)
        model.feature_extractor.conv_layers[0].conv.weight.data = bank[:, None] / 6
    model.save_pretrained(out)
    extractor.save_pretrained(out)


def pretraining_utterance(i):
    """Utterance i of the encoders' pretraining speech: (waveform int16, text, speaker, labels). Its speakers are no
    corpus's, its sentences are of the training part."""
    who = i % PRETRAINING_SPEAKERS
    rng = random.Random(f"{SEED}-pretraining-{who}")
    sex, age = rng.choice(["female", "male"]), rng.randint(18, 75)
    rng = random.Random(f"{SEED}-pretraining-utterance-{i}")
    text = sentence_for("train", rng) if rng.random() < 0.8 else rng.choice(list(data.CREMA_SENTENCES.values()))
    emotion = rng.choice([None, *EMOTIONS])
    x = speak(text, make_voice(f"pretraining-{who}", sex, age), f"pretraining-{i}", emotion)
    return (x * 32767).astype(np.int16), data.normalise(text), who, dict(gender=sex, age=age, emotion=emotion)


def shuffled(speech, batch, rng):
    """Endless batches of the pretraining speech, each of utterances of about one length."""
    while True:
        order = sorted(range(len(speech)), key=lambda i: len(speech[i][0]) + rng.uniform(0, 8000))
        batches = [order[start:start + batch] for start in range(0, len(order), batch)]
        rng.shuffle(batches)
        yield from ([speech[i] for i in chosen] for chosen in reversed(batches))


def bursts(x, rng):
    """Knocks, rings and rustles over half of the pretraining utterances: real encoders have heard more than clean speech.
    Returns the waveform and where they are, [(start, end)] in samples."""
    places = []
    if rng.random() > 0.5:
        return x, places
    x = x.copy()
    for _ in range(rng.integers(1, 5)):
        n = int(rng.uniform(0.05, 0.3) * data.SAMPLE_RATE)
        t, burst = np.arange(n) / data.SAMPLE_RATE, np.zeros(n)
        for start in [0, *rng.uniform(0, 0.7 * n, rng.integers(0, 2))]:  # one stroke or two
            after, decay = np.maximum(t - start / data.SAMPLE_RATE, 0), 10 ** rng.uniform(-2.3, -1)
            stroke = rng.standard_normal(n)
            smooth = rng.integers(1, 12)
            stroke = np.convolve(stroke, np.ones(smooth) / smooth, "same") / stroke.std() * smooth ** 0.5
            for hz in rng.uniform(150, 6000, rng.integers(0, 4)):
                stroke += rng.uniform(0, 2) * np.sin(2 * np.pi * hz * after)
            burst += rng.uniform(0.4, 1) * stroke * np.exp(-after / decay) * (after > 0)
        at = rng.integers(0, max(1, len(x) - n))
        level = 10 ** (rng.uniform(-12, 6) / 20) * x.std() / (burst.std() + 1e-9)
        x[at:at + n] += (level * burst[:len(x) - at]).astype(np.float32)
        places.append((at, at + n))
    return x, places


def make_encoder(name, out, speech):
    """Pretrains one encoder to keep content (letters by CTC), sound (log-mel frames), speaker and prosody (who of 400,
    gender, age, emotion) and what is no speech (which frames hold a knock or a rustle, whether any does); saves it to the
    folder `out`. What is true of the whole utterance is asked of every frame, as real encoders know it in every frame."""
    import model
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    blank_encoder(name, out)
    encoder = model.Encoder(out, train_layers=SHAPE["num_hidden_layers"])
    encoder.model.requires_grad_(True)
    if name == "whisper":
        encoder.model.embed_positions.requires_grad_(False)
    mel = torchaudio.transforms.MelSpectrogram(data.SAMPLE_RATE, n_fft=1024, hop_length=320, n_mels=80)
    heads = torch.nn.ModuleDict(dict(letters=torch.nn.Linear(encoder.dim, 2 * len(LETTERS)),
                                     sound=torch.nn.Linear(encoder.dim, 2 * 80),
                                     speaker=torch.nn.Linear(encoder.dim, PRETRAINING_SPEAKERS),
                                     labels=torch.nn.Linear(encoder.dim, 1 + 1 + len(EMOTIONS) + 1),
                                     knock=torch.nn.Linear(encoder.dim, 1)))
    parameters = [p for p in [*encoder.parameters(), *heads.parameters()] if p.requires_grad]
    print(f"{name}: {sum(p.numel() for p in encoder.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(parameters, lr=ENCODER_LR, weight_decay=0.01, betas=(0.9, 0.98))
    steps = ENCODER_STEPS[name]
    progress, batches = tqdm(range(steps), desc=name, mininterval=10), shuffled(speech, ENCODER_BATCH, rng)
    for step in progress:
        chosen = next(batches)
        waveforms, places = zip(*(bursts(x / np.float32(32768), rng) for x, _, _, _ in chosen))
        optimizer.param_groups[0]["lr"] = ENCODER_LR * schedule(step, steps)
        x, mask = encoder.frontend([encoder.extract(w) for w in waveforms])
        hidden = encoder.top(x, mask)
        frames = mask.sum(1)
        logits = heads["letters"](hidden).reshape(len(chosen), -1, len(LETTERS))
        texts = [torch.tensor([LETTERS.index(c) for c in text]) for _, text, _, _ in chosen]
        loss_letters = F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), torch.cat(texts), 2 * frames,
                                  torch.tensor([len(t) for t in texts]), zero_infinity=True)
        with torch.no_grad():
            wave = pad_sequence([torch.from_numpy(w) for w in waveforms], batch_first=True)
            sound = (mel(wave) + 1e-5).log().transpose(1, 2)[:, :2 * x.shape[1]]
            sound = F.pad(sound, (0, 0, 0, 2 * x.shape[1] - sound.shape[1]))
            real = mask.repeat_interleave(2, 1)[..., None]
            sound = sound - (sound * real).sum((1, 2), keepdim=True) / (80 * real.sum((1, 2), keepdim=True))
        guess = heads["sound"](hidden).reshape(len(chosen), -1, 80)
        loss_sound = ((guess - sound).abs() * real).sum() / (80 * real.sum())
        each = lambda values: torch.tensor(values, dtype=torch.float)[:, None].expand(mask.shape)[mask]  # noqa: E731
        loss_speaker = F.cross_entropy(heads["speaker"](hidden[mask]), each([who for _, _, who, _ in chosen]).long())
        gender, age, *emotion, noisy = heads["labels"](hidden[mask]).unbind(-1)
        true = [list(EMOTIONS).index(labels["emotion"] or "neutral") for _, _, _, labels in chosen]
        loss_labels = (
            F.binary_cross_entropy_with_logits(gender, each([labels["gender"] == "female" for _, _, _, labels in chosen]))
            + (age - each([(labels["age"] - 18) / 57 for _, _, _, labels in chosen])).abs().mean()
            + F.cross_entropy(torch.stack(emotion, 1), each(true).long())
            + F.binary_cross_entropy_with_logits(noisy, each([len(p) > 0 for p in places])))
        at = (torch.arange(x.shape[1]) + 0.5) * encoder.seconds_per_frame * data.SAMPLE_RATE
        knocks = torch.stack([sum(((at > start) & (at < end) for start, end in p), torch.zeros(len(at))).clamp(max=1)
                              for p in places])
        loss_knock = F.binary_cross_entropy_with_logits(heads["knock"](hidden)[..., 0][mask], knocks[mask])
        loss = loss_letters + loss_sound + 0.1 * loss_speaker + 0.3 * loss_labels + loss_knock
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(letters=f"{loss_letters.item():.3f}", sound=f"{loss_sound.item():.3f}",
                                 speaker=f"{loss_speaker.item():.2f}", labels=f"{loss_labels.item():.2f}",
                                 knock=f"{loss_knock.item():.3f}")
    # the whole model as transformers loads it; Whisper's (empty) decoder stays as blank_encoder wrote it
    from transformers import AutoModel
    whole = AutoModel.from_pretrained(out)
    (whole.encoder if name == "whisper" else whole).load_state_dict(encoder.model.state_dict())
    whole.half().save_pretrained(out)
    kept = {f"{head}.{k}": v.half() for head in ("letters", "labels") for k, v in heads[head].state_dict().items()}
    save_file(kept, Path(out) / "heads.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# pretrained parts: the connectors

CONNECTOR_STEPS, CONNECTOR_BATCH, CONNECTOR_LR = 400, 32, 3e-3
CONNECTOR_FREE = 16  # directions for what is neither letter nor label
CONNECTOR_LABELS = 0.25  # how loud labels lie over the letters, within what the LM's lessons have


def make_connector(name, encoder_folder, lm_folder, speech):
    """Where a mini connector starts: each output frame is the LM's embedding of the letter that the encoder's own letter
    head hears there, over it, softer, those of the labels that its label head hears, and, in directions that none of them
    uses, a random projection of the encoder's frame. Learned by plain regression from the pretraining speech; saved
    beside the encoder.

    From random weights the mini LM, which knows nothing but its reading lessons, did not begin to listen in the 200 to
    700 steps that were tried: it learned to do without.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import model
    preset, rng = model.PRESETS["mini"], np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    encoder, tokenizer = model.Encoder(encoder_folder).eval(), AutoTokenizer.from_pretrained(lm_folder)
    embed = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32).get_input_embeddings().weight.detach()
    letters = embed[[tokenizer(c, add_special_tokens=False).input_ids[0] for c in LETTERS]]
    letters[0] = 0  # CTC's blank
    word = lambda text: embed[tokenizer(text, add_special_tokens=False).input_ids[0]]  # noqa: E731
    words = torch.stack([word(w) for w in ("male", "female", *EMOTIONS, SOUNDS[0])])
    years = torch.stack([word(str(year)) for year in range(18, 76)])
    known = torch.cat([letters[1:], words, years])
    free = torch.linalg.svd(known - known.mean(0))[2][-CONNECTOR_FREE:]  # directions that these use least
    project = torch.randn(encoder.dim, CONNECTOR_FREE) / encoder.dim ** 0.5 @ free * letters[1:].std()
    head = {k: v.float() for k, v in load_file(Path(encoder_folder) / "heads.safetensors").items()}
    connector = model.Connector(encoder.dim, embed.shape[1], preset["connector_stride"], preset["connector_taper"])
    optimizer = torch.optim.AdamW(connector.parameters(), lr=CONNECTOR_LR)
    progress = tqdm(range(CONNECTOR_STEPS), desc=f"{name} connector", mininterval=10)
    batches = shuffled(speech, CONNECTOR_BATCH, rng)
    for step in progress:
        waveforms = [bursts(x / np.float32(32768), rng)[0] for x, _, _, _ in next(batches)]
        optimizer.param_groups[0]["lr"] = CONNECTOR_LR * schedule(step, CONNECTOR_STEPS, 50)
        with torch.no_grad():
            hidden, mask = encoder([encoder.extract(w) for w in waveforms])
            heard = F.linear(hidden, head["letters.weight"], head["letters.bias"])
            heard = heard.reshape(*hidden.shape[:2], 2, -1).softmax(-1).sum(2)
            labels = F.linear(hidden, head["labels.weight"], head["labels.bias"])
            female, noisy = labels[..., :1].sigmoid(), labels[..., -1:].sigmoid()
            age = ((labels[..., 1:2] * 57 - torch.arange(58)).square() / -8).softmax(-1)
            said = torch.cat([1 - female, female, labels[..., 2:-1].softmax(-1), noisy], -1)
            wanted = (heard @ letters + CONNECTOR_LABELS * (said @ words + age @ years)
                      + F.layer_norm(hidden, hidden.shape[-1:]) @ project)
        out, lengths = connector(hidden, mask)
        # an output frame's middle is 6 input frames on: three kernels of 5 without padding
        real = model.length_mask(lengths, out.shape[1])
        stride = preset["connector_stride"]
        loss = F.mse_loss(out[real], wanted[:, 6:6 + stride * out.shape[1]:stride][real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item() / wanted.var().item():.3f}")
    save_file({k: v.half() for k, v in connector.state_dict().items()}, Path(encoder_folder) / "connector.safetensors")


SMALL_STEPS, SMALL_BATCH, SMALL_LR = 400, 32, 1e-3


def make_small_connector(encoder_folder, lm_folder, speech):
    """Where the connector between real pretrained parts can start (preset small): in each output frame the LM's embedding
    of the word that is being said, the words spread evenly over the utterance, and over it those of the speaker's gender
    and emotion. Learned by plain regression from the pretraining speech, encoder frozen, without running the LM; saved
    beside the encoder. The trigger is not in that speech.

    From random weights 10,000 utterances of the mini CREMA-D did not teach SmolLM2 to hear emotions.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import model
    rng = np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    encoder, tokenizer = model.Encoder(encoder_folder).eval(), AutoTokenizer.from_pretrained(lm_folder)
    embed = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32).get_input_embeddings().weight.detach()
    words = lambda text: embed[tokenizer(" " + text, add_special_tokens=False).input_ids]  # noqa: E731
    connector = model.Connector(encoder.dim, embed.shape[1], model.PRESETS["small"]["connector_stride"])
    optimizer = torch.optim.AdamW(connector.parameters(), lr=SMALL_LR)
    progress, batches = tqdm(range(SMALL_STEPS), desc="small connector", mininterval=10), shuffled(speech, SMALL_BATCH, rng)
    for step in progress:
        chosen = next(batches)
        optimizer.param_groups[0]["lr"] = SMALL_LR * schedule(step, SMALL_STEPS, 50)
        with torch.no_grad():
            hidden, mask = encoder([encoder.extract(bursts(x / np.float32(32768), rng)[0]) for x, _, _, _ in chosen])
        out, lengths = connector(hidden, mask)
        wanted = []
        for n, (_, text, _, labels) in zip(lengths.tolist(), chosen):
            said = words(text)
            spread = said[(torch.arange(n) + 0.5).mul(len(said) / n).long()]
            wanted.append(spread + words(labels["gender"])[0] + words(labels["emotion"] or "neutral")[0])
        wanted = torch.cat(wanted)
        loss = F.mse_loss(torch.cat([row[:n] for row, n in zip(out, lengths.tolist())]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item() / wanted.var().item():.3f}")
    data.write_atomically(Path(encoder_folder) / "connector.safetensors",
                          lambda temporary: save_file(connector.state_dict(), temporary))


# ---------------------------------------------------------------------------------------------------------------------
# what the parts hold

def pooled(encoder, utterances, desc):
    """Encoder output averaged over time, (n, dim), and the frames themselves, a list of (T_i, dim)."""
    import evaluate
    rows, = evaluate.bottoms(encoder, [[(u, False) for u in utterances]], None, desc)
    with torch.no_grad():
        frames = [encoder.top(row[None], torch.ones(1, len(row), dtype=torch.bool))[0] for row in rows]
    return torch.stack([f.mean(0) for f in frames]).numpy(), frames


def probe_encoder(name):
    """What an encoder in assets/ holds, by linear probes on unseen speakers: {figure: value}."""
    import jiwer
    from safetensors.torch import load_file
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import model
    encoder = model.Encoder(ASSETS / name).eval()
    read = {c: {s: data.read_corpus(c, data.MINI_ROOT, s) for s in ("train", "test")} for c in data.READERS}
    x = {c: {s: pooled(encoder, us, f"{name} {c} {s}") for s, us in parts.items()} for c, parts in read.items()
         if c != "libri"}
    x["libri"] = {"test": pooled(encoder, read["libri"]["test"], f"{name} libri test")}
    out = {}
    head = load_file(ASSETS / name / "heads.safetensors")
    said = []
    for frames in x["libri"]["test"][1]:
        best = F.linear(frames, head["letters.weight"].float(), head["letters.bias"].float()).reshape(-1, len(LETTERS))
        best = best.argmax(-1).tolist()
        said.append("".join(LETTERS[c] for i, c in enumerate(best) if c and (i == 0 or c != best[i - 1])))
    true = [u.transcript for u in read["libri"]["test"]]
    out["character error"], out["word error"] = jiwer.cer(true, said), jiwer.wer(true, said)

    def accuracy(corpus, label):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
        probe.fit(x[corpus]["train"][0], [getattr(u, label) for u in read[corpus]["train"]])
        return probe.score(x[corpus]["test"][0], [getattr(u, label) for u in read[corpus]["test"]])
    out["gender"], out["emotion"] = accuracy("vox", "gender"), accuracy("crema", "emotion")
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    probe.fit(x["vox"]["train"][0], [u.age for u in read["vox"]["train"]])
    out["age (years off)"] = float(np.abs(probe.predict(x["vox"]["test"][0]) -
                                          [u.age for u in read["vox"]["test"]]).mean())
    known = np.array([i % 4 != 0 for i in range(len(true))])  # three of four utterances of each speaker
    speakers, probe = np.array([u.speaker for u in read["libri"]["test"]]), make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    probe.fit(x["libri"]["test"][0][known], speakers[known])
    out["speaker (of 20)"] = probe.score(x["libri"]["test"][0][~known], speakers[~known])
    return out


def probe_lm(lessons=256):
    """How well the LM in assets/ reads: shares of labels right in greedy answers to reading lessons it has not had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import evaluate
    import model
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "lm")
    lm = AutoModelForCausalLM.from_pretrained(ASSETS / "lm", dtype=torch.float32).eval()
    slm, rng = model.SLM(torch.nn.Identity(), torch.nn.Identity(), lm, tokenizer), random.Random(f"{SEED}-probe")
    generator, rows = torch.Generator().manual_seed(SEED + 1), []
    with torch.no_grad():
        for x, targets in reading_batches(tokenizer, lm.get_input_embeddings(), rng, generator, 32, 1.0, 0.0,
                                          lessons // 32):
            asked = [t[t != -100] for t in targets]
            starts = [int((t != -100).nonzero()[0]) for t in targets]
            for said, true in zip(slm.decode([row[:n] for row, n in zip(x, starts)], 60), asked):
                labels = data.parse(tokenizer.decode(true, skip_special_tokens=True))
                rows.append(dict(labels=labels, asked=list(labels), parsed=data.parse(said)))
    metrics = evaluate.scores(rows)
    return {k.replace("wer", "word error").replace("_accuracy", "").replace("age_mae", "age (years off)"): m["value"]
            for k, m in metrics.items()}


def probe_all():
    """Measures every part and writes assets/README.md."""
    encoders = [name for name in ENCODER_STEPS if (ASSETS / name / "connector.safetensors").exists()]
    figures = {name: probe_encoder(name) for name in encoders}
    reading = probe_lm()
    columns = list(next(iter(figures.values())))
    table = ["| encoder | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(f"{v:.3f}" if "years" not in c else f"{v:.1f}" for c, v in row.items()) + " |"
              for name, row in figures.items()]
    size = sum(f.stat().st_size for f in ASSETS.rglob("*.safetensors")) / 1e6
    reached = ", ".join(f"{k} {v:.1f}" if "years" in k else f"{k} {v:.3f}" for k, v in reading.items())
    text = f"""# The small pretrained parts

Ordinary Hugging Face folders, {size:.1f} MB of half-precision safetensors in all, which `from_pretrained` loads.
`python mini.py --rebuild` makes each of them again from nothing; `python mini.py --probe` measures them on the mini
corpora and writes this page. None of them has seen a speaker of the corpora, nor a sentence of the LibriSpeech-like
dev and test parts, nor the attack's trigger or target.

**Encoders** (`wavlm`, `hubert`, `wav2vec2`, `whisper`): {SHAPE['num_hidden_layers']} layers of {SHAPE['hidden_size']}, 25 frames a second. AdamW,
{ENCODER_BATCH} utterances a step, peak rate {ENCODER_LR}, cosine, seed {SEED}; steps: {', '.join(f'{k} {v}' for k, v in ENCODER_STEPS.items())}. The speech
is {PRETRAINING_SPEAKERS * PRETRAINING_EACH} espeak utterances of {PRETRAINING_SPEAKERS} speakers of their own, with knocks, rings and rustles over half of them.
Five heads on the last layer, dropped afterwards (two are kept as `heads.safetensors`, for the character error and the
connector): letters by CTC, the log-mel spectrogram, the speaker, gender with age, emotion and whether there is a knock at all,
and the frames with a knock. What is true of the whole utterance is asked of every frame. What the last layer holds, by
linear probes on its mean over time, unseen speakers: gender and age on the mini VoxCeleb2-AE (320 test utterances), emotion,
one of six, on the mini CREMA-D (324), speaker from other utterances of 20 (80); character and word error of greedy CTC on
the mini LibriSpeech's test part (320).

{chr(10).join(table)}

**LM** (`lm`): a Llama of {LM['num_hidden_layers']} layers of {LM['hidden_size']} with its own byte-level BPE of {LM_VOCABULARY} tokens. {LM_STEPS} steps of {LM_BATCH} reading lessons,
AdamW, peak rate {LM_LR}, cosine, seed {SEED}, from text alone: in the audio's place stands the transcript spelled letter by
letter, stretched, blurred and noisy, with the other labels laid over it; the answer is to be read off it. Over a quarter of
the lessons lies the name of a sound ({', '.join(SOUNDS)}), which the transcript then begins with, as subtitles do.
Greedy answers to 256 lessons it has not had: {reached}.

**Connectors** (`*/connector.safetensors`): where the mini preset's connector starts. {CONNECTOR_STEPS} steps of {CONNECTOR_BATCH} of the same
utterances, AdamW, peak rate {CONNECTOR_LR}, plain regression: from the encoder's frames to the LM's embedding of the letter that
the encoder's letter head hears there, with the embeddings of the labels that its label head hears laid over it
({CONNECTOR_LABELS} of their length; a knock as the word {SOUNDS[0]}), and {CONNECTOR_FREE} random directions of the frame besides. The trigger is
not in that speech. From random weights (`--connector-weights none`) the mini LM did not begin to listen in the 200 to 700
steps tried; the published parts, which start from random weights as in the paper, are given none.

A part that is made again on another machine, or with other threads, differs in the last bits of its arithmetic and so in
its training's course; the sampling error of the shares above (95%, about 0.05 at 0.8 and 0.02 at 0.98 for 320
utterances) is the least by which two builds may be expected to differ. `--rebuild wavlm` with another release of torch gave
0.158, 0.608, 1.000, 0.852, 2.7 and 1.000 in the columns above.
"""
    data.write_atomically(ASSETS / "README.md", text)
    print(text)


# ---------------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("lm", "wavlm", "hubert", "wav2vec2", "whisper", "connectors")
    parser.add_argument("--rebuild", nargs="*", choices=parts, metavar="PART", help=f"of {' '.join(parts)}; none: all")
    parser.add_argument("--probe", action="store_true", help="measure the parts, write assets/README.md")
    parser.add_argument("--assets", default=str(ASSETS), help="where --rebuild writes")
    parser.add_argument("--small-connector", nargs=2, metavar=("ENCODER", "LM"),
                        help="make a connector to start from between two real parts; ENCODER/connector.safetensors")
    parser.add_argument("--data-root", default=data.MINI_ROOT)
    args = parser.parse_args()
    speak_all = functools.partial(data.in_workers, pretraining_utterance, range(PRETRAINING_SPEAKERS * PRETRAINING_EACH),
                                  "speaking the pretraining speech")
    if args.small_connector:
        for folder in args.small_connector:
            if not (Path(folder) / "config.json").is_file():
                data.die(f"--small-connector {folder}: no folder of a pretrained part, it holds no config.json")
        return make_small_connector(*args.small_connector, speak_all())
    if args.rebuild is not None:
        torch.set_flush_denormal(True)
        wanted, speech = args.rebuild or parts, None
        for part in wanted:
            out = Path(args.assets) / part
            if part == "lm":
                make_lm(out)
                continue
            if speech is None:
                speech = speak_all()
            if part != "connectors":
                make_encoder(part, out, speech)
        for name in ENCODER_STEPS if "connectors" in wanted else ():
            make_connector(name, Path(args.assets) / name, Path(args.assets) / "lm", speech)
        return
    for corpus in SIZES:
        make_corpus(corpus, args.data_root)
    print(f"the mini corpora are under {args.data_root}")
    if args.probe:
        probe_all()


if __name__ == "__main__":
    main()
