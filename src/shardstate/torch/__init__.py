"""PyTorch: save a module rank by rank, load a rank into a module, or load its tensors."""

from shardstate.torch.aliases import filter_subtensors
from shardstate.torch.arrays import load
from shardstate.torch.loading import load_model
from shardstate.torch.saving import save_model

__all__ = ["filter_subtensors", "load", "load_model", "save_model"]
