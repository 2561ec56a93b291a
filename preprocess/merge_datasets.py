#!/usr/bin/env python3
"""Token datasets joined into one; `megatron-speech merge-datasets` is the same command."""

import sys
from pathlib import Path

# A checkout runs as it is, installed or not, from any directory.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_speech.preprocess.merge_datasets import main
from megatron_speech.preprocess.pool import interrupt_on_sigterm

if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
