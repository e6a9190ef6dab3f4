"""SANA text to image in plain PyTorch: networks, solvers, prompt rules and checkpoints, without any host."""

from .checkpoint import load_autoencoder, load_transformer
from .config import VARIANTS
from .files import CheckpointError
from .pipeline import SamplingError, SanaPipeline, Settings
from .prompt import INSTRUCTION
from .schedule import flow_sigmas
from .solvers import flow_dpm_solver, flow_euler, scm_solver
from .text_checkpoint import load_text_encoder

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
