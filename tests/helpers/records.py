"""Files that version 0.1.0 wrote for a run of 40 rows in parts of 8."""

from __future__ import annotations

import json
from typing import Any

from engine.core.json_records import from_builtins
from engine.runs.run_record import RunRecord

RUN = """{
  "format": 1,
  "run_id": "66e445b81e654e629fb3a1d699594d7b",
  "started": "2026-11-29T03:40:17+00:00",
  "result_options": {
    "manifest_sha256": "f0f2e8473d69a9d39afc1671017cfd83e7df3b0b7ca33aab702466a23497308a",
    "root": "/data/archive",
    "path_column": "path",
    "include": [],
    "exclude": [],
    "since": null,
    "column_prefix": "",
    "bundle_sha256": "304fdcbd828c1a20eade2738bc70117bbd239fc21860fa6435fe16ba9b7c6c24",
    "runner": "onnx",
    "device": "cpu",
    "precision": "fp32",
    "plans": null,
    "decode": "exact",
    "decoder": null,
    "batch_size": 8,
    "part_rows": 8,
    "shards": null,
    "max_pixels": 100000000,
    "max_file_size": 536870912,
    "include_uids": false,
    "redacted_by": null,
    "kept_columns": null
  },
  "manifest": "/data/archive",
  "rows": 40,
  "not_listed": {},
  "since": null,
  "bundle": "/data/bundle",
  "classes": [
    "normal",
    "osteopenia",
    "osteoporosis"
  ],
  "target": "osteoporosis",
  "groups": {
    "bone_loss": [
      "osteopenia",
      "osteoporosis"
    ]
  },
  "operating_points": null,
  "out_of_distribution": null,
  "weights": {
    "member0": 0.6,
    "member1": 0.4
  },
  "machine": {
    "system": "Linux 6.18.44",
    "processor": "AMD EPYC",
    "gpu": {
      "name": "NVIDIA H100",
      "uuid": "GPU-0",
      "capability": "9.0",
      "driver": "580"
    }
  },
  "chosen": "ONNX Runtime on the CPU: asked for",
  "tuning": {
    "batch_size_asked": 16,
    "eager_ms": 2.5,
    "compiled_ms": null,
    "compiled": false,
    "streams": {
      "concurrent": true,
      "sequential_ms": 2.5,
      "concurrent_ms": 2.0,
      "gain": 1.25
    },
    "canaries": 1e-05,
    "decoding_tried": [
      {
        "hw_decoder_load": 0.65,
        "hybrid_huffman_threshold": 1000000,
        "width_hint": 310,
        "height_hint": 290,
        "cpu_share": 0.0,
        "images_per_s": 4100.5
      }
    ],
    "decoding": {
      "hw_decoder_load": 0.65,
      "hybrid_huffman_threshold": 1000000,
      "width_hint": 310,
      "height_hint": 290,
      "cpu_share": 0.0
    }
  },
  "versions": {
    "engine": "0.1.0",
    "python": "3.11.7",
    "onnxruntime": "1.32.0"
  },
  "profile": {
    "file": "0123456789abcdef.json",
    "knobs": {
      "batch_size": 8,
      "cuda_graph": false
    }
  }
}
"""

SUCCESS = """{
  "run_id": "66e445b81e654e629fb3a1d699594d7b",
  "finished": "2026-11-29T03:40:19+00:00",
  "rows": 40,
  "ok": 40,
  "skipped": 0,
  "errors": 0,
  "by_status": {
    "ok": 40
  },
  "by_class": {
    "osteoporosis": 38,
    "osteopenia": 1,
    "normal": 1
  },
  "scored_by": [
    {
      "host": "vm",
      "device": "cpu",
      "gpu": null,
      "runner": "onnx",
      "precision": "fp32",
      "parts": 5,
      "rows": 40
    }
  ],
  "last_start": {
    "rows": 40,
    "elapsed_s": 0.328,
    "stages": {
      "write": {
        "busy_s": 0.066,
        "starved_s": 0.25,
        "blocked_s": 0.0,
        "occupancy": 0.203
      }
    },
    "limited_by": "write",
    "decoder_restarts": 0,
    "decoder_refusals": 0,
    "actors": {
      "started": 2,
      "lost": 0,
      "refused": [],
      "parts_done_again": 0,
      "rows_crashed": 0
    }
  }
}
"""

ACTORS = """{
  "run_id": "66e445b81e654e629fb3a1d699594d7b",
  "actors": {
    "b7e16382ab6d": {
      "host": "vm",
      "device": "cpu",
      "rounds": 2
    }
  }
}
"""

FOOTER = """{
  "part": 0,
  "by_status": {
    "ok": 8
  },
  "by_class": {
    "osteoporosis": 8
  },
  "by": {
    "host": "vm",
    "device": "cpu",
    "gpu": null,
    "runner": "onnx",
    "precision": "fp32",
    "actor": "b7e16382ab6d",
    "round": 1
  },
  "written": "2026-11-29T03:41:14.152+00:00"
}
"""


def run_record(**options: Any) -> RunRecord:
    """Return that run with other result options."""
    data = json.loads(RUN)
    return from_builtins(data | {"result_options": data["result_options"] | options}, RunRecord)
