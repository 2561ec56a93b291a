"""What a command logs about unfinished work that it found."""

from __future__ import annotations

import logging

from megatron_speech.data.dataset.dataset_writer import DatasetWriter

logger = logging.getLogger(__name__)


def report_resume(writer: DatasetWriter) -> None:
    """Log where the work resumes, or why it restarts; nothing where there was none."""
    if writer.complete:
        logger.info("%s: every row was converted before; moving the files into place", writer.prefix)
    elif writer.state is not None:
        logger.info("%s: resumes after %s documents", writer.prefix, f"{writer.documents:,}")
    elif writer.restart_reason is not None:
        logger.info("%s: unfinished work is restarted, since %s", writer.prefix, writer.restart_reason)
