"""The same as `torch_loader.py` with compiled members."""

from __future__ import annotations

import torch._inductor.config

from benchmarks.peers.job import PeerJob
from benchmarks.peers.torch_loader import main

if __name__ == "__main__":
    torch._inductor.config.freezing = True  # its documentation recommends this for inference on a CPU
    main(PeerJob.from_command_line(), compiled=True)
