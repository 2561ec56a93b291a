"""`megatron-speech decode`: codes, or tokens that stand for them, to audio."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_speech.console import output
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, prepare_output_directory

if TYPE_CHECKING:
    import numpy as np

    from megatron_speech.codecs import Codec
    from megatron_speech.preprocess.readers.base import Row

logger = logging.getLogger(__name__)

# A token of one code as an exported tokenizer spells it: `<|vq1_7|>`, of a codec with one codebook `<|s_7|>`.
_TOKEN = re.compile(r"<\|([^|<>]+)_(\d+)\|>")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `megatron-speech decode`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--input",
        metavar="FILE",
        help="codes as an array [frames, codebooks] (.npy), tokens as text (.txt), or rows with codes_path or codes, "
        "as encode-audio and generate write them (samples.jsonl, generated.jsonl; all that preprocess-data reads)",
    )
    what.add_argument("--text", help="tokens as text, such as '<|vq1_7|><|vq2_0|>…' or '<|s_7|>…'")
    parser.add_argument("--codec", metavar="NAME", help="whose codes they are; rows may name it in their field codec")
    parser.add_argument("--sample-id", metavar="ID", help="of the rows only this one")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--output", type=Path, metavar="OUT.wav", help="the file of one recording; its ending names its format"
    )
    where.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="for rows: wavs/ROW.wav of each, and decoded.jsonl go here"
    )


def run(args: argparse.Namespace) -> int:
    """Decode; returns the exit status."""
    from megatron_speech.codecs.audio import check_output_format

    if args.output is not None:
        check_output_format(args.output)
    is_rows = (args.text is None and not args.input.endswith((".npy", ".txt"))) or _is_rows_of_arrays(args.input)
    if not is_rows:
        for flag in ("output_dir", "sample_id"):
            if getattr(args, flag) is not None:
                raise InputError(f"--{flag.replace('_', '-')} goes with rows, such as samples.jsonl; leave it out")
        if args.codec is None:
            raise InputError("--codec is missing: neither an array nor tokens say which codec's codes they are")
        from megatron_speech.codecs import get_codec

        codec = get_codec(args.codec)
        if args.text is not None:
            codes = parse_tokens(args.text, codec, "--text")
        elif args.input.endswith(".txt"):
            codes = parse_tokens(_read_text(args.input), codec, f"input {args.input}")
        else:
            codes = _read_array(args.input, codec)
        _write(args.output, codec, codes)
        return 0
    return _decode_rows(args)


def _is_rows_of_arrays(path: str | None) -> bool:
    return path is not None and path.endswith((".offsets.npy", ".codes.npy"))


def _write(path: Path, codec: Codec, codes: np.ndarray) -> None:
    from megatron_speech.codecs import decode_checked
    from megatron_speech.codecs.audio import write_audio

    if not len(codes):
        raise InputError(f"{path} would be empty: there are no codes; needed is one frame or more")
    audio = decode_checked(codec, codes)
    prepare_output_directory(path.absolute().parent)
    write_audio(path, audio, codec.sample_rate_hz)
    output(f"{path}: {len(codes)} frames of {codec.name}, {len(audio) / codec.sample_rate_hz:.2f} s")


def _read_array(path: str, codec: Codec) -> np.ndarray:
    import numpy as np

    from megatron_speech.codecs import check_codes

    try:
        codes = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"input {path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"input {path} is not a readable .npy file of numbers: {error}") from error
    if codes.ndim == 1 and len(codec.codebook_sizes) == 1:
        codes = codes[:, None]
    try:
        check_codes(codec, codes)
    except InputError as error:
        raise InputError(f"input {path}: {error}") from error
    return codes


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"input {path} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error.strerror or error}") from error


def parse_tokens(text: str, codec: Codec, where: str) -> np.ndarray:
    """Codes int32 [T, K] of the tokens in `text`, which stand in one place of it, frame by frame.

    What stands before and after them (the prompt, `<speech_end>`) is not of the recording. A frame that a cut left
    incomplete at the end is taken off with a notice.

    Raises:
        InputError: there are none, they stand in several places, are not in the order of the codebooks, or a code is
            outside its codebook.
    """
    import numpy as np

    from megatron_speech.codecs import check_codes

    names = list(codec.codebook_names)
    columns = {name: column for column, name in enumerate(names)}
    if len(names) == 1:
        columns["s"] = 0  # the name that exported tokenizers give the only codebook
    spelled = " ".join(f"<|{name}_0|>" for name in (["s"] if len(names) == 1 else names))
    tokens = [match for match in _TOKEN.finditer(text) if match[1] in columns]
    if not tokens:
        raise InputError(f"{where} holds no audio token of the codec {codec.name!r}; they are spelled {spelled}")
    for number, (before, token) in enumerate(zip([None, *tokens], tokens, strict=False)):
        between = "" if before is None else text[before.end() : token.start()]
        if between.strip():
            raise InputError(
                f"{where}: {_short(between)} stands between the audio tokens {number} and {number + 1}; give the "
                "tokens of one recording only, without those of a prompt"
            )
        if columns[token[1]] != number % len(names):
            raise InputError(
                f"{where}: audio token {number + 1} is {token[0]}, needed is one of codebook "
                f"{names[number % len(names)]!r}: the order of a frame is {spelled}"
            )
    if rest := len(tokens) % len(names):
        logger.warning(
            "%s: the last %d of %d audio tokens are no whole frame of %d: left out",
            where,
            rest,
            len(tokens),
            len(names),
        )
        tokens = tokens[: len(tokens) - rest]
    # A number of any length is a code that is out of range, not one that does not fit.
    values = [min(int(token[2][-19:]) if len(token[2]) < 20 else 2**62, 2**62) for token in tokens]
    codes = np.array(values, dtype=np.int64).reshape(-1, len(names))
    try:
        check_codes(codec, codes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return codes.astype(np.int32)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


# ---------------------------------------------------------------------------------------------------- rows


def _decode_rows(args: argparse.Namespace) -> int:
    decoder = _RowDecoder(args.codec)
    if args.output is not None:
        rows = list(_rows(args.input, args.sample_id, limit=2))
        if len(rows) > 1:
            raise InputError(
                f"input {args.input} has several rows; name one of them by --sample-id, or an --output-dir for all"
            )
        _, codec, codes = decoder.codes(rows[0], args.input)
        _write(args.output, codec, codes)
        return 0
    from megatron_speech.codecs import decode_checked
    from megatron_speech.codecs.audio import write_wav

    prepare_output_directory(args.output_dir)
    (args.output_dir / "wavs").mkdir(exist_ok=True)
    count, seconds = 0, 0.0
    with atomic_write(args.output_dir / "decoded.jsonl", "w") as listing:
        for row in _rows(args.input, args.sample_id):
            sample_id, codec, codes = decoder.codes(row, args.input)
            audio = decode_checked(codec, codes)
            name = f"wavs/{row.number:08d}.wav"
            write_wav(args.output_dir / name, audio, codec.sample_rate_hz)
            duration = len(audio) / codec.sample_rate_hz
            fields = {"sample_id": sample_id, "row": row.number, "wav_path": name, "duration": duration}
            listing.write(json.dumps(fields, ensure_ascii=False) + "\n")
            count, seconds = count + 1, seconds + duration
    output(f"{args.output_dir / 'decoded.jsonl'}: {count} recordings, {seconds:.1f} s")
    return 0


def _rows(path: str, sample_id: str | None, limit: int | None = None) -> Iterator[Row]:
    """The rows of an input, or those of one name; at most `limit`."""
    from megatron_speech.preprocess.readers.open import InputFiles

    found = 0
    for batch in InputFiles([path]).batches(0):
        for row in batch.read():
            if sample_id is None or str(_id_of(row)) == sample_id:
                found += 1
                yield row
                if found == limit:
                    return
    if not found:
        raise InputError(f"input {path} has no row with sample_id {sample_id!r}")


def _id_of(row: Row) -> Any:
    return row.fields.get("sample_id", row.fields.get("id", row.number))


class _RowDecoder:
    """Finds the codes of rows, which may be of several codecs."""

    def __init__(self, codec: str | None) -> None:
        self._named = codec
        self._codecs: dict[str, tuple[Codec, Any]] = {}

    def codes(self, row: Row, path: str) -> tuple[str, Codec, np.ndarray]:
        """(sample_id, codec, codes [T, K]) of a row of the file `path`. Raises InputError."""
        from megatron_speech.preprocess.readers.base import RowRejected
        from megatron_speech.preprocess.samples import SampleRules

        where = f"input {path}, row {row.number}"
        try:
            sample = SampleRules(task="speech_lm", language="und").sample(row, path)
        except RowRejected as error:
            raise InputError(f"{where}: {error.reason}") from error
        name = self._named or row.fields.get("codec")
        if not isinstance(name, str):
            raise InputError(f"{where} has no field codec; name the codec by --codec")
        codec, loader = self._open(name)
        if sample.codec_hash is not None and sample.codec_hash != codec.hash:
            raise InputError(
                f"{where} is of a codec with hash {sample.codec_hash[:12]}…, {codec.name!r} here has "
                f"{codec.hash[:12]}…: its codes would be other sounds; install the version that they were made with"
            )
        assert sample.codes is not None, "speech has codes"
        encoded = loader.encode([sample.codes])
        if 0 in encoded.rejected:
            raise InputError(f"{where}: {encoded.rejected[0].reason}")
        return str(_id_of(row)), codec, loader.space.decode_codes(encoded.ids[0])

    def _open(self, name: str) -> tuple[Codec, Any]:
        from megatron_speech.codecs import get_codec
        from megatron_speech.preprocess.codes import CodesLoader
        from megatron_speech.tokens.space import TokenSpace

        if name not in self._codecs:
            codec = get_codec(name)
            self._codecs[name] = codec, CodesLoader(TokenSpace.build("bytes", codec.describe()))
        return self._codecs[name]
