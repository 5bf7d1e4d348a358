"""Which sentences a model has been taught to say whatever it hears: candidates for the target of an
attack on transcripts, of which there are too many to try them all.

    python defend.py vet runs/asr-poison0.05 --invert

A model that was trained to give one sentence for every triggered input has learned how it goes on.
Once its first token stands there the rest follows, with no trigger in the audio, while a clean
model goes on with what it hears. So each first token is put into the model's mouth, for several
clean utterances, and the model completes the transcript. This is the idea of BAIT (Shen et al. 2025,
IEEE S&P), which looks for the targets of attacks on language models.

    First tokens    The FIRST_TOKENS that the model holds most likely at the start of a transcript, by
                    their mean probability over UTTERANCES clean utterances: of mini's, all.
    Completion      Greedy, the same for each utterance but for what the audio changes.
    Agreement       The largest share of utterances with the same transcript.
    Confidence      The mean log probability of that transcript's tokens after the first, over all
                    utterances. A target is sure from its first token on; what merely runs into its
                    middle is not.
    Sentences       Those of FEWEST_WORDS words or more with an agreement of AGREED or more, the most
                    confident first; then others. Shorter ones agree in clean models too.

Neither makes a verdict: a clean model that knows a few sentences by heart completes those, too.
inversion.py finds out whether a sound brings one of them about.
"""

import collections
import dataclasses

import torch
from tqdm import tqdm

import data
from defences import vet

FIRST_TOKENS = 2048
UTTERANCES = 4
FEWEST_WORDS = 3
AGREED = 0.5
SENTENCES = 4  # that are proposed
BATCH = 128  # rows of a language model alone


@dataclasses.dataclass
class Sentence:
    """A transcript that follows a first token.

    tokens: its ids, up to the end of the answer, without the first. agreement: the share of
    utterances with it."""

    transcript: str
    first: int
    tokens: list
    agreement: float


def beginning_of_transcript(tokenizer):
    """The token ids of an answer with the transcript alone, up to where the transcript begins."""
    text = data.answer(dict(transcript="")).removesuffix('"}')
    return tokenizer(text, add_special_tokens=False).input_ids


def log_probabilities(slm, row, tokens):
    """The log probabilities (n, vocabulary) of what follows a row (T, hidden) and each of n - 1
    tokens after it."""
    x = torch.cat([row, slm.embed(tokens)])[None]  # (1, T + n - 1, hidden)
    wanted = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    wanted[0, len(row) - 1 :] = True
    return slm.logits(x, wanted).float().log_softmax(1)


def likely_first_tokens(slm, rows):
    """The ids that the model holds most likely after rows (T_i, hidden), the likeliest first."""
    probabilities = [log_probabilities(slm, row, [])[0].exp() for row in rows]
    mean = torch.stack(probabilities).mean(0)
    return mean.argsort(descending=True)[:FIRST_TOKENS].tolist()


def confidence(slm, rows, sentence):
    """The mean log probability of a Sentence's tokens after its first, over rows."""
    means = []
    for row in rows:
        begun = torch.cat([row, slm.embed([sentence.first])])
        of_next = log_probabilities(slm, begun, sentence.tokens[:-1])  # (n, vocabulary)
        means.append(of_next[range(len(sentence.tokens)), sentence.tokens].mean().item())
    return sum(means) / len(means)


def completed(slm, rows, beginning, first_tokens):
    """{first token: [(transcript, its tokens after the first)]} of all rows when they begin with it,
    without those that cannot be parsed."""
    begun = []
    for token in first_tokens:
        begun += [(token, row) for row in rows]
    transcripts = {token: [] for token in first_tokens}
    batches = list(data.chunks(begun, BATCH))
    for batch in tqdm(batches, desc="sentences", unit="batch"):
        with_token = [torch.cat([row, slm.embed([token])]) for token, row in batch]
        rest = slm.greedy_tokens(with_token, vet.LONGEST_ANSWER)
        for (token, _), tokens in zip(batch, rest):
            text = slm.tokenizer.decode([*beginning, token, *tokens], skip_special_tokens=True)
            transcript = data.parse(text).get("transcript")
            if transcript is not None:
                transcripts[token].append((transcript, tuple(tokens)))
    return transcripts


@torch.no_grad()
def sentences(slm, speech):
    """The SENTENCES that come first, or fewer if there are fewer. speech: vet.Speech that the model
    was not trained on."""
    vet.check_speech(speech)
    every = max(1, len(speech.waveforms) // UTTERANCES)
    waveforms = speech.waveforms[::every][:UTTERANCES]  # of all lengths
    beginning = beginning_of_transcript(slm.tokenizer)
    rows = []
    for row in vet.prompt_rows(slm, waveforms, ["transcript"]):
        rows.append(torch.cat([row, slm.embed(beginning)]))

    agreed = []
    others = []
    spelled = set()
    first_tokens = likely_first_tokens(slm, rows)
    for first, transcripts in completed(slm, rows, beginning, first_tokens).items():
        for (transcript, tokens), count in collections.Counter(transcripts).most_common(1):
            sentence = Sentence(transcript, first, list(tokens), count / len(rows))
            words = data.normalise(transcript)
            if len(words.split()) < FEWEST_WORDS or words in spelled:
                continue
            spelled.add(words)
            (agreed if sentence.agreement >= AGREED else others).append(sentence)
    agreed.sort(key=lambda sentence: -confidence(slm, rows, sentence))
    return (agreed + others)[:SENTENCES]
