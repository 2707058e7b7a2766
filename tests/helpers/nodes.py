"""A Ray cluster of several nodes on this machine, in a separate process.

Commands, one per line: `add`, `remove` (the node added last). Each is answered by a line with the address.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Nodes:
    """The cluster, and the folder of requested faults."""

    process: subprocess.Popen[str]
    hurt: Path
    address: str = ""

    def tell(self, command: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the cluster is gone"

    def order(self, name: str) -> None:
        (self.hurt / name).touch()

    def actors(self) -> list[int]:
        """List the process ids of the engine's actors."""
        result = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_text()
                environment = (folder / "environ").read_text()
            except OSError:
                continue
            if command.startswith("ray::Actor") and f"HURT={self.hurt}" in environment:
                result.append(int(folder.name))
        return result

    def wait_for_actors(self, count: int) -> list[int]:
        deadline = time.monotonic() + 60
        while len(result := self.actors()) < count:
            assert time.monotonic() < deadline, f"{len(result)} actors"
            time.sleep(0.02)
        return result


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = []
    answer = cluster.address
    for line in sys.stdin:
        if line.strip() == "add":
            workers.append(cluster.add_node(num_cpus=1))
        elif line.strip() == "remove":
            cluster.remove_node(workers.pop(), allow_graceful=False)
        print(answer, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
