"""report.html: one file with players, spectrograms, plots and tables; nothing is fetched when it is opened."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import soundfile
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from megatron_speech.evaluation.run_files import RunFiles
from megatron_speech.evaluation.runner import Evaluation

# Canaries whose sound is embedded: beyond these the report names the wav files beside it.
EMBEDDED_PLAYERS = 400

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c0392b; --good: #2e8b57; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.2rem; } .soft { opacity: .7; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); } tbody tr { border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--soft); border-radius: .6rem; padding: .6rem 1rem; min-width: 8rem; }
.card b { display: block; font-size: 1.5rem; } .card small { opacity: .75; display: block; }
.wide { overflow-x: auto; } img.plot { max-width: 100%; background: #fff; border-radius: .4rem; margin: .4rem 0; }
img.spectrum { height: 72px; max-width: 260px; border-radius: 3px; display: block; image-rendering: auto; }
.axes { border-left: 1px solid var(--line); padding-left: 3px; } .axes small { opacity: .6; font-size: .72rem; }
audio { width: 220px; height: 32px; display: block; margin-bottom: .2rem; }
.bad { color: var(--bad); } .good { color: var(--good); } ul.notes { background: var(--soft); padding: .6rem 2rem; }
"""

_FLOOR_DB = 60.0


def wav_bytes(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    """16-bit wav of mono float `audio` [n]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1.0, 1.0), sample_rate_hz, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def spectrogram(audio: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Power in dB below the loudest point, float32 [bins, frames], low frequencies first: 32 ms windows, 8 ms hop."""
    length = round(0.032 * sample_rate_hz)
    hop = max(1, length // 4)
    padded = np.pad(np.asarray(audio, dtype=np.float32), (length // 2, length))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop] * np.hanning(length).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)).T ** 2
    decibel = 10 * np.log10(power + 1e-12)
    return np.maximum(decibel - decibel.max(), -_FLOOR_DB).astype(np.float32)


def _data_uri(kind: str, payload: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(payload).decode('ascii')}"


def _spectrum_image(audio: np.ndarray, sample_rate_hz: int, label: str) -> str:
    # 48 colours by index: a fifth of the bytes of RGBA, and no eye sees more.
    levels = 48
    decibel = spectrogram(audio, sample_rate_hz)[::-1]
    index = np.round((decibel / _FLOOR_DB + 1) * (levels - 1)).astype(np.uint8)
    image = Image.new("P", index.shape[::-1])
    image.putpalette(colormaps["magma"](np.linspace(0, 1, levels), bytes=True)[:, :3].tobytes())
    image.frombytes(index.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    picture = f'<img class="spectrum" alt="{html.escape(label)}" src="{_data_uri("image/png", buffer.getvalue())}">'
    seconds, top = len(audio) / sample_rate_hz, sample_rate_hz / 2000
    return f'<div class="axes">{picture}<small>0 to {top:g} kHz, 0 to {seconds:.2f} s</small></div>'


def _player(audio: np.ndarray, sample_rate_hz: int) -> str:
    return f'<audio controls preload="none" src="{_data_uri("audio/wav", wav_bytes(audio, sample_rate_hz))}"></audio>'


def _figure(figure: Figure, label: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f'<img class="plot" alt="{html.escape(label)}" src="{_data_uri("image/png", buffer.getvalue())}">'


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """`rows` are HTML already; `numeric` columns are set flush right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="n"' if i in numeric else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


# ------------------------------------------------------------------------------------------- sections


def _cards(overall: dict[str, Any]) -> str:
    duration = overall["duration_seconds"]
    cards = [
        ("utterances", f"{overall['utterances']:,}", f"{duration['total']:.1f} s of speech"),
        ("ended by themselves", _percent(overall["eos_rate"]), f"{overall['stop_failures']} cut at the limit"),
        ("caught in a loop", _percent(overall["loop_rate"]), f"originals: {_percent(overall['loop_rate_original'])}"),
        (
            "invalid-token rate",
            _percent(overall["invalid_token_rate"], 2),
            f"most probable id invalid: {_percent(overall['invalid_argmax_rate'], 2)}",
        ),
    ]
    speech = overall["speech"]
    if speech is not None:
        for name, key in (("word error rate", "wer"), ("transcript exact", "exact")):
            found = {part: (speech[part] or {}).get(key) for part in ("generated", "round_trip", "original", "chance")}
            cards.append(
                (
                    name,
                    _percent(found["generated"]),
                    f"codec {_percent(found['round_trip'])} · original {_percent(found['original'])} · "
                    f"chance {_percent(found['chance'])}",
                )
            )
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card">{html.escape(name)}<b>{value}</b><small>{html.escape(more)}</small></div>'
            for name, value, more in cards
        )
        + "</div>"
    )


_GROUP_HEADER = (
    "utterances", "ended", "loops", "invalid", "seconds", "× original",
    "WER", "codec", "original", "chance", "CER", "codec", "exact", "codec", "chance",
)  # fmt: skip


def _group_table(title: str, groups: dict[str, Any]) -> str:
    rows = []
    for name, group in groups.items():
        speech = group["speech"] or {}

        def rate(part: str, key: str, speech: dict[str, Any] = speech) -> str:
            return _percent((speech.get(part) or {}).get(key))

        ratio = group["duration_ratio"]
        rows.append(
            [
                html.escape(name),
                f"{group['utterances']:,}",
                _percent(group["eos_rate"]),
                _percent(group["loop_rate"]),
                _percent(group["invalid_token_rate"], 2),
                f"{group['duration_seconds']['mean']:.2f}",
                "–" if ratio is None else f"{ratio:.2f}",
                *(rate(part, "wer") for part in ("generated", "round_trip", "original", "chance")),
                *(rate(part, "cer") for part in ("generated", "round_trip")),
                *(rate(part, "exact") for part in ("generated", "round_trip", "chance")),
            ]
        )
    return _table((title, *_GROUP_HEADER), rows, numeric=range(1, 1 + len(_GROUP_HEADER)))


def _score_plot(groups: dict[str, Any]) -> str:
    scored = {name: group["speech"] for name, group in groups.items() if group["speech"] is not None}
    if not scored:
        return ""
    figure = Figure(figsize=(max(4.0, 1.6 * len(scored) + 2.5), 3.0))
    axes = figure.subplots()
    parts = ("generated", "round_trip", "original", "chance")
    place = np.arange(len(scored))
    for number, (part, colour) in enumerate(zip(parts, ("#3b6fb6", "#7fb069", "#2e8b57", "#b0b0b0"), strict=True)):
        values = [(speech[part] or {}).get("wer", np.nan) for speech in scored.values()]
        axes.bar(
            place + 0.2 * (number - 1.5), [100 * v for v in values], 0.19, label=part.replace("_", " "), color=colour
        )
    axes.set_xticks(place, list(scored))
    axes.set_ylabel("word error rate, %")
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(figure, "word error rates beside their ceilings and chance")


def _duration_plot(evaluation: Evaluation) -> str:
    rate = evaluation.sample_rate_hz
    spoken = [len(row.generated.audio) / rate for row in evaluation.items]
    real = [len(item.original.audio) / rate for item in evaluation.recordings.values()]
    figure = Figure(figsize=(5.0, 3.0))
    axes = figure.subplots()
    edges = np.linspace(0, max([*spoken, *real]) * 1.02, 31)
    for values, label, colour in ((spoken, "generated", "#3b6fb6"), (real, "original", "#2e8b57")):
        if values:
            counts, _ = np.histogram(values, edges)
            axes.stairs(100 * counts / len(values), edges, linewidth=1.6, label=label, color=colour)
    axes.set_xlabel("seconds")
    axes.set_ylabel("share of utterances, %")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(figure, "durations")


def _loss_plot(run: RunFiles) -> str:
    names = sorted({key for row in run.training for key in row if key.startswith("loss/modality/")})
    figure = Figure(figsize=(9.0, 3.4))
    axes = figure.subplots()
    for key, label in (("loss", "loss"), *((name, name.removeprefix("loss/modality/")) for name in names)):
        points = [(row["step"], row[key]) for row in run.training if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1.8 if key == "loss" else 1.0, label=label)
    # Stages validate what they learn: an SFT loss is of target speech only, so lines do not cross from stage to stage.
    validated = [row for row in run.validation if row.get("loss") is not None]
    for number, stage in enumerate(dict.fromkeys(row.get("stage") for row in validated)):
        points = [(row["step"], row["loss"]) for row in validated if row.get("stage") == stage]
        name = "_nolegend_" if number else "validation"
        axes.plot(*zip(*points, strict=True), "o-", color="black", markersize=3, linewidth=0.8, label=name)
    before = None
    for row in run.training:
        if row.get("stage") != before:
            axes.axvline(row["step"], color="#999", linewidth=0.8, linestyle=":")
            axes.text(row["step"], 1.01, f" {row.get('stage')}", transform=axes.get_xaxis_transform(), fontsize=8)
            before = row.get("stage")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _figure(figure, "loss curves")


def _goodput(run: RunFiles) -> str:
    """What the time of the run became, as its last record says; "" for a run that did not note it."""
    last = next((row for row in reversed(run.training) if row.get("goodput") is not None), None)
    if last is None:
        return ""
    lost = {
        name.removeprefix("lost_seconds/"): seconds
        for name, seconds in last.items()
        if name.startswith("lost_seconds/")
    }
    parts = ", ".join(f"{html.escape(name)} {seconds:,.1f}" for name, seconds in lost.items() if seconds >= 0.05)
    return f"<p>Goodput {_percent(last['goodput'])} up to step {last['step']:,}; lost seconds: {parts or 'none'}.</p>"


def _blend_plot(stages: Sequence[dict[str, Any]]) -> str:
    """Target and realised shares of every stage, by task, language and source."""
    aspects = ("by_task", "by_language", "by_source")
    figure = Figure(figsize=(9.0, 0.9 + 0.62 * len(stages) * 2))
    all_axes = np.atleast_2d(figure.subplots(1, len(aspects), sharey=True))[0]
    labels = [f"{stage['stage']} {kind}" for stage in stages for kind in ("target", "realised")]
    for axes, aspect in zip(all_axes, aspects, strict=True):
        names = sorted({name for stage in stages for name in stage.get(aspect, {})})
        left = np.zeros(len(labels))
        for number, name in enumerate(names):
            shares = [stage.get(aspect, {}).get(name, {}) for stage in stages]
            widths = np.array([100 * share.get(kind, 0.0) for share in shares for kind in ("target", "realised")])
            # Twenty colours; a 21st name repeats the first, and the legend stops before that.
            axes.barh(np.arange(len(labels)), widths, left=left, height=0.75, color=f"C{number % 10}",
                      alpha=1.0 if number % 20 < 10 else 0.55, label=name if number < 12 else None)  # fmt: skip
            left += widths
        axes.set_title(aspect.removeprefix("by_"), fontsize=9)
        axes.set_xlim(0, 100)
        axes.set_yticks(np.arange(len(labels)), labels, fontsize=8)
        if names:
            axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].invert_yaxis()
    return _figure(figure, "blend: target and realised shares of tokens, %")


def _canary_table(evaluation: Evaluation, players: int) -> str:
    rate, rows = evaluation.sample_rate_hz, []
    shown: set[str] = set()
    for number, (row, item) in enumerate(zip(evaluation.items, evaluation.report["items"], strict=True)):
        embedded = number < players
        if embedded:
            sound = _player(row.generated.audio, rate) + _spectrum_image(
                row.generated.audio, rate, f"{item['id']} generated"
            )
        else:
            sound = f'<a href="{html.escape(item["wav_path"])}">{html.escape(item["wav_path"])}</a>'
        real, original = evaluation.recordings.get(row.canary.id), "–"
        if real is not None and row.canary.id in shown:
            original = "as above"
        elif real is not None and embedded:
            shown.add(row.canary.id)
            original = _player(real.original.audio, rate) + _spectrum_image(
                real.original.audio, rate, f"{item['id']} original"
            )
        flags = [] if item["ended"] else [f'<span class="bad">cut: {html.escape(item["stop_reason"])}</span>']
        if item["loop"]:
            flags.append('<span class="bad">loop</span>')
        heard = item["generated"]["transcript"]
        if heard is None:
            transcript = '<span class="soft">not scored</span>'
        else:
            good = item["generated"]["wer"] == 0
            transcript = f'<span class="{"good" if good else "bad"}">{html.escape(heard) or "(nothing)"}</span>'
            for part in ("round_trip", "original"):
                if item[part] is not None and item[part]["transcript"] is not None:
                    name, words = part.replace("round_trip", "codec"), item[part]["transcript"] or "(nothing)"
                    transcript += f'<br><small class="soft">{name}: {html.escape(words)}</small>'
        text = html.escape(item["text"])
        if item["expected"] != item["text"]:
            text += f'<br><small class="soft">expected: {html.escape(item["expected"])}</small>'
        seconds, invalid = item["generated"]["seconds"], _percent(item["invalid_token_rate"], 2)
        rows.append(
            [
                f"<b>{html.escape(item['id'])}</b><br><small>{html.escape(item['language'])} · "
                f"{html.escape(item['category'])} · seed {item['seed']}</small>",
                text,
                sound,
                original,
                transcript,
                f"{seconds:.2f} s<br><small>invalid {invalid}</small>" + "".join(f"<br>{flag}" for flag in flags),
            ]
        )
    return _table(("canary", "text", "generated", "original", "heard", ""), rows)


def build_html(evaluation: Evaluation, run: RunFiles | None = None, *, players: int = EMBEDDED_PLAYERS) -> str:
    """The report as one HTML page.

    Args:
        evaluation: what :func:`megatron_speech.evaluation.runner.evaluate` returned.
        run: adds loss curves and the blend of the training run.
        players: canaries beyond this number are listed with a link to their wav instead of an embedded player.
    """
    report = evaluation.report
    checkpoint, scorer = report["checkpoint"], report["scorer"]
    origin = " · ".join(f"{key} {value}" for key, value in checkpoint.items()) or "no checkpoint named"
    decoding = ", ".join(f"{key} {value:g}" for key, value in report["decoding"].items())
    listener = "none"
    if scorer["kind"] is not None:
        listener = f"{scorer['kind']}, {scorer['mode']}"
        if scorer.get("phrases"):
            guess = _percent(1 / len(scorer["phrases"]))
            listener += f" of {len(scorer['phrases'])} sentences (a guess is right {guess} of the time)"
    notes = [*report["notes"]]
    if len(report["items"]) > players:
        notes.append(f"players and pictures are embedded for the first {players} of {len(report['items'])} utterances")
    parts = [
        f"<h1>{html.escape(report['name'])}</h1>",
        f'<p class="soft">{html.escape(origin)}<br>{html.escape(report["created"])} · '
        f"codec {html.escape(report['codec']['name'])} · decoding: {html.escape(decoding)} · "
        f"scorer: {html.escape(listener)}</p>",
        _cards(report["overall"]),
    ]
    if notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>")
    if run is not None:
        parts += ["<h2>Training</h2>", _loss_plot(run), _goodput(run)]
        if run.stages:
            parts += ["<p>What was trained on, in shares of tokens:</p>", _blend_plot(run.stages)]
    parts += [
        "<h2>Scores</h2>",
        "<p>Every rate stands beside the same scorer's rate on the original recordings, on those after the codec "
        "(what a perfect model could reach), and beside chance (the same transcripts against the texts of other "
        "canaries).</p>",
        _score_plot({"all": report["overall"], **report["by_language"]}),
        _duration_plot(evaluation),
        _group_table("language", {**report["by_language"], "all": report["overall"]}),
        "<p></p>",
        _group_table("category", report["by_category"]),
        f'<p class="soft">Loops: {html.escape(report["loop_definition"])}. Invalid-token rate: probability that an '
        "unrestricted model would have put on ids which are not legal at their place; sampling itself is restricted "
        "to legal ids.</p>",
        "<h2>Canaries</h2>",
        _canary_table(evaluation, players),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report["name"])}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
