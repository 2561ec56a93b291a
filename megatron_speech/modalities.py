"""What kinds of ids there are; their order numbers them in modality tables, loss groups and the kernels."""

from __future__ import annotations

MODALITIES = ("text", "audio", "special")
MODALITY_TEXT, MODALITY_AUDIO, MODALITY_SPECIAL = range(len(MODALITIES))
