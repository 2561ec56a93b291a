"""One-shot conversions: recordings to codes, and codes, transcripts and text to token datasets."""
