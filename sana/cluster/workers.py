"""How many workers there are, and what each has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workers:
    """How many, and what each has. cluster: address of a Ray cluster; None: this machine alone."""

    count: int
    cluster: str | None = None
    devices: float = 0  # GPUs of each; 0: it computes on its share of the cores

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be."""
        if self.count < 1:
            raise ValueError(f"--workers is {self.count}; at least 1 is needed")
        if not 0 <= self.devices < 1e6 or (self.devices > 1 and self.devices != int(self.devices)):
            raise ValueError(
                f"--devices-per-worker is {self.devices:g}; it must be 0 for none, a share such as 0.5, or a whole number"
            )
