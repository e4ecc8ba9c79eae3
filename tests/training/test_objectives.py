"""Objectives against diffusers, torch.distributions and float64."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from tintype.training.objectives import (
    NoiseSchedule,
    contrastive_loss,
    kl_to_standard_normal,
    learned_variance_loss,
    noisy_and_flow,
    noisy_and_velocity,
)


@pytest.fixture(scope="module")
def ddpm():
    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )


def test_the_noise_schedule_is_stable_diffusions(ddpm):
    torch.testing.assert_close(
        NoiseSchedule().alphas_cumprod(), ddpm.alphas_cumprod.double(), rtol=1e-4, atol=0
    )


def test_noisy_latents_and_velocity_equal_diffusers(ddpm):
    x0, noise = torch.randn(5, 4, 6, 6), torch.randn(5, 4, 6, 6)
    times = torch.tensor([0, 1, 400, 998, 999])
    noisy, velocity = noisy_and_velocity(x0, noise, ddpm.alphas_cumprod[times].double())
    torch.testing.assert_close(noisy, ddpm.add_noise(x0, noise, times))
    torch.testing.assert_close(velocity, ddpm.get_velocity(x0, noise, times))


@pytest.mark.parametrize("wanted", [-1.0, 0.3, 1.0])
def test_the_loss_of_a_learned_variance_is_the_divergence_of_two_steps_back(wanted):
    """q and p as Ho et al. 2020 (equations 6 and 7) and Nichol and Dhariwal 2021 (equation 15) write them."""
    shares = NoiseSchedule().alphas_cumprod()
    now = shares[torch.tensor([0, 1, 400, 999])]
    then = torch.stack([torch.ones(()).double(), *shares[torch.tensor([0, 310, 998])]])
    x0, clean, noisy = (torch.randn(4, 3, 2, 2).double() for _ in range(3))
    before, after = (each[1:].view(-1, 1, 1, 1) for each in (now, then))
    beta = 1 - before / after
    least = beta * (1 - after) / (1 - before)

    def mean(x):
        kept = (before / after).sqrt() * (1 - after) / (1 - before) * noisy[1:]
        return after.sqrt() * beta / (1 - before) * x[1:] + kept

    share = (wanted + 1) / 2
    variance = beta**share * least ** (1 - share)
    step = torch.distributions.Normal
    parts = torch.distributions.kl_divergence(
        step(mean(x0), least.sqrt()), step(mean(clean), variance.sqrt())
    )
    expected = parts.sum() / x0.numel() / np.log(2)  # what ends in a picture counts as nothing
    found = learned_variance_loss((x0, clean, torch.full_like(x0, wanted)), now, then)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_contrastive_loss_is_the_papers_symmetric_cross_entropy():
    images, texts = torch.randn(6, 8).double(), torch.randn(6, 8).double()
    log_scale = torch.tensor(1.3, dtype=torch.float64)
    a, b = (np.array(t / t.norm(dim=1, keepdim=True)) for t in (images, texts))
    similarity = np.exp(1.3) * a @ b.T
    rows, columns = (np.log(np.exp(similarity).sum(axis=axis)) for axis in (1, 0))
    expected = (
        (rows - similarity.diagonal()).mean() + (columns - similarity.diagonal()).mean()
    ) / 2
    assert float(contrastive_loss(images, texts, log_scale)) == pytest.approx(expected, rel=1e-12)


def test_kl_equals_torch_distributions():
    mean, log_variance = torch.randn(3, 4), torch.randn(3, 4)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(
        posterior, torch.distributions.Normal(0.0, 1.0)
    ).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)
    assert np.isclose(float(kl_to_standard_normal(torch.zeros(2), torch.zeros(2))), 0.0)


def test_a_straight_path_runs_from_the_picture_to_noise_at_constant_velocity():
    x0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    begin, velocity = noisy_and_flow(x0, noise, torch.zeros(3, dtype=torch.float64))
    end, same = noisy_and_flow(x0, noise, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(begin, x0)
    torch.testing.assert_close(end, noise)
    torch.testing.assert_close(begin + velocity, end)
    assert torch.equal(velocity, same)
