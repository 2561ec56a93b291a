from __future__ import annotations

import sys
from pathlib import Path

# Helpers shared by the tests of this folder; test folders are no packages.
sys.path.insert(0, str(Path(__file__).parent))
