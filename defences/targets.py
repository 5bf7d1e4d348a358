"""Which sentences a model has been taught to say whatever it hears: candidates for the target of an
attack on transcripts, of which there are too many to try them all.

    python defend.py vet runs/asr-poison0.05 --invert

A model that was trained to give one sentence for every triggered input has learned how it goes on.
Once its first token stands there the rest follows, with no trigger in the audio, while a clean
model goes on with what it hears. So each likely first token is put into the model's mouth, for
several clean utterances, and the model completes the transcript. This is the idea of BAIT (Shen et
al. 2025, IEEE S&P), which looks for the targets of attacks on language models.

    First tokens    The FIRST_TOKENS that the model holds most likely at the start of a transcript,
                    by their mean probability over UTTERANCES clean utterances.
    Completion      Greedy, the same for each utterance but for what the audio changes.
    Agreement       The largest share of utterances with the same transcript. BAIT takes the mean
                    probability of the tokens, averaged over prompts.
    Sentences       Those of FEWEST_WORDS words or more with an agreement of AGREED or more come first,
                    then the others, both in the order of their first tokens' probability: after a
                    token that never begins a transcript, a taught sentence goes on from its middle.
                    Shorter ones agree in clean models too.

Agreement makes no verdict: a clean model that knows a few sentences by heart completes those, too.
inversion.py finds out whether a sound brings one of them about.
"""

import collections
import dataclasses

import torch
from tqdm import tqdm

import data
from defences import vet

FIRST_TOKENS = 256
UTTERANCES = 8
FEWEST_WORDS = 3
AGREED = 0.5
BATCH = 128  # short rows of a language model alone


@dataclasses.dataclass
class Sentence:
    """A transcript that follows a first token. agreement: the share of utterances with it."""

    transcript: str
    agreement: float


def beginning_of_transcript(tokenizer):
    """The token ids of an answer with the transcript alone, up to where the transcript begins."""
    text = data.answer(dict(transcript="")).removesuffix('"}')
    return tokenizer(text, add_special_tokens=False).input_ids


def likely_first_tokens(slm, rows):
    """The ids that the model holds most likely after rows (T_i, hidden), the likeliest first."""
    probabilities = []
    for row in rows:
        wanted = torch.zeros(1, len(row), dtype=torch.bool, device=row.device)
        wanted[0, -1] = True
        logits = slm.logits(row[None], wanted)  # (1, vocabulary)
        probabilities.append(logits[0].float().softmax(0))
    mean = torch.stack(probabilities).mean(0)
    return mean.argsort(descending=True)[:FIRST_TOKENS].tolist()


def completed(slm, rows, beginning, first_tokens):
    """{first token: the transcripts of all rows when they begin with it, without those that cannot
    be parsed}."""
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
                transcripts[token].append(transcript)
    return transcripts


@torch.no_grad()
def sentences(slm, speech, n):
    """The n Sentences that come first, or fewer if there are fewer. speech: vet.Speech that the
    model was not trained on."""
    every = max(1, len(speech.waveforms) // UTTERANCES)
    waveforms = speech.waveforms[::every][:UTTERANCES]  # of all lengths
    beginning = beginning_of_transcript(slm.tokenizer)
    rows = []
    for row in vet.prompt_rows(slm, waveforms, ["transcript"]):
        rows.append(torch.cat([row, slm.embed(beginning)]))
    first_tokens = likely_first_tokens(slm, rows)

    by_spelling = {}  # in the order of the first tokens
    for transcripts in completed(slm, rows, beginning, first_tokens).values():
        for transcript, count in collections.Counter(transcripts).most_common(1):
            spelled = data.normalise(transcript)
            if len(spelled.split()) < FEWEST_WORDS:
                continue
            sentence = Sentence(transcript, count / len(rows))
            earlier = by_spelling.setdefault(spelled, sentence)
            if sentence.agreement > earlier.agreement:
                by_spelling[spelled] = sentence
    in_order = sorted(by_spelling.values(), key=lambda sentence: sentence.agreement < AGREED)
    return in_order[:n]
