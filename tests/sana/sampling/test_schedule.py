"""Noise levels, against numbers of NVlabs' code and the schedulers of diffusers."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from sana.sampling.schedule import (
    PAPER_ANGLES,
    check_angles,
    flow_euler_sigmas,
    flow_sigmas,
    half_log_snr,
    partial_sigmas,
    scm_angles,
    shift_sigma,
)

STEPS = (1, 2, 4, 5, 8, 14, 20, 28, 50)
SHIFTS = (1.0, 3.0, 4.0, 6.0)


def falls_to_zero(values: Tensor) -> bool:
    return bool((values.diff() < 0).all()) and float(values[-1]) == 0.0


def test_flow_sigmas_are_those_of_nvlabs() -> None:
    # Printed by NVlabs/Sana diffusion/model/dpm_solver.py, get_time_steps("time_uniform_flow"), 4 steps, flow_shift 3
    expected = torch.tensor([0.99967, 0.89964, 0.74962, 0.49967, 0.0])
    torch.testing.assert_close(flow_sigmas(4, 3.0), expected, rtol=0, atol=5e-6)  # five digits were printed


@pytest.mark.parametrize("flow_shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_flow_sigmas_and_their_timesteps_are_those_of_diffusers(steps: int, flow_shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=flow_shift
    )
    scheduler.set_timesteps(steps)
    sigmas = flow_sigmas(steps, flow_shift)
    assert sigmas.dtype == torch.float32
    assert falls_to_zero(sigmas)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=2e-7)  # two float32 roundings
    assert (1000 * sigmas[:-1]).floor().tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("flow_shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler_sigmas_are_those_of_diffusers(steps: int, flow_shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    scheduler.set_timesteps(steps)
    sigmas = flow_euler_sigmas(steps, flow_shift)
    assert falls_to_zero(sigmas)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=2e-7)
    assert (1000 * sigmas[:-1]).floor().tolist() == scheduler.timesteps.floor().tolist()


def test_a_shift_of_one_changes_nothing() -> None:
    sigma = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shift_sigma(sigma, 1.0), sigma, rtol=0, atol=0)


def test_shifts_multiply() -> None:
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 2.0), 3.0), shift_sigma(sigma, 6.0))
    snr = half_log_snr(shift_sigma(sigma[1:-1], 3.0)) - half_log_snr(sigma[1:-1])
    torch.testing.assert_close(snr, torch.full_like(snr, -math.log(3.0)))


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_partial_sigmas_are_the_end_of_a_finer_grid(steps: int, strength: float) -> None:
    sigmas = partial_sigmas(steps, 3.0, strength)
    assert len(sigmas) == steps + 1
    assert falls_to_zero(sigmas)
    finer = flow_sigmas(int(steps / strength), 3.0)
    assert torch.equal(sigmas, finer[-steps - 1 :])
    start = float(shift_sigma(torch.tensor(0.999 * strength), 3.0))
    assert start - 1e-6 <= float(sigmas[0]) < float(shift_sigma(torch.tensor(2 * strength), 3.0))


def test_partial_sigmas_of_strength_one_are_the_whole_grid() -> None:
    assert torch.equal(partial_sigmas(20, 3.0, 1.0), flow_sigmas(20, 3.0))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_scm_angles_are_those_of_diffusers(steps: int) -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    torch.testing.assert_close(scm_angles(steps), scheduler.timesteps, rtol=0, atol=2e-7)
    assert falls_to_zero(scm_angles(steps))


def test_scm_angles_can_be_chosen() -> None:
    assert scm_angles(2, max_angle=1.56454, intermediate_angle=1.1).tolist() == pytest.approx([1.56454, 1.1, 0])
    assert scm_angles(2, intermediate_angle=None).tolist() == pytest.approx([1.5708, 0.7854, 0])
    assert check_angles([1.5, 1.0, 0.4, 0]).tolist() == pytest.approx([1.5, 1.0, 0.4, 0])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [1.5708, 0]), (2, [1.5683, 1.3, 0]), (4, [1.5683, 1.3, 1.1, 0.6, 0])],  # arXiv 2503.09641, table 7
)
def test_scm_angles_of_the_paper(steps: int, expected: list[float]) -> None:
    angles = scm_angles(steps, paper=True)
    assert angles.tolist() == pytest.approx(expected, abs=5e-6)
    assert torch.equal(angles, check_angles(PAPER_ANGLES[steps]))


@pytest.mark.parametrize("sigmas", [flow_sigmas, flow_euler_sigmas, partial_sigmas])
@pytest.mark.parametrize(
    ("steps", "flow_shift", "message"),
    [
        (0, 3.0, "steps is 0; at least 1 is needed"),
        (-1, 3.0, "steps is -1; at least 1 is needed"),
        (4, 0.0, "flow_shift is 0.0; it must be a positive number, such as 3.0"),
        (4, -2.0, "flow_shift is -2.0; it must be a positive number, such as 3.0"),
        (4, math.nan, "flow_shift is nan; it must be a positive number, such as 3.0"),
        (4, math.inf, "flow_shift is inf; it must be a positive number, such as 3.0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    sigmas: type[flow_sigmas], steps: int, flow_shift: float, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        sigmas(steps, flow_shift)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, math.nan])
def test_a_strength_outside_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"^strength is {strength}; it must be above 0 and at most 1$"):
        partial_sigmas(4, 3.0, strength)


def test_scm_angles_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="^steps is 0; at least 1 is needed$"):
        scm_angles(0)
    with pytest.raises(ValueError, match="^the paper gives angles for 1, 2, 4 steps, not 3$"):
        scm_angles(3, paper=True)
    message = "^intermediate_angle is 1.3; it must be above 0 and below max_angle, which is 1.2$"
    with pytest.raises(ValueError, match=message):
        scm_angles(2, max_angle=1.2)
    assert scm_angles(3, max_angle=1.2)[0] == pytest.approx(1.2)


@pytest.mark.parametrize(
    "angles",
    [[], [0.0], [1.5], [1.5, 1.0], [1.0, 1.5, 0.0], [1.5, 1.5, 0.0], [1.6, 0.0], [math.nan, 0.0], [1.5, math.nan, 0.0]],
)
def test_angles_must_fall_from_half_pi_to_zero(angles: list[float]) -> None:
    with pytest.raises(ValueError, match="; they must fall strictly, from at most 1.5708 to 0 radians$"):
        check_angles(angles)
