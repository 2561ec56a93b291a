"""How the documents of a dataset are distributed over lengths, read from the documents table a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_speech.data.dataset.documents_table import document_batches
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
HISTOGRAM_BINS = 12
COLUMNS = ("tokens", "target_tokens", "duration_seconds")


class Distribution:
    """Values and how often each occurs: lengths repeat, so that their number stays small however many there are."""

    def __init__(self) -> None:
        self.values = np.zeros(0)
        self.counts = np.zeros(0, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values in."""
        new, counts = np.unique(values, return_counts=True)
        joined, place = np.unique(np.concatenate([self.values, new]), return_inverse=True)
        both = np.concatenate([self.counts, counts])
        total = np.zeros(len(joined), dtype=np.int64)
        np.add.at(total, place, both)
        self.values, self.counts = joined, total

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    def quantiles(self, at: Sequence[float]) -> np.ndarray:
        """As `numpy.quantile` of all the values: between two neighbours, linearly."""
        places = np.asarray(at) * (self.total - 1)
        ends = np.cumsum(self.counts)
        low, high = (
            self.values[np.searchsorted(ends, whole, side="right")] for whole in (np.floor(places), np.ceil(places))
        )
        return low + (high - low) * (places - np.floor(places))

    def histogram(self, edges: np.ndarray) -> np.ndarray:
        """int64 [len(edges) - 1]: values from each edge to below the next; the last bin holds what lies beyond."""
        bins = np.clip(np.searchsorted(edges, self.values, side="right") - 1, 0, len(edges) - 2)
        return np.bincount(bins, self.counts, minlength=len(edges) - 1).astype(np.int64)


def distributions(dataset: TokenDataset) -> dict[str, Distribution]:
    """Of each of `COLUMNS`, without the documents that have no such value."""
    result = {name: Distribution() for name in COLUMNS}
    path = file_of(dataset.prefix, ".docs.parquet")
    for batch in document_batches(path, COLUMNS, len(dataset)):
        for name, distribution in result.items():
            distribution.add(batch[name].drop_null().to_numpy())
    return result


def bulk_limit(distribution: Distribution) -> float:
    """Up to where a histogram has bins of its own; what lies beyond goes into its last one.

    The 99.5 % quantile, or less where that is an outlier itself, as in a few hundred documents: at most eight
    interquartile ranges above the upper quartile, but never below nine tenths of the values.
    """
    lower, upper, nine_tenths, top = distribution.quantiles((0.25, 0.75, 0.9, 0.995)).tolist()
    fence = upper + 8 * max(upper - lower, 0.05 * upper)
    within = distribution.values[distribution.values <= max(min(top, fence), nine_tenths)]
    return float(within[-1])


def length_bins(distribution: Distribution) -> list[dict[str, int]]:
    """Documents by length in ids, in bins of equal width; the last one also holds those beyond :func:`bulk_limit`."""
    if not distribution.total:
        return []
    bottom, longest = (int(value) for value in distribution.quantiles((0.0, 1.0)))
    top = int(bulk_limit(distribution))
    edges = np.unique(np.linspace(bottom, max(top + 1, bottom + 1), HISTOGRAM_BINS + 1).astype(np.int64))
    counts = distribution.histogram(edges)
    ends = [*edges[1:-1].tolist(), longest + 1]
    return [
        {"from": start, "below": end, "documents": count}
        for start, end, count in zip(edges[:-1].tolist(), ends, counts.tolist(), strict=True)
    ]


def mass_curve(distribution: Distribution, edge: float) -> tuple[np.ndarray, np.ndarray] | None:
    """(lengths, share of all ids or seconds in documents up to that length), each float64 [points]; None without mass.

    What lies beyond `edge` is in the picture's last bar, so the curve ends there, and at 1.
    """
    mass = np.cumsum(distribution.values * distribution.counts)
    if mass[-1] <= 0:
        return None
    shown = distribution.values <= edge
    return np.append(distribution.values[shown], edge), np.append(mass[shown] / mass[-1], 1.0)


PLOT_BINS = 60
_TITLES = {
    "tokens": "ids per document",
    "target_tokens": "target ids per document",
    "duration_seconds": "seconds of speech",
}


def plot(path: str, dataset: TokenDataset, found: dict[str, Distribution]) -> None:
    """A picture of the length histograms: bars of documents, and the share of all ids (or seconds) up to a length.

    Raises:
        InputError: `path` cannot be written, or its ending names no picture format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    form = path.rpartition(".")[2].lower()
    if form not in canvas.get_supported_filetypes():
        raise InputError(f"--plot {path}: the ending names no picture; needed .png, .svg or .pdf")
    for axes, (name, distribution) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.set_title(_TITLES[name], fontsize=10)
        if not distribution.total:
            axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
            continue
        bottom, top = float(distribution.values[0]), bulk_limit(distribution)
        edges = np.linspace(bottom, max(top, bottom + 1e-9 + (name != "duration_seconds")), PLOT_BINS + 1)
        axes.bar(edges[:-1], distribution.histogram(edges), np.diff(edges), align="edge", color="tab:blue")
        axes.set_ylabel("documents", fontsize=8)
        beyond = int(distribution.counts[distribution.values > edges[-1]].sum())
        if beyond:
            axes.set_xlabel(
                f"the last bar also holds {beyond:,} longer ones, up to {distribution.values[-1]:,.6g}", fontsize=8
            )
        if (curve := mass_curve(distribution, float(edges[-1]))) is not None:
            share = axes.twinx()
            share.plot(*curve, color="tab:orange", linewidth=1)
            share.set_ylim(0, 1.02)
            share.set_ylabel("share of the mass up to here", fontsize=8, color="tab:orange")
    figure.suptitle(f"{dataset.prefix}: {len(dataset):,} documents", fontsize=10)
    with atomic_write(path) as handle:
        figure.savefig(handle, format=form)
