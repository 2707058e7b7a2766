"""Compile a torch.export program into a serialized plan with Torch-TensorRT's converter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from build_engines.compiler import CompiledPlan
from build_engines.options import BuildOptions
from engine.bundle.bundle import Bundle, Member
from engine.core.errors import EngineError, UsageError
from engine.core.extras import install_command

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def compile_module(bundle: Bundle, member: Member, options: BuildOptions) -> CompiledPlan:
    """Export a member's module in its precision and convert it for this machine's GPU.

    The plan has one profile, up to the batch size. Torch-TensorRT chooses the types; the engine inspector
    reports them later. Raises UsageError if Torch-TensorRT is missing, EngineError if it fails.
    """
    try:
        import torch
        import torch_tensorrt
    except Exception as error:  # loading its libraries raises many types
        reason = " ".join(f"{error}".split())[:160]
        raise UsageError(
            f"Torch-TensorRT can't be imported ({reason}); install it with: " + install_command("gpu")
        ) from None
    shape = (1, *bundle.size)
    start = time.perf_counter()
    try:
        program = export_member(bundle, member, options, "cuda")
        plan = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=[
                torch_tensorrt.Input(
                    min_shape=(1, *shape),
                    opt_shape=(options.batch_size, *shape),
                    max_shape=(options.batch_size, *shape),
                    dtype=torch.uint8,
                )
            ],
            disable_tf32=True,
            hardware_compatible=options.hardware_compatible,
            version_compatible=options.version_compatible,
            workspace_size=options.workspace or 0,
            optimization_level=options.optimization_level,
            max_aux_streams=options.max_aux_streams,
        )
    except EngineError:
        raise
    except Exception as error:  # torch.export and the converters raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise EngineError(f"Torch-TensorRT can't convert {member.name}: {reason}") from None
    return CompiledPlan(bytes(plan), (), "none", time.perf_counter() - start)


def export_member(bundle: Bundle, member: Member, options: BuildOptions, device: str) -> ExportedProgram:
    """Export a member, uint8 [N, 1, H, W] to float32 logits [N, C], for N up to the batch size.

    The module is not channels-last: pooling would use as_strided, which Torch-TensorRT can't convert for a
    dynamic N. TensorRT chooses layouts itself.
    """
    import torch

    from engine.runners.network import load_for_inference

    dtype = torch.float16 if options.precision == "fp16" else torch.float32
    module = load_for_inference(member, bundle, dtype, torch.contiguous_format).to(device)
    example = torch.zeros((2, 1, *bundle.size), dtype=torch.uint8, device=device)
    batch = torch.export.Dim("N", min=1, max=options.batch_size)
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
