"""What a command says about unfinished work that it found."""

from __future__ import annotations

import sys

from megatron_speech.data.dataset.dataset_writer import DatasetWriter


def report_resume(writer: DatasetWriter) -> None:
    """Say where the work goes on, or why it begins anew; nothing where there was none."""
    if writer.complete:
        print(f"{writer.prefix}: all was converted before; putting the files in place", file=sys.stderr)
    elif writer.state is not None:
        print(f"{writer.prefix}: goes on after {writer.documents:,} documents", file=sys.stderr)
    elif writer.anew is not None:
        print(f"{writer.prefix}: unfinished work is begun anew, since {writer.anew}", file=sys.stderr)
