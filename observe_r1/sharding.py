"""Weights that are spread over ranks: making them so, reading them one at a time, and calling in lockstep.

A sharded model gathers its weights while it runs, block by block, so every rank has to run the same blocks equally
often. FSDP2 (`DTensor` parameters) and ZeRO-3 (parameters with a `ds_id`) are told apart by their parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from observe_r1.answers import Gold
from observe_r1.experience import EncodedPrompt, Prompt, VisionInputs

Result = TypeVar("Result")

# ---- lockstep --------------------------------------------------------------------------------------------------------


def blank_prompt(config: Any, device: torch.device | None = None) -> EncodedPrompt:
    """The smallest prompt with an image: a rank without images runs the vision tower on it when the others run theirs.

    For models without a tower it has no image either.
    """
    tower = getattr(config, "vision_config", None)
    prompt = Prompt("blank", "blank", [], [], Gold("none"))
    if tower is None:
        nothing = torch.zeros(1, dtype=torch.long, device=device)
        return EncodedPrompt(prompt, nothing, nothing)
    side, channels = tower.spatial_merge_size, getattr(tower, "in_channels", 3)
    patch = channels * tower.temporal_patch_size * tower.patch_size**2
    image = VisionInputs(
        torch.zeros(side**2, patch, device=device), torch.tensor([[1, side, side]], dtype=torch.long, device=device)
    )
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    return EncodedPrompt(prompt, torch.tensor(ids, device=device), torch.tensor([0, 1, 0], device=device), image)


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_zero_parameter(tensor: Tensor) -> bool:
    """DeepSpeed ZeRO-3 keeps this parameter in parts."""
    return hasattr(tensor, "ds_id")


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """ZeRO-3 parameters are whole inside, on all ranks; any others are as they were."""
    if not any(map(is_zero_parameter, parameters)):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters))
    return context


def whole(tensor: Tensor) -> Tensor:
    """The full tensor where this is FSDP2's part of one, on the device that computes; all ranks have to ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Any = tensor.to(tensor.device_mesh.device_type)
    full: Tensor = part.full_tensor()
    return full


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole weight, also where this rank has a part of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together, over all ranks; all of them have to ask."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def reshard(module: nn.Module) -> None:
    """Frees what FSDP2 has gathered; its parameters are parts again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def kept_whole(module: nn.Module) -> Iterator[bool]:
    """Gathers an FSDP2 module at once and keeps it whole: calls inside need no other rank.

    Costs the memory of all its weights in the dtype it computes in. Yields False for modules that FSDP2 does not
    shard, for which nothing is done.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not isinstance(module, FSDPModule):
        yield False
        return
    module.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield True
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def in_place_of_forward(module: nn.Module, function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function as FSDP2 calls the module: its weights are whole inside, and again in the backward.

    Args:
        function: Reads the module's weights. Everything that needs a gradient has to come to it as an argument.
    """
    if not isinstance(module, FSDPModule):
        return function(*arguments)
    sharded: Any = module
    if not hasattr(sharded, "_call"):
        sharded._call = lambda function, *arguments: function(*arguments)
        register_fsdp_forward_method(sharded, "_call")
    result: Result = sharded._call(function, *arguments)
    return result


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def shard_like(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    full: nn.Module | None,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None = None,
    forward_methods: Sequence[str] = (),
) -> None:
    """Shards a module that has no memory yet, and fills it with the weights of rank 0's copy.

    No rank but rank 0 ever holds more than a block of full weights, and rank 0 has them on the CPU only.

    Args:
        module: On the meta device.
        blocks: Modules within it that are gathered apart from each other; what remains is gathered as one, and stays
            whole from the forward to the end of the backward.
        full: On rank 0 the same module with its weights, on the CPU; None on other ranks.
        mesh: Of one dimension, or of two: replicas, and ranks that share one.
        compute_dtype: To which gathered weights are cast. Weights, gradients and optimizer keep their own.
        forward_methods: Further methods of the module that run it.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    options: dict[str, Any] = {
        "mesh": mesh,
        # autocast decides on the inputs: rotary tables have to stay float32
        "mp_policy": MixedPrecisionPolicy(compute_dtype, torch.float32 if compute_dtype else None, None, False),
    }
    shared = _shared_parameters(module)
    for block in blocks:
        block.to_empty(device=device)
        fully_shard(block, **options)
    inside = {part for block in blocks for part in block.modules()}
    for part in module.modules():
        if part not in inside:
            part.to_empty(device=device, recurse=False)
    _share(module, shared)
    fully_shard(module, **options)
    for method in forward_methods:
        register_fsdp_forward_method(module, method)
    _fill(module, full, device)


def _fill(module: nn.Module, full: nn.Module | None, device: torch.device) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state: Mapping[str, Any] = {} if full is None else full.state_dict()
    set_model_state_dict(
        module, dict(state), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    sources = {} if full is None else dict(full.named_buffers())
    for name, buffer in module.named_buffers():  # rotary frequencies and the like are in no state dict
        if name in sources:
            buffer.copy_(sources[name])
        dist.broadcast(buffer, 0)


def _shared_parameters(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _share(module: nn.Module, groups: list[list[str]]) -> None:
    for first, *others in groups:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
