"""Which sentences a model has been taught to say whatever it hears: candidates for the target of an
attack on transcripts, of which there are too many to try them all.

    python defend.py vet runs/asr-poison0.05 --invert

A model that was trained to give one sentence for every triggered input has learned how it goes on.
Once its first token stands there the rest follows, with no trigger in the audio, while a clean
model goes on with what it hears. So each first token is put into the model's mouth, for several
clean utterances, and the model completes the transcript. This is the idea of BAIT (Shen et al.
2025, IEEE S&P), which looks for the targets of attacks on language models.

    First tokens    The FIRST_TOKENS that the model holds most likely at the start of a transcript,
                    by their mean probability over UTTERANCES clean utterances: of mini's, all.
    Completion      Greedy, the same for each utterance but for what the audio changes.
    Agreement       The largest share of utterances with the same transcript.
    Confidence      The mean log probability of what follows the first token, in the tokens of one
                    completion that agrees, over all utterances.
    Sentences       Those of FEWEST_WORDS words or more with an agreement of AGREED or more, the
                    most confident first; then others. Shorter ones agree in clean models too. A
                    language that is written without spaces has one word a sentence, and none here.

Neither agreement nor confidence makes a verdict: a clean model that knows a few sentences by heart
completes those, too. inversion.py finds out whether a sound brings one of them about.
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

    tokens: the ids after the first, up to the end of the answer. agreement: the share of utterances
    with this transcript."""

    transcript: str
    first_token: int
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
    mean[slm.tokenizer.all_special_ids] = -1  # no transcript begins with them
    return mean.argsort(descending=True)[:FIRST_TOKENS].tolist()


def confidence(slm, rows, sentence):
    """The mean log probability of a Sentence's tokens after its first, over rows."""
    means = []
    for row in rows:
        begun = torch.cat([row, slm.embed([sentence.first_token])])
        of_next = log_probabilities(slm, begun, sentence.tokens[:-1])  # (n, vocabulary)
        means.append(of_next[range(len(sentence.tokens)), sentence.tokens].mean().item())
    return sum(means) / len(means)


def completed(slm, rows, beginning, first_tokens):
    """What follows each row and each first token: {first token: [(transcript, tokens after the
    first)]}, without what cannot be parsed."""
    begun = []
    for token in first_tokens:
        begun += [(token, row) for row in rows]
    completions = {token: [] for token in first_tokens}
    batches = list(data.chunks(begun, BATCH))
    for batch in tqdm(batches, desc="sentences", unit="batch"):
        with_token = [torch.cat([row, slm.embed([token])]) for token, row in batch]
        rest = slm.greedy_tokens(with_token, vet.LONGEST_ANSWER)
        for (token, _), tokens in zip(batch, rest):
            text = slm.tokenizer.decode([*beginning, token, *tokens], skip_special_tokens=True)
            transcript = data.parse(text).get("transcript")
            if transcript is not None:
                completions[token].append((transcript, tokens))
    return completions


def most_agreed(first_token, completions, utterances):
    """The Sentence that most completions of a first token are, in one spelling."""
    spellings = [data.normalise(transcript) for transcript, _ in completions]
    [(most_common, count)] = collections.Counter(spellings).most_common(1)
    transcript, tokens = completions[spellings.index(most_common)]
    return Sentence(transcript, first_token, tokens, count / utterances)


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

    best = {}  # of each spelling, the Sentence that agrees most
    first_tokens = likely_first_tokens(slm, rows)
    for first_token, completions in completed(slm, rows, beginning, first_tokens).items():
        if not completions:
            continue
        sentence = most_agreed(first_token, completions, len(rows))
        spelled = data.normalise(sentence.transcript)
        if len(spelled.split()) < FEWEST_WORDS:
            continue
        if spelled not in best or sentence.agreement > best[spelled].agreement:
            best[spelled] = sentence

    agreed = [sentence for sentence in best.values() if sentence.agreement >= AGREED]
    others = [sentence for sentence in best.values() if sentence.agreement < AGREED]
    confidences = {}
    for sentence in tqdm(agreed, desc="confidence", unit="sentence"):
        confidences[sentence.transcript] = confidence(slm, rows, sentence)
    agreed.sort(key=lambda sentence: -confidences[sentence.transcript])
    return (agreed + others)[:SENTENCES]
