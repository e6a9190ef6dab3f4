"""Noise levels to visit. sigma is the share of noise in [0, 1]: x = (1 - sigma) * clean + sigma * noise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOW_DPM_START = 0.999  # NVlabs/Sana diffusion/model/dpm_solver.py: the grid of betas runs from 1 to 0.001
MAX_ANGLE = 1.57080  # NVlabs/Sana app/sana_sprint_pipeline.py, max_timesteps
TWO_STEP_ANGLE = 1.3  # the same file, intermediate_timesteps
# Best angles found by search, arXiv 2503.09641 table 7 (for one step: pi / 2).
PAPER_ANGLES: dict[int, tuple[float, ...]] = {
    1: (math.pi / 2, 0.0),
    2: (math.atan(200 / 0.5), 1.3, 0.0),
    4: (math.atan(200 / 0.5), 1.3, 1.1, 0.6, 0.0),
}


def shift_sigma(sigma: Tensor, flow_shift: float) -> Tensor:
    """Move noise levels towards noise, for larger images (arXiv 2403.03206, equation 23). flow_shift 1: unchanged."""
    return flow_shift * sigma / (1 + (flow_shift - 1) * sigma)


def flow_sigmas(steps: int, flow_shift: float) -> Tensor:
    """The grid of Flow-DPM-Solver: (steps + 1,) float32, falling from just under 1 to exactly 0.

    NVlabs/Sana diffusion/model/dpm_solver.py, skip type time_uniform_flow. Raises ValueError unless steps >= 1 and
    flow_shift > 0.
    """
    _check(steps, flow_shift)
    return shift_sigma(torch.linspace(FLOW_DPM_START, 0.0, steps + 1, dtype=torch.float64), flow_shift).float()


def flow_euler_sigmas(steps: int, flow_shift: float) -> Tensor:
    """The grid of Flow-Euler: (steps + 1,) float32 from 1 to 0, as diffusers' FlowMatchEulerDiscreteScheduler makes it.

    The last level before 0 is shifted twice, as there and in NVlabs/Sana diffusion/scheduler/flow_euler_sampler.py.
    Raises ValueError as `flow_sigmas` does.
    """
    _check(steps, flow_shift)
    lowest = float(shift_sigma(torch.tensor(0.001, dtype=torch.float64), flow_shift))
    grid = torch.linspace(1.0, lowest, steps, dtype=torch.float64)
    return torch.cat([shift_sigma(grid, flow_shift), torch.zeros(1, dtype=torch.float64)]).float()


def scm_angles(
    steps: int, *, max_angle: float = MAX_ANGLE, intermediate_angle: float | None = TWO_STEP_ANGLE, paper: bool = False
) -> Tensor:
    """Angles of Sprint's trigonometric flow, (steps + 1,) float32 falling to 0 radians; see `angle_sigmas`.

    intermediate_angle: the middle of a two-step schedule; None, or any other number of steps: evenly spaced.
    paper: the angles of the paper's table 7 instead, for 1, 2 or 4 steps. Raises ValueError for other steps with `paper`,
    for steps < 1, for an angle outside (0, pi / 2], and for an intermediate_angle that is not below max_angle.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if paper:
        if steps not in PAPER_ANGLES:
            raise ValueError(f"the paper gives angles for {', '.join(map(str, PAPER_ANGLES))} steps, not {steps}")
        return torch.tensor(PAPER_ANGLES[steps])
    if steps == 2 and intermediate_angle is not None:
        if not 0 < intermediate_angle < max_angle:
            raise ValueError(
                f"intermediate_angle is {intermediate_angle}; it must be above 0 and below max_angle, which is {max_angle}"
            )
        return check_angles([max_angle, intermediate_angle, 0.0])
    return check_angles(torch.linspace(max_angle, 0.0, steps + 1, dtype=torch.float64).tolist())


def check_angles(angles: Sequence[float]) -> Tensor:
    """An explicit list of angles as a tensor. Raises ValueError unless it falls strictly from at most pi / 2 to 0."""
    falling = all(a > b for a, b in zip(angles[:-1], angles[1:], strict=True))
    if len(angles) < 2 or not falling or angles[0] > math.pi / 2 + 1e-4 or angles[-1] != 0:
        raise ValueError(f"angles are {list(angles)}; they must fall strictly, from at most 1.5708 to 0 radians")
    return torch.tensor(angles, dtype=torch.float32)


def angle_sigmas(angles: Tensor) -> Tensor:
    """The noise level of each angle of Sprint's flow, sin / (sin + cos), in the dtype of the angles.

    There x / 0.5 / (sin + cos) is the x of a flow, and clean latents / 0.5 are those of the flow (arXiv 2503.09641,
    section 3.1). MAX_ANGLE, which is a little above pi / 2, gives a little more than 1.
    """
    return angles.sin() / (angles.sin() + angles.cos())


def partial_sigmas(steps: int, flow_shift: float, strength: float = 1.0) -> Tensor:
    """`steps` steps over the last `strength` of `flow_sigmas`, for starting from an image: (steps + 1,) float32.

    Strength 1 is the whole schedule. The finer grid is cut as the host's KSampler cuts it for `denoise`: its length is
    int(steps / strength). Raises ValueError for a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
    return flow_sigmas(int(steps / strength), flow_shift)[-(steps + 1) :]


def half_log_snr(sigma: Tensor) -> Tensor:
    """lambda = log((1 - sigma) / sigma)."""
    return torch.log1p(-sigma) - torch.log(sigma)


def _check(steps: int, flow_shift: float) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if not 0 < flow_shift < math.inf:
        raise ValueError(f"flow_shift is {flow_shift}; it must be a positive number, such as 3.0")
