"""The networks as plain PyTorch modules, and how they run within a given memory."""
