"""A student too large for each process to hold all of it: FSDP2 (arXiv:2304.11277) in the place of sums of gradients.

Of each tensor a process holds some rows: of weights, of gradients and of what the optimizer keeps. A block's weights
are gathered while it computes, those outside of blocks from the first of them to the end of a pass.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from distill.backbone.model import Backbone, assemble, count_parameters
from distill.errors import BadInput
from distill.events import Event, Listener
from distill.training.distributed import World

BYTES = 16
"""Of a weight, its gradient and two moments, in float32."""
ROOM = 0.25
"""Share of a GPU's memory that all these may take before a student is sharded; activations take more than they do."""


def is_sharded(what: nn.Module | Tensor) -> bool:
    """By what only FSDP2 gives a module and a tensor: asking for its classes imports half of torch."""
    return hasattr(what, "reshard" if isinstance(what, nn.Module) else "device_mesh")


def place(model: Backbone, device: torch.device, world: World, how: str, half: bool, listen: Listener) -> None:
    """Bring a model to where it is trained, sharded or not, as `train.shard` says. All processes call this. Raises
    BadInput where torch is too old to write shards.

    half: blocks compute in bfloat16, so that is what is gathered of them.
    """
    if not _wanted(model, device, world, how):
        model.to(device)
        return
    if TorchVersion(torch.__version__) < "2.13":
        text = f"train.shard: writing shards needs torch 2.13 or newer, and this is {torch.__version__}"
        raise BadInput(f"{text}; update it, or train whole students by train.shard=never")
    listen(Event("train", "note", f"each of {world.size} processes holds a part of the student"))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh, exact = init_device_mesh(device.type, (world.size,)), MixedPrecisionPolicy()
    halves = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=halves if half else exact)
    fully_shard(model, mesh=mesh)  # what is left: embeddings, the last norm, the projection
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a batch's weights sum to 1 over all processes: gradients are summed
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _wanted(model: Backbone, device: torch.device, world: World, how: str) -> bool:
    if world.size == 1 or how != "auto" or device.type != "cuda":
        return world.size > 1 and how == "always"
    memory = torch.cuda.get_device_properties(device).total_memory
    return bool(world.share(torch.tensor(float(BYTES * count_parameters(model) > ROOM * memory), device=device)))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor what this process holds of one of that shape: all of it, unless that is sharded."""
    if not is_sharded(like):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    parameter = cast(Any, like)
    return distribute_tensor(tensor.to(like.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, which is gathered where it is sharded: all processes call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], device: torch.device | str, keep: bool = True) -> dict[str, Tensor]:
    """All of them in full, one by one; nothing where a process doesn't `keep` them. All processes call this."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        everything = full(tensor.detach())
        if keep:
            found[name] = everything.to(device)
    return found


def whole(model: Backbone, device: torch.device | str, keep: bool = True) -> Backbone:
    """A sharded model's weights in a model of their own, in float32; itself where it isn't sharded, or where a process
    doesn't `keep` them. All processes call this."""
    if not is_sharded(model):
        return model
    weights = gathered(dict(model.named_parameters()), device, keep)
    return assemble(model.config, weights).to(device) if keep else model


def rows_from(table: Tensor, start: int) -> Tensor:
    """The rows from `start` on of a matrix (R, D), themselves and not copies, as far as this process holds them."""
    if not is_sharded(table):
        return table.detach()[start:]
    numbers = cast(Any, part_of(torch.arange(len(table)), table)).to_local()
    return cast(Any, table.detach()).to_local()[int((numbers < start).sum()) :]


def settle(model: Backbone) -> None:
    """Let go of what a pass without gradients has gathered: weights may change before the next one."""
    if is_sharded(model):
        cast(Any, model).reshard()


def summing(model: Backbone, world: World, last: bool) -> AbstractContextManager[None]:
    """Within it a pass backward leaves gradients summed over all processes, if it is the step's last; FSDP2 sums those
    of each pass."""
    return world.summing(model.parameters()) if last and not is_sharded(model) else nullcontext()


def save(tensors: dict[str, Tensor], folder: Path | None = None) -> None:
    """Each process writes what it holds to a file of its own, in the folder that the first one names. All call this,
    and go on once all have written."""
    from torch.distributed import broadcast_object_list
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    place = [str(folder)]
    broadcast_object_list(place)
    state_dict_saver.save(tensors, storage_writer=HuggingFaceStorageWriter(place[0], save_distributed=True))


def load(folder: Path, like: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """What `save` wrote, whatever the number of processes then and now: of each tensor what this process holds of one
    such as `like` says by its name. These files are safetensors: torch's own format of sharded checkpoints has a pickle
    in it."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    found = {name: torch.empty_like(like(name)) for name in reader.read_metadata().state_dict_metadata}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read it, too
        state_dict_loader.load(found, storage_reader=reader)
    return found
