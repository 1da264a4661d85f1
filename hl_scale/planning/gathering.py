"""What of the parameters that ZeRO-3 cut over the ranks is whole on a rank at once, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import Tensor

from hl_scale.base import QuantizedLinear
from hl_scale.planning.jobs import Job
from hl_scale.planning.wire import most_gathered


class Gathering:
    """Whole parameters of the base and the hypernetwork on one rank.

    Args:
        job: what is trained.
        world_size: ranks.
        on_cpu: whether gloo gathers them, or NCCL.
        passes: of the whole training; nothing is fetched ahead or kept before the second.
    """

    def __init__(self, job: Job, world_size: int, on_cpu: bool, passes: int) -> None:
        self.job, self.world_size, self.passes = job, world_size, passes
        self.base, self.zero3 = job.base, job.config.zero3
        self.per_block = job.config.hypernetwork.generate_per_block
        self.packed = [layer.packed for layer in self.base.linears.values() if isinstance(layer, QuantizedLinear)]
        self.trained = list(job.hypernetwork.parameters())
        # gloo gathers into a buffer of its own first, NCCL in place.
        self.copies = 1 if world_size == 1 else 2 if on_cpu else 1

    @cached_property
    def embedding(self) -> int:
        return self._whole(self.base.model.get_input_embeddings().weight)

    @cached_property
    def output(self) -> int:
        return self._whole(self.base.output_head.weight)

    def _whole(self, weight: Tensor) -> int:
        return self.copies * num_bytes([weight]) if self.job.partitioned and self.world_size > 1 else 0

    @cached_property
    def heads(self) -> dict[str, int]:
        """The most of the hypernetwork that is gathered at once in either pass; a copy of it on the way."""
        if self.world_size == 1:
            return {"forward": 0, "backward": 0}
        largest = max(num_bytes([parameter]) for parameter in self.trained)
        most = most_gathered(self.job, self.world_size)
        return {part: size + (self.copies - 1) * largest for part, size in most.items()}

    @cached_property
    def largest_head(self) -> int:
        """The largest parameter of the hypernetwork."""
        return self.copies * max(num_bytes([p]) for p in self.trained) if self.world_size > 1 else 0

    @cached_property
    def layers(self) -> int:
        """Layers that are computed together, what is fetched ahead (from the second pass on), and what is reused."""
        if self.world_size == 1:
            return 0
        shared = [s for s in self.base.shared_inputs if all(isinstance(layer, QuantizedLinear) for layer in s.layers)]
        together = [num_bytes(layer.get_parameter("packed") for layer in one.layers) for one in shared]
        alone = [num_bytes([packed]) for packed in self.packed]
        if self.job.config.base.mlp_tile_tokens is not None:  # all tiles of an MLP share one gathering
            together += [
                num_bytes(layer.packed for layer in mlp.layers if isinstance(layer, QuantizedLinear))
                for mlp in self.base.tiled_mlps
            ]
        now = max([*together, *alone], default=0) if self.job.partitioned else 0
        ahead = self.zero3.prefetch_bucket_size if self.job.partitioned and self.passes > 1 else 0
        return self.copies * now + min(ahead, num_bytes(self.packed)) + self.reused

    @cached_property
    def reused(self) -> int:
        """Gathered weights that stay from forward to backward: the last of the forward pass, up to the distance."""
        if self.world_size == 1 or self.passes == 1:
            return 0
        left, total = self.zero3.maximum_reuse_distance, 0
        trained = [] if self.per_block else reversed(self.trained)  # heads that blocks call are counted with them
        for parameter in [*(reversed(self.packed) if self.job.partitioned else []), *trained]:
            if left < parameter.numel():
                break
            left -= parameter.numel()
            total += num_bytes([parameter])
        return total


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of their elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
