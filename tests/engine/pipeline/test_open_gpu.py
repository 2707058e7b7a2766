"""The whole GPU path through the pipeline, on the stand-in for CUDA and with DALI's CPU decoders."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from threading import Event

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from engine.bundle import bundle as bundles
from engine.core.errors import EngineError, ParityError
from engine.core.hardware import Gpu
from engine.core.settings import Settings
from engine.core.tuning import Tuning
from engine.manifest.manifest import open_manifest
from engine.pipeline import open_gpu
from engine.pipeline.open_gpu import check_canaries
from engine.pipeline.pipeline import screen_in_process
from engine.pipeline.stages import Stages
from engine.preprocess.gpu import DecodeOptions, GpuPreprocess
from engine.preprocess.stage import Preprocess
from engine.runners.base import RunnerChoice
from engine.runners.onnx import OnnxRunner
from engine.scoring.canaries import CANARY_LIMIT
from engine.scoring.gpu import GpuScorer
from engine.tune import search
from engine.tune import trials as tune_trials
from tests.helpers.bundles import write_bundle
from tests.helpers.images import encode, smooth, write_images
from tests.helpers.runs import read_frame
from tests.helpers.stand_in import Member, StandIn

pytestmark = pytest.mark.usefixtures("launched_fusion")


def stages_on(cuda: StandIn, kind: type[Member] = Member, *, graphs: bool = True) -> type[Stages]:
    class StandInStages(Stages):
        def open(self, stack: ExitStack) -> None:
            context = self.context
            batch_size = context.batch_size
            models = context.bundle
            members = [kind(OnnxRunner(member, models), cuda) for member in models.members]
            self.step = GpuScorer(
                models, members, batch_size=batch_size, device="cpu", graphs=graphs, cuda=cuda
            )
            check_canaries(models, self.step)
            cpu = Preprocess(size=models.size, batch_size=8, threads=2, decoding_bytes=1 << 28)
            stack.enter_context(cpu)
            self.preprocess = stack.enter_context(
                GpuPreprocess(
                    cpu,
                    size=models.size,
                    batch_size=batch_size,
                    threads=2,
                    device_id=None,
                    decoding=DecodeOptions(cpu_share=0.3),
                )
            )

    return StandInStages


def test_the_rows_are_those_of_the_cpu(tmp_path, bundle):
    archive = write_images(tmp_path / "archive", 45)
    (archive / "image-07-cut.jpg").write_bytes((archive / "image-07.jpg").read_bytes()[:400])
    (archive / "image-09-text.png").write_text("no image")
    settings = {"manifest": archive, "bundle": bundle, "batch_size": 8, "part_rows": 16}
    screen_in_process(Settings(output=tmp_path / "cpu", **settings))
    with StandIn(5) as cuda:
        summary = screen_in_process(
            Settings(output=tmp_path / "gpu", **settings), stages_type=stages_on(cuda)
        )
    assert (summary.rows, summary.errors) == (47, 2)
    expected, actual = read_frame(tmp_path / "cpu"), read_frame(tmp_path / "gpu")
    exact = ["row", "path", "status", "error", "width", "height", "prediction"]
    pd.testing.assert_frame_equal(actual[exact], expected[exact])
    scores = [name for name in expected if "p_" in name] + ["confidence"]
    png = expected.path.str.endswith(".png")
    assert np.allclose(actual[png][scores], expected[png][scores], atol=1e-6, equal_nan=True)
    assert np.allclose(actual[scores], expected[scores], atol=0.02, equal_nan=True)  # two JPEG decoders


def test_a_fast_bundle_has_its_jpegs_decoded_by_the_cpu(tmp_path, monkeypatch):
    """Whatever DALI does: it would decode in full. What the run tunes here is what it does on a GPU."""

    class OnCpu(GpuPreprocess):
        def __init__(self, cpu, **options):
            super().__init__(cpu, **{**options, "device_id": None})

    monkeypatch.setattr(open_gpu, "GpuPreprocess", OnCpu)
    monkeypatch.setattr("engine.preprocess.gpu_tuning.TUNE_ROWS", 1)
    archive = tmp_path / "archive"
    archive.mkdir()
    for number in range(6):
        data = encode(Image.fromarray(smooth(310, 290, seed=number)), "JPEG")
        (archive / f"{number}.jpg").write_bytes(data)
    bundle = write_bundle(tmp_path / "fast", decode="fast")
    settings = {"manifest": archive, "bundle": bundle, "batch_size": 4, "part_rows": 6}
    screen_in_process(Settings(output=tmp_path / "cpu", **settings))
    with StandIn(5) as cuda:

        class Tuned(stages_on(cuda)):
            def open(self, stack: ExitStack) -> None:
                super().open(stack)
                choice = replace(self.context.choice, device="cuda:0")
                context = replace(self.context, choice=choice)
                self.preprocess, tuning = open_gpu._open_preprocess(stack, context, Tuning())
                self.settled = replace(self.settled, tuning=tuning)

        screen_in_process(Settings(output=tmp_path / "gpu", **settings), stages_type=Tuned)
    tuned = json.loads((tmp_path / "gpu" / "_run.json").read_text())["tuning"]
    assert tuned["decoding"]["cpu_share"] == 1
    assert "decoding_tried" not in tuned
    expected, actual = read_frame(tmp_path / "cpu"), read_frame(tmp_path / "gpu")
    scores = [name for name in expected if "p_" in name]
    assert np.allclose(actual[scores], expected[scores], atol=1e-6)


def test_tuning_measures_all_candidates_in_order(tmp_path, bundle, monkeypatch):
    archive = write_images(tmp_path / "archive", 12)
    gpu = Gpu(name="stand-in", uuid="GPU-0", capability="9.0", driver="580")
    choice = RunnerChoice(runner="torch", device="cuda:0", precision="fp32", reason="stand-in", gpu=gpu)
    monkeypatch.setattr(search, "select_for_settings", lambda settings, models: choice)
    settings = Settings(manifest=archive, bundle=bundle, slots=1)
    assert search.TunedOptions(cuda_graph=False) in search.candidates(choice, settings)
    manifest = open_manifest(archive, listing=tmp_path / "listing.parquet").only(())
    (tmp_path / "parts").mkdir()
    log = []
    with StandIn(3) as cuda:
        monkeypatch.setattr(tune_trials, "Stages", stages_on(cuda))
        with tune_trials.Trials(
            settings,
            bundles.load_bundle(bundle),
            choice,
            manifest,
            scratch=tmp_path / "parts",
            say=log.append,
            stop=Event(),
        ) as trials:
            for size in (4, 2):
                assert trials.measure(search.TunedOptions(batch_size=size), 0) > 0
    assert log[0].startswith("batch 4: ")
    assert trials.by_status.keys() == {"ok"}
    assert trials.by_status["ok"] >= 3 * (4 + 2)


def test_canaries_that_differ_stop_the_run_before_anything_is_scored(tmp_path, bundle):
    class Shifted(Member):
        def enqueue(self, pixels, logits, stream):
            super().enqueue(pixels, logits, stream)
            with self._cuda.stream(stream):
                self._cuda.launch(lambda: logits[:, 0].add_(0.1), reads=[], writes=[logits])

    models = bundles.load_bundle(bundle)
    with StandIn(1) as cuda:
        for kind, passes in ((Member, True), (Shifted, False)):
            members = [kind(OnnxRunner(member, models), cuda) for member in models.members]
            step = GpuScorer(models, members, batch_size=8, device="cpu", cuda=cuda)
            if passes:
                assert check_canaries(models, step) < 1e-6
                continue
            with pytest.raises(ParityError, match=f"allowed: {CANARY_LIMIT}"):
                check_canaries(models, step)


def test_running_out_of_memory_during_a_run_is_a_one_line_error(tmp_path, bundle):
    class Short(Member):
        def enqueue(self, pixels, logits, stream):
            if self.name in crowded:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            super().enqueue(pixels, logits, stream)

    crowded: set[str] = set()
    gpu = Gpu(name="NVIDIA H100", uuid="GPU-0", capability="9.0", driver="580")
    archive = write_images(tmp_path / "archive", 20)
    with StandIn(2) as cuda:
        stages = stages_on(cuda, Short, graphs=False)

        class Crowded(stages):
            def open(self, stack: ExitStack) -> None:
                super().open(stack)
                self.context = replace(self.context, choice=replace(self.context.choice, gpu=gpu))
                crowded.add("member1")

        settings = Settings(manifest=archive, bundle=bundle, output=tmp_path / "out", batch_size=8)
        with pytest.raises(EngineError, match="NVIDIA H100 ran out of memory; free some memory, then"):
            screen_in_process(settings, stages_type=Crowded)
