"""Solvers of the sampling equation: from noise to a clean latent, by asking a denoiser at a falling series of noise levels.

A solver is a function of a denoiser. It knows no network, draws no progress and remembers nothing between calls.
Arithmetic is in the dtype of x, which should be float32.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import angle_sigmas, flow_euler_sigmas, flow_sigmas, half_log_snr

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, H, W), sigma ()) -> denoised (B, C, H, W)
OnStep = Callable[[int, Tensor, Tensor], None]  # (step, x before it, denoised)
Noise = Callable[[Tensor], Tensor]  # a latent -> fresh standard normal noise of its shape

SCM_DEVIATION = 0.5  # sigma_d: standard deviation of data and noise in Sprint's flow, arXiv 2503.09641


class SamplingError(RuntimeError):
    """Sampling went wrong. The message names the likely cause."""


class Step(NamedTuple):
    """What a solver yields after each step."""

    index: int
    x: Tensor  # at the step's first noise level
    denoised: Tensor
    next_x: Tensor  # at its last


def flow_dpm_steps(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`flow_dpm_solver`, step by step."""
    previous, lengths = None, half_log_snr(sigmas).diff()
    for i in range(len(sigmas) - 1):
        denoised = estimate = denoise(x, sigmas[i])
        share = math.inf if previous is None else float(lengths[i] / (2 * lengths[i - 1]))
        if math.isfinite(share):
            estimate = denoised + (denoised - previous) * share
        next_x = torch.lerp(estimate, x, float(sigmas[i + 1] / sigmas[i]))
        yield Step(i, x, denoised, next_x)
        x, previous = next_x, denoised


def flow_euler_steps(denoise: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """`flow_euler`, step by step."""
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        next_x = torch.lerp(denoised, x, float(sigmas[i + 1] / sigmas[i]))
        yield Step(i, x, denoised, next_x)
        x = next_x


def scm_steps(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
    """`scm_solver` in the scale of a flow, step by step: each goes to the denoised latent and puts fresh noise on it.

    x: (B, C, H, W) at sigmas[0]; `scm_start` makes it of noise alone. sigmas: (steps + 1,), falling to 0; those of
    Sprint's angles are `schedule.angle_sigmas`.
    """
    for i in range(len(sigmas) - 1):
        denoised = denoise(x, sigmas[i])
        next_x = torch.lerp(denoised, noise(x), float(sigmas[i + 1]))
        yield Step(i, x, denoised, next_x)
        x = next_x


def scm_start(noise: Tensor, sigma: float) -> Tensor:
    """What Sprint samples from without an image: standard normal noise (B, C, H, W), in the scale of a flow at sigma.

    In Sprint's own scale it is the same at every angle.
    """
    return noise * (SCM_DEVIATION / _scm_factor(sigma))


def flow_dpm_solver(denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Flow-DPM-Solver: DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with alpha = 1 - sigma.

    x: (B, C, H, W) at sigmas[0]; sigmas: (steps + 1,), falling. on_step sees each step as it ends. Returns x at sigmas[-1].
    The first step is of first order, and so is one that ends at 0 or follows one from 1, where half_log_snr is infinite, or
    one between equal levels, which leaves x as it is.
    """
    return _last(flow_dpm_steps(denoise, x, sigmas), x, on_step)


def flow_euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Euler steps along the velocity (arXiv 2403.03206, section 2). Arguments as for `flow_dpm_solver`."""
    return _last(flow_euler_steps(denoise, x, sigmas), x, on_step)


def scm_solver(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    angles: Tensor,
    on_step: OnStep | None = None,
    *,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """Multi-step sampling of a continuous-time consistency model, for Sprint (arXiv 2503.09641, algorithm 2).

    denoise: (x, angle () in radians) -> denoised. x: (B, C, H, W), 0.5 times standard normal noise; angles:
    (steps + 1,), falling to 0; noise: called once a step, at the last one too, as the references do. Returns the clean
    latent, still times 0.5, which is also the scale of what denoise and on_step see.
    """

    def flow_denoise(flow_x: Tensor, sigma: Tensor) -> Tensor:
        angle = torch.atan2(sigma, 1 - sigma).to(angles)
        return denoise(flow_x * _scm_factor(float(sigma)), angle) / SCM_DEVIATION

    sigmas = angle_sigmas(angles.double())
    for step in scm_steps(flow_denoise, x / _scm_factor(float(sigmas[0])), sigmas, noise):
        if on_step is not None:
            on_step(step.index, step.x * _scm_factor(float(sigmas[step.index])), step.denoised * SCM_DEVIATION)
        x = step.next_x * _scm_factor(float(sigmas[step.index + 1]))
    return x


def _scm_factor(sigma: float) -> float:
    """Sprint's x as a multiple of the flow's, 0.5 * (sin + cos), where sigma is sin / (sin + cos) of an angle."""
    return SCM_DEVIATION / math.hypot(sigma, 1 - sigma)


class Solver(NamedTuple):
    """A solver for schedules of flows, with the noise levels that it was made for."""

    steps: Callable[[Denoiser, Tensor, Tensor], Iterator[Step]]  # (denoise, x, sigmas)
    sigmas: Callable[[int, float], Tensor]  # (steps, flow_shift) -> (steps + 1,), from noise to 0


# By the name in `Settings` and in the shell.
SOLVERS = {
    "flow_dpm": Solver(flow_dpm_steps, flow_sigmas),
    "flow_euler": Solver(flow_euler_steps, flow_euler_sigmas),
}


def _last(steps: Iterator[Step], x: Tensor, on_step: OnStep | None) -> Tensor:
    for step in steps:
        if on_step is not None:
            on_step(step.index, step.x, step.denoised)
        x = step.next_x
    return x
