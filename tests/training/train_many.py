"""Started under torchrun: several `megatron-speech train` commands, one after the other, in the same processes.

Importing torch and megatron-core takes most of the time of a run of a toy. argv[1]: JSON list of argument lists;
argv[2]: JSON list of free ports, one per command.
"""

from __future__ import annotations

import json
import os
import sys

from megatron_speech import cli

if __name__ == "__main__":
    codes = []
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # a rendezvous of its own for every command
    for arguments, port in zip(json.loads(sys.argv[1]), json.loads(sys.argv[2]), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(cli.main(["train", *arguments]))
    if os.environ["RANK"] == "0":
        print("exit codes", json.dumps(codes), flush=True)
