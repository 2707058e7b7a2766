"""A Ray of several nodes on this machine, in a process of its own: says its address, then obeys.

Commands, a line each: `add`, `remove` (the node added last); each is answered by a line.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
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
