#!/usr/bin/env python3
"""Recordings to codes; `megatron-speech encode-audio` is the same command."""

import sys
from pathlib import Path

# A checkout runs as it is, installed or not, from any directory.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_speech.preprocess.encode_audio import main

if __name__ == "__main__":
    sys.exit(main())
