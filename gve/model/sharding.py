"""FSDP2 for a frozen base: the layers of the language model are split over the ranks, what trains is not.

The adapters and their AdamW moments are a hundredth of the base, so every rank keeps them whole, as under DDP: their
gradients are averaged in one all-reduce, GradCache and the checkpoints need to know nothing, and a checkpoint of one
strategy is resumed under the other. The vision tower and the token embeddings stay whole too: a rank whose rows have no
picture would skip the tower's gathers, and the others would wait for it for ever.

In training every forward of the language model is a collective, and GradCache gives all ranks as many. In eval mode
each rank holds the whole base (in bfloat16 7.5 GB of 3B, 15.5 GB of 7B), because evaluation, probing and mining give
the ranks unequal numbers of batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from gve.model.backbone import Backbone
from gve.model.clock import CLOCK


def shard(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Splits the decoder layers' frozen weights over a mesh of one dimension; a layer is whole while it runs."""
    text = backbone.model.language_model
    # The embeddings are looked up outside the language model's forward, where nothing would gather them.
    whole = {p for p in text.parameters() if p.requires_grad} | set(text.embed_tokens.parameters())
    backbone.shards = [fully_shard(part, mesh=mesh, ignored_params=whole) for part in (*text.layers, text)]


class ShardedBase(ModelParallelStrategy):
    """The strategy for a base that does not fit beside the activations (configs/trainer/fsdp2.yaml).

    Args:
        process_group_backend: nccl, gloo, or by the device when None.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        # Tensor parallelism is off. (Lightning's default makes ranks of one node read the same rows.)
        super().__init__("auto", 1, save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        for parameter in self._trained():
            dist.broadcast(parameter.data, 0)

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        """The mean of the gradients over the ranks, in one all-reduce."""
        super().post_backward(closure_loss)
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with CLOCK.phase("comm"):
            dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    # What trains is whole on every rank, so checkpoints are those of any other strategy.
    restore_checkpoint_after_setup = ParallelStrategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint

    def _trained(self) -> list[torch.nn.Parameter]:
        assert self.lightning_module is not None
        return [parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad]
