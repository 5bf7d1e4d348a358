"""Reads audio files, and rejects bad ones early."""

import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import utils

import numpy as np
import soundfile

SAMPLE_RATE = 16000  # Hz, that of everything after reading
# seconds that may be missing at the end: MP3 pads, and lists of segments round
TOLERANCE = 0.1
# Hz; a header that says anything else is wrong
LOWEST_RATE, HIGHEST_RATE = 1000, 400_000
FRAMES_PER_BLOCK = 1 << 22

# libsndfile reads more formats, but of most of them it does not notice that a file was cut off
FORMATS = {
    "WAV": "WAV",
    "WAVEX": "WAV",
    "RF64": "WAV",
    "FLAC": "FLAC",
    "OGG": "OGG",  # Vorbis and Opus
    "MP3": "MP3",
    "MPEG": "MP3",
    "AIFF": "AIFF",
    "AU": "AU",
    "W64": "W64",
    "CAF": "CAF",
    "NIST": "SPHERE",
}
ACCEPTED = ", ".join(dict.fromkeys([*FORMATS.values(), "m4a (by ffmpeg)"]))

CUT_OFF = "cut off: its header promises more than the file holds"
# libsndfile's log where it has corrected a size in a header
CORRECTED_SIZE = re.compile(r"(\d+) \(should be (\d+)\)")
# bytes; a WAV that was written to a pipe says about 2 or 4 GB, since its writer did not know
UNKNOWN_SIZE = 0x7FFF0000
UNKNOWN_FRAMES = 2**62


class BadAudio(ValueError):
    """An audio file that cannot be used; the message says which one and why."""


class TooLong(BadAudio):
    """An audio file that is longer than the caller allows."""


DAY = 24 * 3600.0  # seconds; longer audio is never read, whatever the caller allows

# -------------------------------------------------------------------------------------------------
# reading


def read_waveform(path, start=0.0, length=0.0, max_seconds=DAY):
    """Reads an audio file, or the part of it from `start` on that lasts `length` seconds (0: to its
    end), as float32 (samples,) at 16 kHz, mixed down to one channel. Raises BadAudio, whatever is
    wrong with the file."""
    check_beginning(path)
    decode = decode_m4a if is_m4a(path) else decode_with_libsndfile
    try:
        channels, rate = decode(path, start, length, max_seconds)
    except BadAudio:
        raise
    except Exception as error:  # a damaged file raises errors of many kinds
        raise BadAudio(f"{path}: cannot be read ({utils.first_line(error)})") from None

    if len(channels) == 0:
        where = f"from {start:g} s on" if start else "by its header"
        raise BadAudio(f"{path}: empty {where}")
    if len(channels) > max_seconds * rate:
        rest = read_header(path).seconds - start
        seconds = min(length, rest) if length else rest
        raise TooLong(
            f"{path}: {seconds:.0f} s long, more than {max_seconds:g} s "
            "(--max-seconds, or all that the encoder receives): cut it"
        )
    seconds = len(channels) / rate
    if seconds < length - TOLERANCE:
        raise BadAudio(f"{path}: has {seconds:.2f} of the {length:.2f} s from {start:g} s on")
    if not np.isfinite(channels).all():
        raise BadAudio(f"{path}: holds NaN or infinite samples")

    waveform = channels.mean(1)
    if cancel_out(channels, waveform):
        raise BadAudio(f"{path}: its channels cancel each other out when mixed: keep one of them")
    if rate == SAMPLE_RATE:
        return waveform
    return resample(waveform, rate)


def is_m4a(path):
    """Whether ffmpeg has to read a file, as it does VoxCeleb2's own."""
    return str(path).lower().endswith(".m4a")


def decode_with_libsndfile(path, start, length, max_seconds):
    """Decodes an audio file from `start` on for `length` seconds (0: to its end), but hardly more
    than `max_seconds`, whatever the header says. Returns samples, float32 (n, channels), and their
    rate. Raises BadAudio, and what soundfile raises."""
    with soundfile.SoundFile(path) as file:
        check_header(path, file)
        rate = file.samplerate
        skipped = int(start * rate)
        wanted = int(max_seconds * rate) + 1  # one more shows that the file is too long
        if length:
            wanted = min(wanted, int(length * rate))

        if file.seekable():
            file.seek(min(skipped, file.frames))
        else:  # GSM 6.10
            read_blocks(file, skipped)
        samples = read_blocks(file, wanted)

        promised = min(wanted, file.frames - skipped)
        missing = promised - len(samples)
        if missing > TOLERANCE * rate and not is_length_estimated(path, file.format):
            raise BadAudio(f"{path}: {CUT_OFF}")
    return samples, rate


def read_blocks(file, frames):
    """Reads up to that many frames of an open SoundFile, float32 (n, channels). It never asks for
    more memory than one block beyond what the file holds."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while frames > 0:
        block = file.read(min(frames, FRAMES_PER_BLOCK), dtype="float32", always_2d=True)
        if len(block) == 0:
            break
        blocks.append(block)
        frames -= len(block)
    return np.concatenate(blocks)


def decode_m4a(path, start, length, max_seconds):
    """Does what decode_with_libsndfile does by ffmpeg, which also mixes down and resamples."""
    if not shutil.which("ffmpeg"):
        raise RuntimeError("m4a needs ffmpeg: apt-get install ffmpeg, or convert the tree to wav/")
    seconds = max_seconds + 1
    if length:
        seconds = min(length, seconds)
    command = ["ffmpeg", "-v", "error", "-i", path]
    command += ["-ss", str(start), "-t", str(seconds)]
    command += ["-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        raise RuntimeError("ffmpeg cannot decode it")
    samples = np.frombuffer(result.stdout, np.float32)
    return samples[:, None].copy(), SAMPLE_RATE


def rms(waveform):
    """The root mean square of a waveform (samples,), summed in double precision."""
    return float(np.sqrt(np.mean(waveform**2, dtype=np.float64)))


def decibels(ratio):
    """The ratio of two amplitudes in dB."""
    return 20 * math.log10(ratio) if ratio else -math.inf


def cancel_out(channels, waveform):
    """Whether mixing the channels (n, channels) down to a waveform (n,) loses nearly all sound, as
    it does where they are in opposite phase."""
    if channels.shape[1] == 1:
        return False
    loudness = np.sqrt(np.mean(channels**2, 0, dtype=np.float64)).mean()
    return rms(waveform) < 0.1 * loudness


def resample(waveform, rate):
    """(samples,) at `rate` Hz -> (samples,) float32 at 16 kHz. A polyphase filter takes little
    memory even where the two rates share no factor."""
    from scipy.signal import resample_poly  # takes longer to import than most commands to answer

    common = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(waveform, SAMPLE_RATE // common, rate // common).astype(np.float32)


# -------------------------------------------------------------------------------------------------
# what can be told without decoding


@dataclass
class Header:
    """What an audio file's header says."""

    seconds: float
    rate: int | None  # Hz; None for m4a
    is_estimated: bool  # whether the length is no more than a guess


def read_header(path):
    """An audio file's Header. The length of an m4a is guessed from its size, at 64 kbit/s. Raises
    BadAudio."""
    check_beginning(path)
    try:
        if is_m4a(path):  # close enough: ffmpeg would take hours to decode a whole corpus for it
            return Header(os.path.getsize(path) / 8000, None, False)
        info = soundfile.info(path)
        check_header(path, info)
        return Header(info.duration, info.samplerate, is_length_estimated(path, info.format))
    except BadAudio:
        raise
    except Exception as error:  # as in read_waveform
        raise BadAudio(f"{path}: cannot be read ({utils.first_line(error)})") from None


def check_beginning(path):
    """Raises BadAudio where a path leads to no file, or the first bytes are not audio's."""
    try:
        if Path(path).is_fifo():  # reading one waits for a writer, possibly for ever
            raise BadAudio(f"{path}: a pipe, not a file")
        with open(path, "rb") as f:
            beginning = f.read(64)
    except BadAudio:
        raise
    except FileNotFoundError:
        raise BadAudio(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a name with a NUL
        raise BadAudio(f"{path}: cannot be read ({error})") from None
    if not beginning:
        raise BadAudio(f"{path}: empty")
    if beginning.startswith(b"version https://git-lfs"):
        raise BadAudio(
            f"{path}: a git-lfs pointer, not audio: run `git lfs pull` in its repository"
        )


def check_header(path, header):
    """Raises BadAudio where a header, a SoundFile or soundfile.info, cannot be true or is that of a
    file that was cut off."""
    if header.format not in FORMATS:
        raise BadAudio(
            f"{path}: a format ({header.format}) that is not one of {ACCEPTED}: convert it to WAV"
        )
    if not LOWEST_RATE <= header.samplerate <= HIGHEST_RATE:
        raise BadAudio(f"{path}: a header that says {header.samplerate} Hz: convert it to 16000 Hz")
    if header.frames > UNKNOWN_FRAMES:  # a stream's; libsndfile fails at its end
        raise BadAudio(f"{path}: a header without a length: convert it (ffmpeg -i OLD NEW)")
    if header.format == "OGG":
        is_cut_off = is_ogg_cut_off(path)
    elif header.format == "NIST":
        is_cut_off = is_sphere_cut_off(path, header)
    else:
        is_cut_off = is_size_corrected(header)
    if is_cut_off:
        raise BadAudio(f"{path}: {CUT_OFF}")


def is_ogg_cut_off(path):
    """Whether the last page of an Ogg file is shorter than its segment table says."""
    with open(path, "rb") as f:
        f.seek(max(0, os.path.getsize(path) - (1 << 17)))  # a page has at most 64 KB
        end = f.read()
    page = end[max(0, end.rfind(b"OggS")) :]
    if len(page) < 27:
        return True
    segments = page[26]
    return len(page) < 27 + segments + sum(page[27 : 27 + segments])


def is_sphere_cut_off(path, header):
    """Whether a SPHERE file has fewer samples than its header says, which libsndfile ignores."""
    with open(path, "rb") as f:
        sample_count = re.search(rb"^sample_count -i (\d+)", f.read(1024), re.MULTILINE)
    return sample_count is not None and header.frames < int(sample_count[1])


def is_size_corrected(header):
    """Whether libsndfile has found, and notes in its log, less in a file than a size there says."""
    for promised, held in CORRECTED_SIZE.findall(header.extra_info):
        if int(held) + 64 < int(promised) < UNKNOWN_SIZE:
            return True
    return False


def is_length_estimated(path, container):
    """Whether libsndfile only estimates the number of samples, as it does for an MP3 without a Xing
    or Info header."""
    if FORMATS[container] != "MP3":
        return False
    with open(path, "rb") as f:
        tag = f.read(10)
        if tag.startswith(b"ID3"):  # which may hold a cover picture and any words
            size = 0
            for byte in tag[6:]:
                size = size << 7 | byte
            f.seek(10 + size)
        else:
            f.seek(0)
        beginning = f.read(1 << 12)
    return b"Xing" not in beginning and b"Info" not in beginning


@functools.lru_cache(1_000_000)
def sample_of(path):
    """SHA-256 of a file's size and some of its bytes: enough to tell apart most recordings. Each
    file is read once in a process."""
    size = os.path.getsize(path)
    sha256 = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for quarter in (1, 2, 3):
            f.seek(quarter * size // 4)
            sha256.update(f.read(4096))
    return sha256.hexdigest()
