"""The fused kernel beside its NumPy counterpart; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.bundle import bundle as bundles
from engine.scoring.ensemble import combine_logits
from engine.scoring.gpu_fuse import FusedSoftmax
from tests.helpers.bundles import write_bundle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fusion_of(
    folder: Path, members: int, classes: int, temperature: float
) -> tuple[FusedSoftmax, bundles.Bundle]:
    weights = np.random.default_rng(members).dirichlet(np.ones(members))
    weights[-1] = 1 - weights[:-1].sum()
    names = tuple(f"class{number}" for number in range(classes))
    path = write_bundle(folder, classes=names, weights=tuple(map(float, weights)), temperature=temperature)
    loaded = bundles.load_bundle(path)
    warm = [replace(member, temperature=0.5 + position) for position, member in enumerate(loaded.members)]
    loaded = replace(loaded, members=tuple(warm))
    return FusedSoftmax(loaded, DEVICE), loaded


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("classes", [2, 3, 17])
@pytest.mark.parametrize("members", [1, 3])
def test_the_kernel_equals_numpy(tmp_path, members, classes, temperature):
    fusion, bundle = fusion_of(tmp_path / "b", members, classes, temperature)
    logits = np.random.default_rng(1).normal(0, 6, (members, 9, classes)).astype(np.float32)
    logits[:, 3] = 0.25  # a tie: the first class
    logits[:, 4] *= 1e4  # would overflow without the shift by the maximum
    logits[0, 5, 0], logits[0, 6, 1], logits[-1, 7, 0] = np.nan, np.inf, -np.inf
    packed = torch.full((9, fusion.width), -7.0, device=DEVICE)
    padded = np.concatenate([logits, np.full((members, 4, classes), np.nan, np.float32)], axis=1)
    fusion.enqueue(torch.from_numpy(padded).to(DEVICE), packed)
    result = fusion.unpack(packed.cpu().numpy())
    assert (result.prediction[5:8] == -1).all()
    fine = np.isfinite(logits).all(axis=(0, 2))
    temperatures = [member.temperature for member in bundle.members]
    each, ensemble = combine_logits(
        logits[:, fine], weights=bundle.weights, temperatures=temperatures, temperature=temperature
    )
    assert np.abs(result.members[:, fine] - each).max() < 1e-6
    assert np.abs(result.probabilities[fine] - ensemble).max() < 1e-6
    assert (result.prediction[fine] == result.probabilities[fine].argmax(axis=1)).all()
    assert np.array_equal(result.confidence[fine], result.probabilities[fine].max(axis=1))
    assert result.prediction[3] == 0
    assert (packed.cpu().numpy()[fine] != -7).all(), "every place is written"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 90, 120])
def test_the_kernel_compiles_for_other_gpus(tmp_path, capability):
    """In a process of its own: where the interpreter is on, there is no compiler."""
    import subprocess
    import sys

    from tests.helpers.processes import ROOT

    source = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.scoring.gpu_fuse import _fuse_row as kernel
arrays = dict.fromkeys(["logits", "weights", "temperatures", "packed"], "*fp32")
types = dict(arrays, temperature="fp32", rows="i32")
fixed = dict(members=2, classes=3, block=4, sharpen=True)
signature = {{**types, **{{name: "constexpr" for name in fixed}}}}
target = GPUTarget("cuda", {capability}, 32)
built = triton.compile(ASTSource(kernel, signature, constexprs=fixed), target=target)
assert len(built.asm["cubin"]) > 1000
assert built.asm["ptx"].count("div.rn.f32") >= 3, "temperatures are divided by as NumPy does it"
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
