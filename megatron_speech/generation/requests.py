"""What the engine is asked for: one utterance, with the codes of its reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GenerationRequest:
    """One utterance to be spoken.

    Attributes:
        text: what is to be said; not empty.
        seed: of the noise, any integer; equal requests with equal seeds sound equal.
        language: BCP-47, carried to the reports; the prompt does not depend on it.
        reference_codes: int [T, K], a recording of the voice to be cloned.
        reference_text: what is said in it. Both or neither.
        control_tags: whether `[[pause]]` in the texts is a token of the token space; else it is text.
    """

    text: str
    seed: int = 0
    language: str | None = None
    reference_codes: np.ndarray | None = None
    reference_text: str | None = None
    control_tags: bool = False
