"""The other frontend: a torch.export program to a serialized engine, by Torch-TensorRT's own converter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from build_engines.compiler import Compiled
from build_engines.options import Options
from engine.bundle import Bundle, Member
from engine.errors import EngineError, UsageError
from engine.installed import install_command

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def compile_module(bundle: Bundle, member: Member, options: Options) -> Compiled:
    """Export a member's module in its precision and convert it for the GPU here: it decides the types.

    One profile, up to the batch size. What ran in which precision, the engine inspector says afterwards.
    Raises UsageError where Torch-TensorRT is missing, EngineError where it fails.
    """
    try:
        import torch
        import torch_tensorrt
    except Exception as error:  # its libraries are loaded on import, and fail in many ways
        reason = " ".join(f"{error}".split())[:160]
        raise UsageError(
            f"Torch-TensorRT can't be imported ({reason}); install it with: " + install_command("gpu")
        ) from None
    shape = (1, *bundle.size)
    start = time.perf_counter()
    try:
        program = exported(bundle, member, options, "cuda")
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
    return Compiled(bytes(plan), (), "none", time.perf_counter() - start)


def exported(bundle: Bundle, member: Member, options: Options, device: str) -> ExportedProgram:
    """uint8 [N, 1, H, W] to float32 logits [N, C] in the precision asked for, N from 1 to the batch size.

    Not channels-last: pooling would restride by as_strided, which Torch-TensorRT can't convert for a dynamic
    N. TensorRT chooses layouts itself.
    """
    import torch

    from engine.network import in_precision

    dtype = torch.float16 if options.precision == "fp16" else torch.float32
    module = in_precision(member, bundle, dtype, torch.contiguous_format).to(device)
    example = torch.zeros((2, 1, *bundle.size), dtype=torch.uint8, device=device)
    batch = torch.export.Dim("N", min=1, max=options.batch_size)
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
