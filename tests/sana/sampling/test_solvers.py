"""Solvers against the schedulers of diffusers, and against the exact solution for Gaussian data."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from sana.sampling.schedule import angle_sigmas, check_angles, flow_euler_sigmas, flow_sigmas, scm_angles
from sana.sampling.solvers import (
    SCM_DEVIATION,
    SOLVERS,
    Denoiser,
    Solver,
    flow_dpm_solver,
    flow_dpm_steps,
    flow_euler,
    scm_solver,
    scm_start,
    scm_steps,
)

DATA_DEVIATION = 0.5
SHIFTS = (1.0, 3.0, 4.0, 6.0)
STEPS = (4, 8, 14, 20, 50)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def velocity(x: Tensor, timestep: float) -> Tensor:
    """A nonlinear toy network."""
    return torch.sin(3 * x + timestep / 300) + x * math.cos(timestep / 500)


def toy_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    return x - sigma * velocity(x, float((1000 * sigma).floor()))


def gaussian_denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The perfect denoiser of data that is normal with DATA_DEVIATION."""
    variance = DATA_DEVIATION**2
    return x * variance * (1 - sigma) / ((1 - sigma) ** 2 * variance + sigma**2)


def gaussian_solution(x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Where the flow of that denoiser takes x: its deviation is that of (1 - sigma) * data + sigma * noise."""
    start, end = (math.hypot((1 - level) * DATA_DEVIATION, level) for level in (sigma, sigma_next))
    return x * (end / start)


@pytest.mark.parametrize("flow_shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_flow_dpm_solver_is_that_of_diffusers(steps: int, flow_shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=flow_shift
    )
    scheduler.set_timesteps(steps)
    expected = noise()
    for timestep in scheduler.timesteps:
        expected = scheduler.step(velocity(expected, float(timestep)), timestep, expected, return_dict=False)[0]
    found = flow_dpm_solver(toy_denoise, noise(), flow_sigmas(steps, flow_shift))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32, amplified by the nonlinear velocity


@pytest.mark.parametrize("flow_shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_flow_euler_is_that_of_diffusers(steps: int, flow_shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    scheduler.set_timesteps(steps)
    expected = noise()
    for timestep in scheduler.timesteps:
        v = velocity(expected, float(timestep.floor()))
        expected = scheduler.step(v, timestep, expected, return_dict=False)[0]
    found = flow_euler(toy_denoise, noise(), flow_euler_sigmas(steps, flow_shift))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


ANGLES = pytest.mark.parametrize(
    "angles",
    [
        scm_angles(1),
        scm_angles(2),
        scm_angles(4),
        scm_angles(1, paper=True),
        scm_angles(2, paper=True),
        scm_angles(4, paper=True),
        check_angles([1.5, 1.2, 0.9, 0.0]),
    ],
    ids=lambda angles: "-".join(f"{angle:.2f}" for angle in angles),
)


@ANGLES
def test_scm_solver_is_that_of_diffusers(angles: Tensor) -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(len(angles) - 1, timesteps=angles, max_timesteps=None, intermediate_timesteps=None)
    generator = torch.Generator().manual_seed(3)
    x = noise() * SCM_DEVIATION
    for angle in scheduler.timesteps[:-1]:
        out = velocity(x, 1000 * float(angle))
        x, denoised = scheduler.step(out, angle, x, generator=generator, return_dict=False)

    own = torch.Generator().manual_seed(3)
    start = noise() * SCM_DEVIATION
    found = scm_solver(toy_sprint_denoise, start, angles, noise=lambda like: torch.randn(like.shape, generator=own))
    torch.testing.assert_close(found, denoised, rtol=0, atol=2e-6)
    assert torch.equal(own.get_state(), generator.get_state())  # noise is drawn in the last step as well


def toy_sprint_denoise(x: Tensor, angle: Tensor) -> Tensor:
    """A denoiser as Sprint has it: at an angle, for x with a standard deviation of 0.5."""
    return math.cos(angle) * x - math.sin(angle) * velocity(x, 1000 * float(angle))


def drawn_noise(seed: int = 3) -> Callable[[Tensor], Tensor]:
    """Fresh noise for each step, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64)


@ANGLES
def test_the_flow_form_of_sprint_is_its_form_in_angles(angles: Tensor) -> None:
    """arXiv 2503.09641, algorithm 2, written out: x = cos * denoised + sin * fresh noise, all times 0.5."""
    x = start = noise().double() * SCM_DEVIATION
    fresh, seen = drawn_noise(), []
    for angle, angle_next in pairwise(angles):
        denoised = toy_sprint_denoise(x, angle)
        seen.append((angle, x, denoised))
        x = math.cos(angle_next) * denoised + math.sin(angle_next) * SCM_DEVIATION * fresh(x)

    asked: list[tuple[Tensor, Tensor]] = []
    reported: list[tuple[int, Tensor, Tensor]] = []

    def denoise(x: Tensor, angle: Tensor) -> Tensor:
        asked.append((angle, x))
        return toy_sprint_denoise(x, angle)

    exact = {"rtol": 0, "atol": 1e-12}
    found = scm_solver(denoise, start, angles, lambda *step: reported.append(step), noise=drawn_noise())
    torch.testing.assert_close(found, x, **exact)
    assert [index for index, _, _ in reported] == list(range(len(angles) - 1))
    for (angle, before, denoised), (own_angle, own_x), (_, shown_x, shown) in zip(seen, asked, reported, strict=True):
        assert torch.equal(own_angle, angle)  # to the last bit, of the angles as they were given
        torch.testing.assert_close([own_x, shown_x, shown], [before, before, denoised], **exact)


def test_sprint_starts_from_the_same_noise_at_every_angle() -> None:
    """In its own scale, which is 0.5 * (sin + cos) times that of a flow."""
    for angle in (1.5708, 1.3, 0.4):
        sigma = float(angle_sigmas(torch.tensor(angle, dtype=torch.float64)))
        own = scm_start(noise().double(), sigma) * SCM_DEVIATION * (math.sin(angle) + math.cos(angle))
        torch.testing.assert_close(own, SCM_DEVIATION * noise().double(), rtol=0, atol=1e-12)


def test_a_step_of_sprint_is_the_denoised_latent_at_the_next_level() -> None:
    sigmas = torch.tensor([0.9, 0.6, 0.0], dtype=torch.float64)
    clean, fresh = noise(1).double(), noise(2).double()
    steps = list(scm_steps(lambda x, sigma: clean, noise().double(), sigmas, lambda like: fresh))
    assert [step.index for step in steps] == [0, 1]
    torch.testing.assert_close(steps[0].next_x, 0.4 * clean + 0.6 * fresh)
    assert torch.equal(steps[1].x, steps[0].next_x) and torch.equal(steps[1].next_x, clean)


def errors(solver: Callable[[Denoiser, Tensor, Tensor], Tensor]) -> list[float]:
    """Largest errors for Gaussian data between noise levels 0.9 and 0.1, in float64, each with twice the steps."""
    x = noise().double()
    expected = gaussian_solution(x, 0.9, 0.1)
    grids = (torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64) for steps in (20, 40, 80, 160))
    return [float((solver(gaussian_denoise, x, grid) - expected).abs().max()) for grid in grids]


@pytest.mark.parametrize(("solver", "order"), [(flow_dpm_solver, 2), (flow_euler, 1)])
def test_error_falls_with_the_order_of_the_solver(
    solver: Callable[[Denoiser, Tensor, Tensor], Tensor], order: int
) -> None:
    measured = [math.log2(error / finer) for error, finer in pairwise(errors(solver))]
    assert measured == pytest.approx([order] * 3, abs=0.1)


@pytest.mark.parametrize("solver", [flow_dpm_solver, flow_euler])
def test_gaussian_noise_becomes_gaussian_data(solver: Callable[[Denoiser, Tensor, Tensor], Tensor]) -> None:
    sigmas = flow_sigmas(400, 3.0)
    expected = gaussian_solution(noise(), float(sigmas[0]), 0.0)
    found = solver(gaussian_denoise, noise(), sigmas)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)  # 400 steps; the last one is of first order


@pytest.mark.parametrize("solver", [flow_dpm_solver, flow_euler])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_schedule_from_pure_noise_stays_finite(
    solver: Callable[[Denoiser, Tensor, Tensor], Tensor], steps: int
) -> None:
    found = solver(gaussian_denoise, noise(), torch.linspace(1, 0, steps + 1))
    assert torch.isfinite(found).all()
    assert found.abs().max() < 3


@pytest.mark.parametrize(
    ("before", "after"),
    [([1.0], [1.0, 0.5, 0.0]), ([1.0, 1.0], [1.0, 0.7, 0.4, 0.0]), ([0.9, 0.7, 0.5], [0.5, 0.4, 0.3, 0.2, 0.0])],
)
def test_flow_dpm_begins_anew_after_a_level_that_repeats(before: list[float], after: list[float]) -> None:
    """There it leaves x as it is. KSampler repeats levels where it is asked for more steps than there are levels."""
    x = flow_dpm_solver(toy_denoise, noise(), torch.tensor(before))
    expected = flow_dpm_solver(toy_denoise, x, torch.tensor(after))
    found = flow_dpm_solver(toy_denoise, noise(), torch.tensor(before + after))
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-6
    )  # the same numbers, but for how a machine takes logarithms


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_steps_connect_and_end_at_what_was_denoised_last(solver: Solver) -> None:
    steps = list(solver.steps(toy_denoise, noise(), solver.sigmas(5, 3.0)))
    assert [step.index for step in steps] == list(range(5))
    assert torch.equal(steps[0].x, noise())
    assert all(torch.equal(step.next_x, following.x) for step, following in pairwise(steps))
    assert torch.equal(steps[-1].next_x, steps[-1].denoised)


@pytest.mark.parametrize("solver", [flow_dpm_solver, flow_euler])
def test_on_step_sees_every_step_and_x_is_left_alone(solver: Callable[..., Tensor]) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []
    x = noise()
    sigmas = flow_sigmas(4, 3.0)
    latent = solver(toy_denoise, x, sigmas, lambda *step: seen.append(step))
    assert torch.equal(x, noise())
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    for (_, before, denoised), sigma in zip(seen, sigmas, strict=False):
        assert torch.equal(denoised, toy_denoise(before, sigma))
    assert torch.equal(latent, seen[-1][2])


def test_scm_solver_draws_its_own_noise_unless_given() -> None:
    torch.manual_seed(0)
    found = scm_solver(gaussian_denoise, noise(), scm_angles(4))
    torch.manual_seed(0)
    assert torch.equal(found, scm_solver(gaussian_denoise, noise(), scm_angles(4), noise=torch.randn_like))


def test_a_caller_may_stop_early() -> None:
    evaluations: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        evaluations.append(float(sigma))
        return toy_denoise(x, sigma)

    for step in flow_dpm_steps(denoise, noise(), flow_sigmas(20, 3.0)):
        if step.index == 2:
            break
    assert len(evaluations) == 3
