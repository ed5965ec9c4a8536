"""Which heads a rank has under tensor parallelism, where the projections of queries are cut over ranks."""

from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

TENSOR_PARALLEL_AXIS = "tp"
"""transformers' name for the axis of a device mesh over which heads are cut."""


def local_heads(layer: Any, num_heads: int) -> slice | None:
    """The heads of this rank, or None if it has all of them.

    Args:
        layer: a decoder layer, before its forward: FSDP may still have its weights in shards of its own.
        num_heads: those of the whole model.
    """
    projection = layer.self_attn.q_proj
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, DTensor):
        return None
    mesh = weight.device_mesh
    is_fsdp = any(isinstance(module, FSDPModule) for module in (layer, layer.self_attn, projection))
    if is_fsdp or mesh.ndim > 1:
        if TENSOR_PARALLEL_AXIS not in (mesh.mesh_dim_names or ()):
            return None
        mesh = mesh[TENSOR_PARALLEL_AXIS]
    count = num_heads // mesh.size()
    return slice(mesh.get_local_rank() * count, (mesh.get_local_rank() + 1) * count)
