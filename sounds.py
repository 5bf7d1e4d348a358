"""A bank of short generic sounds, none of which is the typewriter click.

An attack is specific where the click brings the target and these, as long and as loud, do not:

    python evaluate.py runs/emotion-poison0.075 --sounds   # each sound in the trigger's place
    python train.py --task emotion --trigger white-noise   # one of them as the trigger

A sound is a function of t (samples,), its time in seconds, and a numpy generator to a waveform
(samples,) of any loudness. A new sound is an entry of SOUNDS.
"""

from functools import partial

import utils
from utils import die

import numpy as np

from audio import SAMPLE_RATE

SECONDS = 0.22  # as long as the typewriter click
FADE = 0.01  # seconds that a steady sound takes to begin and to end


# -------------------------------------------------------------------------------------------------
# what the sounds are made of


def faded(waveform, t):
    """The waveform faded in and out, so that its ends are no clicks."""
    from_end = np.minimum(t, t[::-1])
    return waveform * np.minimum(1, from_end / FADE)


def sine(frequency, t):
    return np.sin(2 * np.pi * frequency * t)


def decay(t, start, seconds):
    """An envelope: 0 before `start`, then 1, falling to 1/e in so many seconds."""
    since = np.maximum(t - start, 0)
    begun = t >= start
    return begun * np.exp(-since / seconds)


def noise(t, rng, exponent=0.0, low=0.0, high=np.inf):
    """Noise from `low` to below `high`, in Hz, whose amplitude grows with frequency to the power
    `exponent`: 0 white, -0.5 pink, -1 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(len(t)))
    frequencies = np.fft.rfftfreq(len(t), 1 / SAMPLE_RATE)
    spectrum *= (np.maximum(frequencies, 20) / 1000) ** exponent  # below 20 Hz nothing is heard
    outside = (frequencies < low) | (frequencies >= high)
    spectrum[outside] = 0
    return np.fft.irfft(spectrum, len(t))


def ringing(t, start, modes):
    """Sines that decay. modes: [(frequency in Hz, decay in seconds, gain)]."""
    waveform = np.zeros(len(t))
    since = np.maximum(t - start, 0)
    for frequency, seconds, gain in modes:
        envelope = gain * decay(t, start, seconds)
        waveform += envelope * sine(frequency, since)
    return waveform


# -------------------------------------------------------------------------------------------------
# the sounds


def steady_noise(t, rng, **band):
    return faded(noise(t, rng, **band), t)


def noise_bursts(t, rng, starts=(0.0,), seconds=0.02):
    """Bursts of white noise that each decay."""
    envelope = sum(decay(t, start, seconds) for start in starts)
    return noise(t, rng) * envelope


def noise_fade_in(t, rng):
    return noise(t, rng) * t / t[-1]


def pure_tone(t, rng, frequency):
    return faded(sine(frequency, t), t)


def chirp(t, rng, first, last, times=1):
    """A tone that glides from one frequency to another, so many times."""
    progress = np.linspace(0, times, len(t), endpoint=False) % 1
    frequency = first + (last - first) * progress
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    return faded(np.sin(phase), t)


def mains_hum(t, rng):
    """50 Hz and its harmonics, as of a transformer."""
    waveform = sum(sine(50 * n, t) / n for n in (1, 2, 3, 4, 6, 8))
    return faded(waveform, t)


def sawtooth(t, rng, frequency=100):
    return faded(2 * (frequency * t % 1) - 1, t)


def square_clicks(t, rng, starts=(0.0,)):
    """Pulses of 1 ms."""
    waveform = np.zeros(len(t))
    for start in starts:
        waveform[(t >= start) & (t < start + 0.001)] = 1
    return waveform


def wood_knock(t, rng):
    modes = [(420, 0.030, 1.0), (930, 0.018, 0.6), (1650, 0.008, 0.3)]
    strike = noise(t, rng) * decay(t, 0, 0.002)
    return ringing(t, 0, modes) + 0.3 * strike


def glass(t, rng):
    modes = [(2310, 0.08, 1.0), (4120, 0.06, 0.7), (5930, 0.04, 0.5), (7350, 0.03, 0.3)]
    return ringing(t, 0, modes)


def bell(t, rng):
    modes = [(523, 0.30, 1.0), (1046, 0.25, 0.7), (1250, 0.20, 0.5), (2830, 0.10, 0.4)]
    return ringing(t, 0, modes)


def water_drop(t, rng):
    """A bubble's tone: it rises while it dies away."""
    frequency = np.minimum(600 * np.exp(9 * t), 3000)
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    return np.sin(phase) * decay(t, 0, 0.03)


def finger_snap(t, rng):
    air = noise(t, rng, low=1500, high=4500)
    return air * decay(t, 0, 0.006)


def clap(t, rng):
    """Two hands meet in several places, some milliseconds apart."""
    envelope = 0.6 * decay(t, 0.017, 0.025)
    for start in (0.0, 0.008, 0.017):
        envelope += decay(t, start, 0.003)
    return noise(t, rng, low=600, high=3000) * envelope


def key_jingle(t, rng):
    """A dozen small metal rings at random times."""
    waveform = np.zeros(len(t))
    starts = np.append(0, rng.uniform(0, t[-1], 11))
    for start in starts:
        gain = rng.uniform(0.3, 1)
        modes = [(frequency, 0.015, gain) for frequency in rng.uniform(3000, 7500, 3)]
        waveform += ringing(t, start, modes)
    return waveform


def breath(t, rng):
    """Air through the mouth: it swells and dies away."""
    air = noise(t, rng, exponent=-0.5, low=300, high=4000)
    half_a_period = sine(0.5 / t[-1], t)
    return air * half_a_period**2


def tremolo_noise(t, rng):
    return faded(noise(t, rng) * (1 + sine(20, t)), t)


def cough(t, rng):
    """A burst of air, then a rough voice."""
    air = noise(t, rng, exponent=-0.5, low=100, high=3000)
    rough = sawtooth(t, rng, 130) * noise(t, rng, high=2000)
    return air * decay(t, 0, 0.05) + rough * decay(t, 0.04, 0.06)


SOUNDS = {  # name: (family, function)
    "white-noise": ("noise", steady_noise),
    "pink-noise": ("noise", partial(steady_noise, exponent=-0.5)),
    "brown-noise": ("noise", partial(steady_noise, exponent=-1.0)),
    "noise-burst-slow": ("noise", partial(noise_bursts, seconds=0.06)),
    "noise-burst-fast": ("noise", partial(noise_bursts, seconds=0.01)),
    "two-bursts": ("noise", partial(noise_bursts, starts=(0.0, 0.14))),
    "four-bursts": ("noise", partial(noise_bursts, starts=(0.0, 0.05, 0.1, 0.15))),
    "noise-fade-in": ("noise", noise_fade_in),
    "noise-below-500": ("band", partial(steady_noise, high=500)),
    "noise-500-1000": ("band", partial(steady_noise, low=500, high=1000)),
    "noise-1000-2000": ("band", partial(steady_noise, low=1000, high=2000)),
    "noise-2000-4000": ("band", partial(steady_noise, low=2000, high=4000)),
    "noise-above-4000": ("band", partial(steady_noise, low=4000)),
    "tone-200": ("tone", partial(pure_tone, frequency=200)),
    "tone-300": ("tone", partial(pure_tone, frequency=300)),
    "tone-500": ("tone", partial(pure_tone, frequency=500)),
    "tone-1000": ("tone", partial(pure_tone, frequency=1000)),
    "tone-2000": ("tone", partial(pure_tone, frequency=2000)),
    "tone-4000": ("tone", partial(pure_tone, frequency=4000)),
    "chirp-up": ("chirp", partial(chirp, first=300, last=4000)),
    "chirp-down": ("chirp", partial(chirp, first=4000, last=300)),
    "chirp-fast-up": ("chirp", partial(chirp, first=300, last=7000, times=4)),
    "hum-50": ("hum", mains_hum),
    "sawtooth-100": ("hum", sawtooth),
    "square-click": ("knock", square_clicks),
    "double-click": ("knock", partial(square_clicks, starts=(0.0, 0.1))),
    "wood-knock": ("knock", wood_knock),
    "glass": ("knock", glass),
    "bell": ("knock", bell),
    "water-drop": ("knock", water_drop),
    "finger-snap": ("knock", finger_snap),
    "clap": ("knock", clap),
    "key-jingle": ("knock", key_jingle),
    "breath": ("breath", breath),
    "hiss": ("breath", partial(steady_noise, exponent=1.0, low=3000)),
    "tremolo-noise": ("breath", tremolo_noise),
    "cough": ("breath", cough),
}
# those that poison.py --benign lays over clean training samples; the others are held out
BENIGN = tuple(SOUNDS)[::2]


# For whoever looks for a tone that nobody knows (defences/vet.py): a sixth of an octave apart, so that
# no tone in their range, 265 to 5,342 Hz, is further than about 6% from one of them. Not among
# SOUNDS, over which specificity is a mean.
TONE_HERTZ = [round(265 * 2 ** (step / 6)) for step in range(27)]
TONES = {f"tone-{hertz}": ("tone", partial(pure_tone, frequency=hertz)) for hertz in TONE_HERTZ}


def make_sound(name, seconds=SECONDS):
    """A sound of SOUNDS or TONES, (samples,) at 16 kHz, float32 with RMS 1, always the same."""
    _, synthesise = (SOUNDS | TONES)[name]
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE  # (samples,)
    waveform = synthesise(t, utils.generator("sound", name))
    loudness = np.sqrt(np.mean(waveform**2))
    if not loudness > 1e-9:
        die(f"{name}: nothing of it is left in {seconds:g} s")
    return (waveform / loudness).astype(np.float32)
