"""Recordings to codes: samples.jsonl with wav_path in, samples.jsonl with codes_path out.

Into the output directory go

    codes-00000-of-00001.npy    [frames, codebooks], uint16 (int32 for larger codebooks): all samples end to end
    samples.jsonl               the input's fields, and codes_path, code_offset and code_len (frames), codec,
                                codec_hash, checksum (SHA-256 of the codes as little-endian int32), duration (seconds)
    rejected.jsonl              the rows that could not be used: line number, reason, detail
    codes-00000-of-00001.json   what was encoded from what: codec, hashes, totals, rejections by reason

Work in progress lies in a hidden folder beside them and takes their place only when it is whole. The input is read
in chunks of rows which workers encode and one writer appends in order, so the bytes do not depend on the number of
workers, and memory not on the length of the input.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_speech.codecs import Codec, check_codes, codec_names, encode_checked, get_codec
from megatron_speech.codecs.audio import TIME_TOLERANCE_SECONDS, AudioError, DecodedAudio, read_recording
from megatron_speech.console import Progress, output, tables
from megatron_speech.errors import InputError, command
from megatron_speech.files import (
    atomic_write,
    canonical_json,
    fsync_path,
    prepare_output_directory,
    read_json,
    sha256_hex,
    write_json,
)
from megatron_speech.preprocess.audio_input import (
    RowError,
    Scan,
    list_rows,
    open_recording,
    parse_row,
    read_lines,
    scan_input,
    seconds_of,
)
from megatron_speech.preprocess.pool import available_cores, map_ordered
from megatron_speech.preprocess.readers import source
from megatron_speech.remote import is_url

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CHUNK_ROWS = 32
COMMIT_SECONDS = 1.0
REPORTED_EXAMPLES = 5
# Levels of augmented variants, in dB against the codec's own. Upwards little is left before codecs clip or saturate.
GAIN_DECIBELS = (-6.0, 2.0)


# ---------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class EncodingJob:
    """What a worker needs to know beside the rows."""

    codec: str
    input_directory: str
    output_directory: str
    codes_name: str
    augment: int


@dataclass(frozen=True)
class RowChunk:
    """Consecutive rows: (line number, line, whether an earlier row has its sample_id)."""

    rows: list[tuple[int, bytes, bool]]
    next_offset: int
    next_line: int  # lines before next_offset


@dataclass
class EncodingTotals:
    """Sums over the samples written; by language and by source: recordings, samples, seconds, frames."""

    by_language: dict[str, list[float]] = field(default_factory=dict)
    by_source: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: dict[str, Any], samples: int, seconds: float, frames: int) -> None:
        """Count one recording."""
        for sums, name in ((self.by_language, "language"), (self.by_source, "dataset_source")):
            self._add(sums, str(row.get(name) or "unknown"), [1, samples, seconds, frames])

    def merge(self, other: EncodingTotals) -> None:
        """Add the sums of `other`."""
        for mine, theirs in ((self.by_language, other.by_language), (self.by_source, other.by_source)):
            for key, values in theirs.items():
                self._add(mine, key, values)

    @staticmethod
    def _add(sums: dict[str, list[float]], key: str, values: Iterable[float]) -> None:
        sums[key] = [a + b for a, b in zip(sums.get(key, [0, 0, 0.0, 0]), values, strict=True)]


@dataclass
class ChunkResult:
    """A chunk's encoded rows, in the input's order."""

    rows: int
    next_offset: int
    next_line: int
    codes: list[bytes] = field(default_factory=list)
    samples: list[tuple[bytes, int]] = field(default_factory=list)  # JSON without its closing brace; frames
    rejected: list[tuple[int, str, str, bytes]] = field(default_factory=list)  # line, reason, message, JSON line
    totals: EncodingTotals = field(default_factory=EncodingTotals)


class Encoder:
    """What a worker holds: the job and its codec."""

    def __init__(self, job: EncodingJob) -> None:
        self.job = job
        self.codec = get_codec(job.codec)
        self.codec_hash = self.codec.hash
        self.dtype = storage_dtype(self.codec)
        self.hop = round(self.codec.sample_rate_hz / self.codec.frame_rate_hz)

    def encode_row(self, row: dict[str, Any], sample_id: str) -> list[tuple[dict[str, Any], np.ndarray]]:
        """The finished row (all but code_offset) and the codes [T, K] of each variant of one recording.

        Raises:
            RowError, AudioError: the recording cannot be used.
        """
        path = source.join(self.job.input_directory, row["wav_path"])
        recording = read_recording(
            path,
            self.codec.sample_rate_hz,
            start_time=seconds_of(row, "start_time"),
            end_time=seconds_of(row, "end_time"),
            channel=channel_of(row),
            content=open_recording(row, path),
        )
        audio = recording.audio
        check_duration(row, recording, self.codec.sample_rate_hz)
        if len(audio) < self.hop:
            raise RowError(
                "too_short",
                f"{path} has {len(audio)} samples at {self.codec.sample_rate_hz} Hz, needed is a frame of {self.hop}",
            )
        wav_path = row["wav_path"]
        if is_url(path):
            wav_path = path
        elif not os.path.isabs(wav_path):
            # The new file lies elsewhere; its paths are relative to itself, as those of the input were.
            # `..` behind a symbolic link leads elsewhere, hence the real path.
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            wav_path = os.path.relpath(real, self.job.output_directory)
        row = {key: value for key, value in row.items() if key != "code_offset"}
        row |= {
            "wav_path": wav_path,
            # The same for all variants of a recording: a split by source never parts them.
            "source_id": row["wav_path"] if row.get("source_id") is None else row["source_id"],
            "duration": round(len(audio) / self.codec.sample_rate_hz, 6),
            "codec": self.codec.name,
            "codec_hash": self.codec_hash,
            "codes_path": self.job.codes_name,
        }
        return [self._encode_variant(row, sample_id, audio, variant) for variant in range(self.job.augment)]

    def _encode_variant(
        self, row: dict[str, Any], sample_id: str, audio: np.ndarray, variant: int
    ) -> tuple[dict[str, Any], np.ndarray]:
        shift, gain = variant_shift_and_gain(sample_id, variant, self.hop)
        if shift:
            audio = np.concatenate([np.zeros(shift, dtype=audio.dtype), audio])
        try:
            codes = self.codec.encode(audio, gain=gain)
        except InputError as error:
            raise RowError("not_encodable", f"{row['wav_path']}: {error}") from error
        try:
            check_codes(self.codec, codes)
        except InputError as error:  # a broken codec is no fault of this row, and would do no better with the next
            raise InputError(f"{row['wav_path']} was encoded to what are no codes: {error}") from error
        if not len(codes):
            raise RowError("not_encodable", f"{row['wav_path']}: the codec {self.codec.name!r} gave no frames")
        own: dict[str, Any] = {
            "sample_id": sample_id if variant == 0 else f"{sample_id}#v{variant}",
            "checksum": sha256_hex(codes.astype("<i4").tobytes()),
            "code_len": len(codes),
        }
        if self.job.augment > 1:
            own["variant"] = variant
        return row | own, codes.astype(self.dtype)


def encode_chunk(encoder: Encoder, chunk: RowChunk) -> ChunkResult:
    """Encode the recordings of a chunk's rows; a row that cannot be used is a rejection, not an error."""
    result = ChunkResult(len(chunk.rows), chunk.next_offset, chunk.next_line)
    for line_number, line, repeated in chunk.rows:
        row: dict[str, Any] | None = None
        try:
            row, sample_id = parse_row(line, encoder.job.augment)
            if repeated:
                raise RowError("duplicate_sample_id", f"sample_id {sample_id!r} is that of an earlier row")
            encoded = encoder.encode_row(row, sample_id)
        except (RowError, AudioError) as error:
            report: dict[str, Any] = {"line": line_number, "reason": error.reason, "detail": str(error)}
            report["row"] = line.decode("utf-8", "replace").strip() if row is None else row
            result.rejected.append((line_number, error.reason, str(error), _json_line(report) + b"\n"))
            continue
        for new, codes in encoded:
            result.codes.append(codes.tobytes())
            result.samples.append((_json_line(new)[:-1], len(codes)))
        seconds = sum(new["duration"] for new, _ in encoded)
        result.totals.add(row, len(encoded), seconds, sum(len(codes) for _, codes in encoded))
    return result


def channel_of(row: dict[str, Any]) -> int | None:
    """The channel that the row names, from 0; None: the average of all.

    Raises:
        RowError: bad_channel.
    """
    value = row.get("channel")
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1 << 16 or value != int(value):
        raise RowError("bad_channel", f"channel is {value!r}, needed is the number of one channel, from 0")
    return int(value)


def check_duration(row: dict[str, Any], recording: DecodedAudio, sample_rate_hz: int) -> None:
    """Compare the row's own `duration` (seconds) with what was read: a file that is not the one that was meant.

    It may be that of the segment or of the whole file. Allowed is 0.1 s, what the file's codec may have added, and one
    second where the duration is a whole number, which is a rounded one.

    Raises:
        RowError: bad_duration, duration_mismatch.
    """
    value = row.get("duration")
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise RowError("bad_duration", f"duration is {value!r}, needed are seconds as a number")
    found = len(recording.audio) / sample_rate_hz
    allowed = TIME_TOLERANCE_SECONDS + recording.padding_seconds
    if isinstance(value, int):
        allowed = max(allowed, 1.0)
    if min(abs(found - value), abs(recording.file_seconds - value)) > allowed:
        whole = "" if abs(found - recording.file_seconds) < 0.001 else f" of a file of {recording.file_seconds:.3f} s"
        raise RowError(
            "duration_mismatch",
            f"duration is {value:g} s, but {found:.3f} s were read{whole} from {row['wav_path']}: another file or a "
            "part of it; correct the row or copy the file again",
        )


def variant_shift_and_gain(sample_id: str, variant: int, hop: int) -> tuple[int, float]:
    """(samples of silence in front, linear gain) of one variant; (0, 1.0) for variant 0.

    Both are drawn from a hash of sample_id and variant: the shift from 1..hop-1, so that frames fall elsewhere, and
    the level from -6..+2 dB.
    """
    if variant == 0:
        return 0, 1.0
    digest = hashlib.sha256(f"{sample_id}\0{variant}".encode()).digest()
    shift = 1 + int.from_bytes(digest[:8], "big") % (hop - 1) if hop > 1 else 0
    low, high = GAIN_DECIBELS
    decibels = low + (high - low) * int.from_bytes(digest[8:16], "big") / 2**64
    return shift, 10 ** (decibels / 20)


def storage_dtype(codec: Codec) -> np.dtype[Any]:
    """The smallest of uint16 and int32 that holds every code."""
    return np.dtype("<u2" if max(codec.codebook_sizes) <= 1 << 16 else "<i4")


def _json_line(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")


def make_chunks(path: Path, scan: Scan, start: int, line_number: int) -> Iterator[RowChunk]:
    """Chunks of rows of the shard from byte `start` on, which is line `line_number` (from 0)."""
    rows: list[tuple[int, bytes, bool]] = []
    for offset, line in read_lines(path, start, scan.stop):
        line_number += 1
        if not line.strip():
            continue
        index = int(np.searchsorted(scan.duplicates, offset))
        repeated = index < len(scan.duplicates) and int(scan.duplicates[index]) == offset
        rows.append((line_number, line, repeated))
        if len(rows) == CHUNK_ROWS:
            yield RowChunk(rows, offset + len(line), line_number)
            rows = []
    if rows:
        yield RowChunk(rows, scan.stop, line_number)


# ---------------------------------------------------------------------------------------------------- output


@dataclass(frozen=True)
class Outputs:
    """Names of one shard's files."""

    directory: Path
    shard: tuple[int, int]

    @property
    def label(self) -> str:
        """`00000-of-00001`, counted from 0."""
        return f"{self.shard[0]:05d}-of-{self.shard[1]:05d}"

    @property
    def work(self) -> Path:
        """Where unfinished work lies."""
        return self.directory / f".encode-{self.label}"

    @property
    def codes(self) -> Path:
        """The array of codes."""
        return self.directory / f"codes-{self.label}.npy"

    @property
    def manifest(self) -> Path:
        """What was encoded from what."""
        return self.directory / f"codes-{self.label}.json"

    @property
    def samples(self) -> Path:
        """The list of samples; a shard of several has its own."""
        return self.directory / (f"samples-{self.label}.jsonl" if self.shard[1] > 1 else "samples.jsonl")

    @property
    def rejected(self) -> Path:
        """The list of rejected rows."""
        return self.directory / (f"rejected-{self.label}.jsonl" if self.shard[1] > 1 else "rejected.jsonl")


@dataclass
class State:
    """How far the work has come; saved beside the partial files, which are cut back to it on resume."""

    fingerprint: str
    offset: int  # of the next line of the input
    line: int
    rows: int = 0
    rejected: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    samples: int = 0
    frames: int = 0
    samples_bytes: int = 0
    rejected_bytes: int = 0
    totals: EncodingTotals = field(default_factory=EncodingTotals)


class Writer:
    """Appends results to partial files, saves its state, and puts the finished files in place.

    A kill at any moment loses at most what was written since the last commit.
    """

    def __init__(self, outputs: Outputs, codec: Codec, state: State) -> None:
        self.outputs, self.state = outputs, state
        self._dtype = storage_dtype(codec)
        self._codebooks = len(codec.codebook_sizes)
        self._row_bytes = self._dtype.itemsize * self._codebooks
        self._header_bytes = self._write_header(None)
        self._codes = self._open("codes", self._header_bytes + state.frames * self._row_bytes)
        self._samples = self._open("samples", state.samples_bytes)
        self._rejected = self._open("rejected", state.rejected_bytes)
        self._committed_at = float("-inf")  # the first results at once: a run that starts is a run that can resume

    def _open(self, name: str, size: int) -> IO[bytes]:
        handle = open(self.outputs.work / name, "ab")
        handle.truncate(size)
        handle.seek(size)
        return handle

    def _write_header(self, path: Path | None) -> int:
        """Bytes of the .npy header, which NumPy pads for any number of rows; into `path` if given."""
        with tempfile.TemporaryFile() if path is None else open(path, "r+b") as handle:
            np.lib.format.write_array_header_1_0(
                handle,
                {
                    "descr": self._dtype.str,
                    "fortran_order": False,
                    "shape": (self.state.frames, self._codebooks),
                },
            )
            return handle.tell()

    def add(self, result: ChunkResult) -> None:
        """Append one chunk's results."""
        state = self.state
        self._codes.writelines(result.codes)
        for prefix, frames in result.samples:
            line = prefix + b', "code_offset": %d}\n' % state.frames
            state.samples_bytes += self._samples.write(line)
            state.frames += frames
        for line_number, reason, message, report in result.rejected:
            state.rejected_bytes += self._rejected.write(report)
            state.reasons[reason] = state.reasons.get(reason, 0) + 1
            if len(state.examples) < REPORTED_EXAMPLES:
                state.examples.append(f"line {line_number}: {message}")
        state.rows += result.rows
        state.samples += len(result.samples)
        state.rejected += len(result.rejected)
        state.totals.merge(result.totals)
        state.offset, state.line = result.next_offset, result.next_line
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make everything so far survive a kill."""
        for handle in (self._codes, self._samples, self._rejected):
            handle.flush()
            os.fsync(handle.fileno())
        write_json(self.outputs.work / "state.json", asdict(self.state))
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Close the partial files."""
        for handle in (self._codes, self._samples, self._rejected):
            handle.close()

    def finish(self, manifest: dict[str, Any]) -> None:
        """Put the files in place, samples.jsonl last: where it is, everything that it names is whole."""
        self.commit()
        self.close()
        work, outputs = self.outputs.work, self.outputs
        self._write_header(work / "codes")
        with open(work / "codes", "rb") as handle:
            os.fsync(handle.fileno())
        with contextlib.suppress(FileNotFoundError):
            outputs.samples.unlink()  # of an earlier run: it must not name the new codes
        os.replace(work / "codes", outputs.codes)
        os.replace(work / "rejected", outputs.rejected)
        write_json(work / "manifest", manifest)
        os.replace(work / "manifest", outputs.manifest)
        os.replace(work / "samples", outputs.samples)
        fsync_path(outputs.directory)


def join_shards(outputs: Outputs, common: str) -> bool:
    """Concatenate the shards' lists once all are there and of the same work; True if that was now.

    Shards are contiguous, so the joined list has the order of the input. Two shards that finish together write the
    same bytes.
    """
    shards = [Outputs(outputs.directory, (index, outputs.shard[1])) for index in range(outputs.shard[1])]
    if not all(shard.samples.is_file() and _manifest(shard).get("common") == common for shard in shards):
        return False
    for name in ("rejected", "samples"):
        with atomic_write(outputs.directory / f"{name}.jsonl") as joined:
            for shard in shards:
                with open(getattr(shard, name), "rb") as part:
                    shutil.copyfileobj(part, joined)
    return True


def _manifest(outputs: Outputs) -> dict[str, Any]:
    return read_json(outputs.manifest, "manifest of codes") if outputs.manifest.is_file() else {}


# ---------------------------------------------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Encode recordings with a frozen codec: samples.jsonl with wav_path in, samples.jsonl with codes_path out. "
        "Reads wav, flac, mp3, ogg and more (docs/codecs.md) of any sample rate and channel count; start_time and "
        "end_time (seconds) of a row name a segment of its file, channel (from 0) one of its channels. Output does not "
        "depend on --workers."
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="SAMPLES.jsonl",
        help="one JSON object per line, with wav_path: a path or URL, .gz and .zst too; or .tar archives of recordings "
        "(KEY.wav or .flac, .mp3, .ogg; KEY.json and KEY.txt), also as globs and ranges (a-{000..099}.tar)",
    )
    parser.add_argument("--codec", required=True, metavar="NAME", help=f"here: {', '.join(codec_names())}")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="CODES", help="made if it is not there")
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes (default: the %(default)s cores of this process)",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="do only part I of N, counted from 0, of contiguous parts of the input's bytes; each part is encoded by "
        "one run into the same output directory, and the last to finish joins samples.jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run; without it, work starts from the beginning"
    )
    parser.add_argument(
        "--max-rejected",
        type=float,
        default=0.01,
        metavar="F",
        help="fraction of the rows, 0 to 1, that may be rejected before it is an error (default: %(default)s)",
    )
    parser.add_argument(
        "--augment",
        type=int,
        default=1,
        metavar="N",
        help="variants per recording: the clean one, and N-1 with another start within a frame and another level "
        f"({GAIN_DECIBELS[0]:+g} to {GAIN_DECIBELS[1]:+g} dB), for small data sets (default: %(default)s)",
    )


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what needs no file to be refused."""
    for name in ("workers", "augment"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; needed is a number from 1 up")
    if not 0 <= arguments.max_rejected <= 1:
        raise InputError(f"--max-rejected is {arguments.max_rejected}; needed is a fraction from 0 to 1")
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if not match or not int(match[1]) < int(match[2]) <= 99999:
        raise InputError(f"--shard is {arguments.shard!r}; needed is I/N with I from 0 to N-1, such as 0/8")
    arguments.shard = (int(match[1]), int(match[2]))


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command on its own, as `preprocess/encode_audio.py` does."""
    parser = argparse.ArgumentParser(prog="encode_audio.py")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Encode; see the module's docstring."""
    _check_arguments(arguments)
    for pattern in arguments.input:
        source.expand(pattern)  # what is not there is refused before a folder is made
    codec = get_codec(arguments.codec)
    # A missing library is found here and not in the first worker.
    encode_checked(codec, np.zeros(codec.sample_rate_hz, dtype=np.float32))
    outputs = Outputs(arguments.output_dir, arguments.shard)
    created = _missing_directories(outputs.directory)
    try:
        prepare_output_directory(outputs.directory)
        with _work_directory(outputs):
            _encode(arguments, codec, outputs)
    except InputError:
        for directory in created:
            with contextlib.suppress(OSError):  # not empty: another shard works there
                directory.rmdir()
        raise
    except KeyboardInterrupt:
        logger.info("what is done so far is kept in %s; --resume continues from there", outputs.work)
        raise
    return 0


def _missing_directories(path: Path) -> list[Path]:
    """Those of `path` and its parents that do not exist yet, innermost first."""
    return [directory for directory in (path, *path.parents) if not directory.exists()]


@contextlib.contextmanager
def _work_directory(outputs: Outputs) -> Iterator[None]:
    """Hold the shard's work directory; it is removed on success and on bad input, and kept for --resume otherwise."""
    outputs.work.mkdir(exist_ok=True)
    lock = open(outputs.work / "lock", "wb")
    try:
        # A POSIX record lock: unlike flock, forked workers do not hold on to it after a kill.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(
            f"another run is encoding shard {outputs.label} into {outputs.directory}; wait for it or stop it"
        ) from error
    try:
        yield
    except InputError as error:
        if not isinstance(error, ResumeError):
            shutil.rmtree(outputs.work)
        raise
    else:
        shutil.rmtree(outputs.work)
    finally:
        lock.close()


class ResumeError(InputError):
    """The unfinished work is of something else: refused, and left as it is."""


def _encode(arguments: argparse.Namespace, codec: Codec, outputs: Outputs) -> None:
    listing = list_rows(arguments.input, outputs.work)
    named = " ".join(arguments.input)
    scan = scan_input(listing.path, arguments.shard, arguments.augment, outputs.work)
    if scan.rows == 0:
        raise InputError(f"--input {named} has no rows; needed is one JSON object per line")
    job = EncodingJob(
        codec=arguments.codec,
        input_directory=listing.base,
        output_directory=os.path.realpath(outputs.directory),
        codes_name=outputs.codes.name,
        augment=arguments.augment,
    )
    common = sha256_hex(
        canonical_json(
            {
                "format": FORMAT_VERSION,
                "input": scan.sha256,
                "input_directory": listing.base
                if is_url(listing.base)
                else os.path.relpath(os.path.realpath(listing.base), os.path.realpath(outputs.directory)),
                "codec": codec.hash,
                "augment": arguments.augment,
                "shards": arguments.shard[1],
            }
        )
    )
    if arguments.resume and outputs.samples.is_file() and _manifest(outputs).get("common") == common:
        output(f"{outputs.samples} is complete already; nothing to do")
        _report(EncodingTotals(**_manifest(outputs)["totals"]), _manifest(outputs)["rejected"])
        if arguments.shard[1] > 1:
            join_shards(outputs, common)
        return

    state = _load_state(outputs, common) if arguments.resume else None
    if state is None:
        for stale in outputs.work.iterdir():
            if stale.name not in ("lock", listing.path.name):
                stale.unlink()
        state = State(fingerprint=common, offset=scan.start, line=scan.first_line)
    writer = Writer(outputs, codec, state)
    try:
        chunks = make_chunks(listing.path, scan, state.offset, state.line)
        results = map_ordered(encode_chunk, chunks, workers=arguments.workers, make_state=Encoder, arguments=(job,))
        with Progress("encode", total=scan.shard_rows, unit="row", initial=state.rows) as progress:
            for result in results:
                writer.add(result)
                progress.update(result.rows)
                _check_rejections(state, scan, arguments.max_rejected, named)
        _check_rejections(state, scan, arguments.max_rejected, named)
        if state.samples == 0 and scan.shard_rows > 0:
            raise InputError(f"no row of {named} is left: {_reasons(state)}")
        writer.finish(
            {
                "format": FORMAT_VERSION,
                "common": common,
                "shard": list(arguments.shard),
                "input_sha256": scan.sha256,
                "codec": asdict(codec.describe()),
                "augment": arguments.augment,
                "rows": state.rows,
                "samples": state.samples,
                "frames": state.frames,
                "rejected": dict(sorted(state.reasons.items())),
                "totals": asdict(state.totals),
            }
        )
    finally:
        writer.close()
    _report(state.totals, state.reasons)
    joined = arguments.shard[1] == 1 or join_shards(outputs, common)
    output(
        f"{outputs.directory / 'samples.jsonl' if joined else outputs.samples}: {state.samples} samples, "
        f"{state.frames} frames of {codec.name} {codec.hash[:12]}{'' if joined else '; other shards are missing'}"
    )


def _load_state(outputs: Outputs, fingerprint: str) -> State | None:
    path = outputs.work / "state.json"
    if not path.is_file():
        return None
    saved = read_json(path, "state of the unfinished run")
    if saved["fingerprint"] != fingerprint:
        raise ResumeError(
            f"the unfinished run in {outputs.directory} is of another input, codec or --augment; "
            "give the same again, or start over without --resume"
        )
    # A kill between the first and the last rename of `finish` has moved some parts already; they are whole.
    for name, place in (("codes", outputs.codes), ("rejected", outputs.rejected)):
        if not (outputs.work / name).exists():
            os.replace(place, outputs.work / name)
    return State(**{**saved, "totals": EncodingTotals(**saved["totals"])})


def _check_rejections(state: State, scan: Scan, max_rejected: float, named: str) -> None:
    """Stop as soon as too many are rejected: the number of rows is known, so the end would be no better."""
    if state.rejected > max_rejected * scan.shard_rows:
        raise InputError(
            f"{state.rejected} of the first {state.rows} rows of {named} ({scan.shard_rows} in all) are rejected, "
            f"more than --max-rejected {max_rejected:g} allows; nothing was written. {_reasons(state)}"
        )


def _reasons(state: State) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(state.reasons).most_common())
    return f"{counts}; {'; '.join(state.examples)}"


def _report(totals: EncodingTotals, reasons: dict[str, int]) -> None:
    from rich.table import Table

    console = tables()
    for title, sums in (("language", totals.by_language), ("source", totals.by_source)):
        table = Table(show_footer=len(sums) > 1)
        whole = [sum(column) for column in zip(*sums.values(), strict=True)] or [0, 0, 0.0, 0]
        table.add_column(title, "total")
        for name, value in zip(("recordings", "samples", "seconds", "frames"), whole, strict=True):
            table.add_column(name, f"{value:,.1f}" if name == "seconds" else f"{value:,.0f}", justify="right")
        for key, (recordings, samples, seconds, frames) in sorted(sums.items()):
            table.add_row(key, f"{recordings:,.0f}", f"{samples:,.0f}", f"{seconds:,.1f}", f"{frames:,.0f}")
        console.print(table)
    if reasons:
        table = Table("rejected because", "rows")
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            table.add_row(reason, f"{count:,}")
        console.print(table)
