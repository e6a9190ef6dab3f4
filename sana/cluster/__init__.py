"""Many pictures on many devices, by Ray."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needing_packages() -> Iterator[None]:
    """Around imports of this room. Raises ValueError where a package of its extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pyarrow"):
            raise
        advice = 'run pip install ".[cluster]" in the folder of this project'
        raise ValueError(f"--workers needs the package {error.name}; {advice}") from error
