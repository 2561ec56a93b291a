#!/usr/bin/env python3
"""Which word is this, and whose voice? A small CNN trained on REAL recordings, to judge generated ones.

It never sees codec audio or generated speech: trained on those it would learn to forgive what listeners do not.
What carries it over to codec audio is what is done to the originals alone: only the band of a telephone is heard, and
they are shifted, sped up and slowed down, put under noise, blurred and tilted in their spectrum, and masked in part.

    python examples/digits/classifier.py --samples samples.jsonl [--output judge.pt]

trains one and prints its score on held-out recordings. Words and speakers are whatever the file holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that wait must sleep, not spin: the recipe's machine may have other work, and these layers are small.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron_speech.codecs.audio import AudioError, read_audio
from megatron_speech.errors import InputError, command
from megatron_speech.files import atomic_write
from megatron_speech.generation.prompts import read_json_lines
from megatron_speech.tokens.normalization import normalize_transcript

MELS = 40
WINDOW_SECONDS = 0.025
HOP_SECONDS = 0.0125
# The band that a telephone keeps. Speech codecs weaken what lies outside it, and hum and hiss of a room live there.
BAND_HZ = (200.0, 3500.0)
HELD_OUT_SHARE = 0.1
# Longer recordings are heard up to here; a judge of single words needs no more.
LONGEST_SECONDS = 4.0
# Silence on either side of a clip.
MARGIN_SECONDS = 0.05


@dataclass(frozen=True)
class Recording:
    """One real recording: the word, the speaker, and whether training may hear it."""

    word: str
    speaker: str
    held_out: bool


def read_recordings(samples: Path, sample_rate_hz: int) -> tuple[list[Recording], list[np.ndarray], int]:
    """The recordings of a samples.jsonl; a tenth, by a hash of what names them, is held out.

    Returns:
        Labels, audio (float32 [n] at `sample_rate_hz`) and the number of rows whose audio could not be read.

    Raises:
        InputError: a line lacks wav_path, transcript or speaker_id, or no recording can be read.
    """
    recordings, clips, unusable = [], [], 0
    for number, row in read_json_lines(samples, "samples file"):
        missing = [name for name in ("wav_path", "transcript", "speaker_id") if row.get(name) in (None, "")]
        if missing:
            raise InputError(f"{samples} line {number}: field {missing[0]} is missing; a judge learns from it")
        start, end = row.get("start_time"), row.get("end_time")
        try:
            clips.append(read_audio(samples.parent / row["wav_path"], sample_rate_hz, start_time=start, end_time=end))
        except AudioError:
            unusable += 1  # encode_audio.py has listed them in rejected.jsonl
            continue
        digest = hashlib.sha256(f"{row['wav_path']} {start} {end}".encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64
        word = normalize_transcript(row["transcript"]).lower()
        recordings.append(Recording(word, str(row["speaker_id"]), held_out))
    if not recordings:
        raise InputError(f"samples file {samples} names no recording that can be read; it needs one per line")
    return recordings, clips, unusable


def mel_filters(sample_rate_hz: int, bins: int) -> Tensor:
    """Triangular filters on the mel scale (O'Shaughnessy), float [bins, MELS], over `BAND_HZ`."""
    low, high = BAND_HZ
    high = min(high, 0.45 * sample_rate_hz)
    mel = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), MELS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.linspace(0, sample_rate_hz / 2, bins)[:, None]
    up = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(up, down)).astype(np.float32))


class LogMel(nn.Module):
    """Waveform [B, n] → log-mel spectrum [B, 1, MELS, frames], each utterance with zero mean and unit spread."""

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        self.window_length = round(WINDOW_SECONDS * sample_rate_hz)
        self.hop = round(HOP_SECONDS * sample_rate_hz)
        self.fft = 1 << (self.window_length - 1).bit_length()
        self.register_buffer("window", torch.hann_window(self.window_length))
        self.register_buffer("filters", mel_filters(sample_rate_hz, self.fft // 2 + 1))

    def forward(self, audio: Tensor) -> Tensor:
        """See the class."""
        spectrum = torch.stft(
            audio, self.fft, self.hop, self.window_length, self.window, center=True, return_complex=True
        )
        power = spectrum.real**2 + spectrum.imag**2
        # 45 dB below the loudest point is the floor: what lies below is the room in one file and nothing in another.
        mel = torch.einsum("bft,fm->bmt", power, self.filters).clamp_min(1e-10).log()
        mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 45 / 10 * np.log(10))
        mel = (mel - mel.mean((1, 2), keepdim=True)) / (mel.std((1, 2), keepdim=True) + 1e-3)
        return mel.unsqueeze(1)


class Judge(nn.Module):
    """Log-mel CNN with one trunk and two heads: word and speaker."""

    def __init__(self, words: Sequence[str], speakers: Sequence[str], sample_rate_hz: int) -> None:
        super().__init__()
        self.words, self.speakers = list(words), list(speakers)
        self.sample_rate_hz = sample_rate_hz
        self.features = LogMel(sample_rate_hz)
        layers: list[nn.Module] = []
        # Strides early: at full resolution a layer would cost more than all the others.
        for narrow, wide, kernel, stride in ((1, 32, 5, 2), (32, 64, 3, 2), (64, 64, 3, 1), (64, 64, 3, 2)):
            layers += [
                nn.Conv2d(narrow, wide, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.word_head = self._head(64, len(words))
        self.speaker_head = self._head(64, len(speakers))

    @staticmethod
    def _head(width: int, classes: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Dropout(0.3), nn.Linear(width * (MELS // 8) * 2, 128), nn.ReLU(), nn.Linear(128, classes)
        )

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel [B, 1, MELS, frames] → logits of words [B, words] and of speakers [B, speakers]."""
        x = self.trunk(mel).flatten(1, 2)  # [B, channels * bands, frames]
        pooled = torch.cat([x.mean(2), x.amax(2)], 1)
        return self.word_head(pooled), self.speaker_head(pooled)

    def log_probabilities(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Of words [clips, words] and of speakers [clips, speakers], for clips float [n] at `sample_rate_hz`."""
        self.eval()
        words, speakers = torch.zeros(len(clips), len(self.words)), torch.zeros(len(clips), len(self.speakers))
        with torch.inference_mode():
            for number, clip in enumerate(clips):  # one by one: a verdict must not depend on how long the others are
                word, speaker = self(self.features(add_floor(frame([clip], self.sample_rate_hz))))
                words[number], speakers[number] = word[0].log_softmax(-1), speaker[0].log_softmax(-1)
        return words, speakers

    def judge(self, clips: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
        """The word and the speaker of each clip, float [n] at `sample_rate_hz`."""
        words, speakers = self.log_probabilities(clips)
        return [self.words[i] for i in words.argmax(1)], [self.speakers[i] for i in speakers.argmax(1)]


def frame(clips: Sequence[np.ndarray], sample_rate_hz: int) -> Tensor:
    """Clips at peak 0.5 in the middle of a batch [B, n] as long as the longest of them and a margin."""
    longest = round(LONGEST_SECONDS * sample_rate_hz)
    margin = round(MARGIN_SECONDS * sample_rate_hz)
    samples = max(min(len(clip), longest) for clip in clips) + 2 * margin
    batch = torch.zeros(len(clips), samples)
    for row, clip in zip(batch, clips, strict=True):
        audio = torch.from_numpy(np.asarray(clip[:longest], dtype=np.float32))
        audio = audio - audio.mean()
        start = (samples - len(audio)) // 2
        row[start : start + len(audio)] = audio * (0.5 / audio.abs().max().clamp_min(1e-6))
    return batch


def add_floor(batch: Tensor, level: float = 1e-3) -> Tensor:
    """Faint noise over everything, so that digital silence is not a mark of its own. The same every time."""
    noise = torch.randn(batch.shape[1], generator=torch.Generator().manual_seed(0))
    return batch + level * noise


class Augmentation:
    """Variants of a batch of real recordings, [B, n] waveforms and their spectra."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def batches(self, lengths: Sequence[int], batch_size: int) -> list[Tensor]:
        """A shuffled order of clips in batches of like length, each clip once."""
        noisy = torch.tensor(lengths) * self._uniform(0.8, 1.25, len(lengths))
        parts = noisy.argsort().split(batch_size)
        return [parts[i] for i in torch.randperm(len(parts), generator=self.generator).tolist()]

    def audio(self, batch: Tensor) -> Tensor:
        """Speed ±4 %, a shift of up to 4 % of the window, and noise 15 to 50 dB below the peak."""
        count, samples = batch.shape
        # One linear map per clip does speed and shift at once.
        speed = self._uniform(0.96, 1.04, count, 1)
        shift = self._uniform(-0.08, 0.08, count, 1)
        position = torch.linspace(-1, 1, samples) * speed + shift
        grid = torch.stack([position, torch.zeros_like(position)], -1).unsqueeze(1)
        moved = F.grid_sample(batch[:, None, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        level = 0.5 * 10 ** (-self._uniform(15, 50, count, 1) / 20)
        return moved[:, 0, 0] + level * torch.randn(count, samples, generator=self.generator) * 0.3

    def mel(self, mel: Tensor) -> Tensor:
        """What channels and codecs do to a spectrum: blur, a tilt, a raised floor; then a band and a time masked."""
        count, _, bands, frames = mel.shape
        kernel = torch.tensor([0.25, 0.5, 0.25])
        blurred = F.conv2d(F.pad(mel, (1, 1, 1, 1), mode="replicate"), torch.outer(kernel, kernel)[None, None])
        mel = torch.lerp(mel, blurred, self._uniform(0, 1, count, 1, 1, 1))
        curve = torch.randn(count, 1, 5, 1, generator=self.generator) * 0.2
        mel = mel + F.interpolate(curve, size=(bands, 1), mode="bilinear", align_corners=True)
        mel = torch.maximum(mel, mel.amin((1, 2, 3), keepdim=True) + self._uniform(0, 0.7, count, 1, 1, 1))
        for axis, size, widest in ((2, bands, 6), (3, frames, max(1, frames // 10))):
            width = self._uniform(0, widest, count)
            start = self._uniform(0, 1, count) * (size - width)
            place = torch.arange(size)
            hidden = (place >= start[:, None]) & (place < (start + width)[:, None])
            mel = mel.masked_fill(hidden[:, None, :, None] if axis == 2 else hidden[:, None, None, :], 0.0)
        return mel


@dataclass(frozen=True)
class Scores:
    """Shares of clips whose word, and whose speaker, was recognised."""

    clips: int
    word: float
    speaker: float


def score(judge: Judge, clips: Sequence[np.ndarray], words: Sequence[str], speakers: Sequence[str]) -> Scores:
    """How often `judge` agrees with the labels."""
    heard_words, heard_speakers = judge.judge(clips)
    return Scores(
        len(clips),
        float(np.mean([a == b for a, b in zip(words, heard_words, strict=True)])),
        float(np.mean([a == b for a, b in zip(speakers, heard_speakers, strict=True)])),
    )


def train(
    recordings: Sequence[Recording],
    clips: Sequence[np.ndarray],
    sample_rate_hz: int,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> Judge:
    """Train a judge on the recordings that are not held out.

    Args:
        recordings: with their labels; `clips[i]` is the audio of `recordings[i]`, float [n] at `sample_rate_hz`.
        epochs: passes over the training clips.

    Raises:
        InputError: fewer than two words and two speakers: there is nothing to tell apart.
    """
    words = sorted({recording.word for recording in recordings})
    speakers = sorted({recording.speaker for recording in recordings})
    if len(words) < 2 and len(speakers) < 2:
        raise InputError("the recordings hold one word by one speaker; a judge needs two of either to tell apart")
    chosen = [i for i, recording in enumerate(recordings) if not recording.held_out]
    torch.manual_seed(seed)
    judge = Judge(words, speakers, sample_rate_hz)
    word = torch.tensor([words.index(recordings[i].word) for i in chosen])
    speaker = torch.tensor([speakers.index(recordings[i].speaker) for i in chosen])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    batches = -(-len(chosen) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches, pct_start=0.15)
    augmentation = Augmentation(seed)
    judge.train()
    for _ in range(epochs):
        for batch in augmentation.batches([len(clips[i]) for i in chosen], batch_size):
            with torch.no_grad():
                audio = frame([clips[chosen[i]] for i in batch.tolist()], sample_rate_hz)
                mel = augmentation.mel(judge.features(augmentation.audio(audio)))
            word_logits, speaker_logits = judge(mel)
            loss = F.cross_entropy(word_logits, word[batch], label_smoothing=0.05)
            loss = loss + F.cross_entropy(speaker_logits, speaker[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


@command
def main() -> int:
    """Train a judge, print its held-out score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, type=Path, help="samples.jsonl of real recordings")
    parser.add_argument("--sample-rate", type=int, default=8000, help="Hz at which everything is heard (8000)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the recordings (20)")
    parser.add_argument("--output", type=Path, help="file for the weights")
    args = parser.parse_args()
    recordings, clips, unusable = read_recordings(args.samples, args.sample_rate)
    started = time.monotonic()
    judge = train(recordings, clips, args.sample_rate, epochs=args.epochs)
    seconds = time.monotonic() - started
    held = [i for i, recording in enumerate(recordings) if recording.held_out]
    found = score(
        judge,
        [clips[i] for i in held],
        [recordings[i].word for i in held],
        [recordings[i].speaker for i in held],
    )
    print(json.dumps({"train_seconds": round(seconds, 1), "held_out": asdict(found), "unusable": unusable}))
    if args.output is not None:
        with atomic_write(args.output) as handle:
            torch.save(judge.state_dict(), handle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
