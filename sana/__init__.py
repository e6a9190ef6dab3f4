"""SANA text to image in plain PyTorch: networks, solvers, prompt rules and checkpoints, without any host."""

from . import interruption  # noqa: F401 - first: what follows takes seconds

# isort: split
from . import importing  # noqa: F401

# isort: split
from .checkpoints.autoencoder import load_autoencoder
from .checkpoints.files import CheckpointError
from .checkpoints.text_encoder import load_text_encoder
from .checkpoints.transformer import load_transformer
from .config import VARIANTS
from .pipeline import SanaPipeline
from .plan import Settings
from .sampling.schedule import flow_sigmas
from .sampling.solvers import SamplingError, flow_dpm_solver, flow_euler, scm_solver
from .text.prompt import INSTRUCTION

__all__ = [
    "INSTRUCTION",
    "VARIANTS",
    "CheckpointError",
    "SamplingError",
    "SanaPipeline",
    "Settings",
    "flow_dpm_solver",
    "flow_euler",
    "flow_sigmas",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
    "scm_solver",
]
