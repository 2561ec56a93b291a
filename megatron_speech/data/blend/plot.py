"""The picture of `megatron-speech blend --plot`: a row per stage, target beside realised, epochs, what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, prepare_output_directory

SUFFIXES = (".png", ".svg", ".pdf")
_SHOWN = 14  # bars of a panel; what is left is summed up in one more
_FEWEST = 4  # rows of a panel, so that a single bar is no block
_COLOURS = {"target": "#b9c3cd", "realised": "#1f6fb4", "audio_share": "#e8923a"}
_LEGEND = {"target": "target, of tokens", "realised": "realised, of tokens", "audio_share": "of audio seconds"}


def check_plot_path(path: Path) -> None:
    """Refuse a picture that could not be written, before the work is done.

    Raises:
        InputError: another suffix than .png, .svg or .pdf, or a folder that cannot be written to.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"--plot {path}: the suffix is {path.suffix or 'missing'}, needed one of {', '.join(SUFFIXES)}"
        )
    prepare_output_directory(path.parent)


def plot_reports(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    """Draw blend reports (as in blend.json) to `path`, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    heights = [1.6 + 0.42 * max(_bars(report)) for report in reports]
    figure = Figure(figsize=(22, sum(heights) + 0.3), layout="constrained")
    rows = figure.subfigures(len(reports), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, report in zip(rows, reports, strict=True):
        axes = row.subplots(1, 5, width_ratios=[1, 1, 1, 1.3, 0.8])
        for ax, field in zip(axes, ("task", "language", "source"), strict=False):
            _shares(ax, report[f"by_{field}"], f"by {field}")
        _epochs(axes[3], report)
        _left_out(axes[4], report)
        first = f"from sequence {report['first_sequence']:,} on, " if report["first_sequence"] else ""
        row.suptitle(
            f"stage {report['stage']}: {first}{report['tokens']:,} tokens, "
            f"{report['audio_seconds'] / 3600:,.1f} h of audio, {report['packing']} packing, "
            f"{report['pad_fraction']:.2%} padding; shares are of {report['counted']}\n",
            x=0.005, ha="left", fontsize=12, fontweight="bold",
        )  # fmt: skip
    handles, labels = figure.axes[0].get_legend_handles_labels()
    rows[0].legend(handles, labels, loc="upper right", ncols=3, frameon=False)
    with atomic_write(path) as handle:
        figure.savefig(handle, format=path.suffix[1:].lower(), dpi=110)


def _bars(report: dict[str, Any]) -> list[int]:
    """Bars of the panels of a stage; epochs are drawn thinner."""
    fields = [min(_SHOWN + 1, len(report[f"by_{field}"])) for field in ("task", "language", "source")]
    return [*fields, (min(2 * _SHOWN, len(report["strata"])) + 1) // 2, 4]


def _name(text: str, width: int = 34) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-width // 2 :]}"


def _shares(ax: Any, rows: dict[str, dict[str, Any]], title: str) -> None:
    """Three bars a category: target, realised, and its part of the audio."""
    largest = sorted(rows.items(), key=lambda item: -max(item[1][field] for field in _COLOURS))
    shown = [(_name(name), row) for name, row in largest[:_SHOWN]]
    if rest := [row for _, row in largest[_SHOWN:]]:
        shown.append((f"{len(rest)} more", {field: sum(row[field] for row in rest) for field in _COLOURS}))
    height = 0.27
    for offset, (field, colour) in enumerate(_COLOURS.items()):
        values = [100 * row[field] for _, row in shown]
        places = [k + (offset - 1) * height for k in range(len(shown))]
        ax.barh(places, values, height=height, color=colour, label=_LEGEND[field])
        for place, value in zip(places, values, strict=True):
            ax.text(value, place, f" {value:.2f}", va="center", fontsize=7, color="#444444")
    ax.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=9)
    ax.set_xlabel("% of the stage", fontsize=9)
    ax.set_ylim(-0.6, max(_FEWEST, len(shown)) - 0.4)
    _finish(ax, title, max([100 * row[field] for _, row in shown for field in _COLOURS], default=1.0))


def _epochs(ax: Any, report: dict[str, Any]) -> None:
    strata = sorted(report["strata"], key=lambda stratum: -stratum["epochs"])[: 2 * _SHOWN]
    values = [stratum["epochs"] for stratum in strata]
    colours = ["#c0392b" if stratum["repeated_too_often"] else "#5a7d5a" for stratum in strata]
    ax.barh(range(len(strata)), values, height=0.7, color=colours)
    for place, stratum in enumerate(strata):
        held = " (epoch_limit)" if stratum["name"] in report["limited"] else ""
        ax.text(stratum["epochs"], place, f" {stratum['epochs']:.2f}{held}", va="center", fontsize=7, color="#444444")
    ax.set_yticks(range(len(strata)), [_name(stratum["name"], 48) for stratum in strata], fontsize=8)
    ax.set_xlabel("epochs in the whole stage; red: above max_epochs", fontsize=9)
    ax.set_ylim(-0.8, max(_FEWEST, len(strata)) - 0.2)
    more = len(report["strata"]) - len(strata)
    _finish(ax, "epochs by stratum" + (f" (the {len(strata)} most repeated of {more + len(strata)})" if more else ""),
            max(values, default=1.0))  # fmt: skip


def _left_out(ax: Any, report: dict[str, Any]) -> None:
    reasons = {reason: sum(counts.values()) for reason, counts in report["excluded_documents"].items()}
    names = [reason.replace("_", " ") for reason in reasons]
    ax.barh(range(len(names)), list(reasons.values()), height=0.5, color="#8e7cc3")
    for place, count in enumerate(reasons.values()):
        ax.text(count, place, f" {count:,}", va="center", fontsize=8, color="#444444")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(-0.6, max(_FEWEST, len(names)) - 0.4)
    ax.set_xlabel("documents", fontsize=9)
    _finish(ax, "left out" if names else "left out: nothing", max(reasons.values(), default=1))


def _finish(ax: Any, title: str, largest: float) -> None:
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlim(0, 1.25 * largest or 1.0)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.invert_yaxis()
