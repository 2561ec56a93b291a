#!/usr/bin/env python3
"""Codes, pairs or text to a token dataset; `megatron-speech preprocess-data` is the same command."""

import sys
from pathlib import Path

# A checkout runs as it is, installed or not, from any directory.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_speech.preprocess.pool import interrupt_on_sigterm
from megatron_speech.preprocess.preprocess_data import main

if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
