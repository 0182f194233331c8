"""The divergences agree with their formulas, survive zero mass, and have the gradients the literature says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opd_bench.errors import UserError
from opd_bench.losses import (
    DIVERGENCES,
    Loss,
    Tokens,
    cross_entropy,
    divergence,
    entropy,
    forward_kl,
    group_normalised,
    jsd,
    kl,
    mixture,
    policy_gradient,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

T = (0.7, 0.2, 0.1)
S = (0.5, 0.3, 0.2)

GOLDEN: list[tuple[Loss, float]] = [
    (forward_kl, 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2)),
    (forward_kl, 0.085123),
    (reverse_kl, 0.092033),
    (jsd(0.1), 0.0076947),
    (jsd(0.5), 0.0219012),
    (jsd(0.9), 0.0081848),
    (skew_forward_kl(0.1), 0.0695780),
    (skew_reverse_kl(0.1), 0.0728275),
    (total_variation, 0.2),
    (cross_entropy, -math.log(0.3)),
]
EVERY = pytest.mark.parametrize("name", sorted(DIVERGENCES))


def tokens(teacher_NV: Tensor | None, ids_N: Tensor | None = None, weight_N: Tensor | None = None, n: int = 1) -> Tokens:
    n = n if teacher_NV is None else len(teacher_NV)
    ids_N = torch.ones(n, dtype=torch.long) if ids_N is None else ids_N
    return Tokens(ids_N, teacher_NV, torch.ones(n) if weight_N is None else weight_N)


def random_pair(n: int = 7, v: int = 11) -> tuple[Tensor, Tensor]:
    """Teacher log-probabilities and student logits that ask for a gradient."""
    generator = torch.Generator().manual_seed(0)
    teacher_NV = torch.randn(n, v, generator=generator).mul(2).log_softmax(-1)
    return teacher_NV, torch.randn(n, v, generator=generator).mul(2).requires_grad_()


def gradient(loss_N: Tensor, logits_NV: Tensor) -> Tensor:
    return torch.autograd.grad(loss_N.sum(), logits_NV)[0]


@pytest.mark.parametrize(("loss", "expected"), GOLDEN)
def test_golden_value(loss: Loss, expected: float) -> None:
    value_N = loss(torch.tensor([S]).log(), tokens(torch.tensor([T]).log()))
    assert value_N.shape == (1,)
    assert value_N.item() == pytest.approx(expected, abs=6e-7)


def test_mixture_share_belongs_to_the_first_distribution() -> None:
    m_NV = mixture(torch.tensor([T]).log(), torch.tensor([S]).log(), 0.1)
    torch.testing.assert_close(m_NV.exp(), torch.tensor([[0.52, 0.29, 0.19]]))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mixture_gives_no_mass_to_what_both_exclude(share: float) -> None:
    m_NV = mixture(torch.tensor([[0.7, 0.3, 0.0]]).log(), torch.tensor([[0.5, 0.5, 0.0]]).log(), share)
    torch.testing.assert_close(m_NV.exp(), torch.tensor([[0.5 + 0.2 * share, 0.5 - 0.2 * share, 0.0]]))


def test_jsd_is_symmetric_only_at_one_half_and_mirrored_elsewhere() -> None:
    t, s = torch.tensor([T]).log(), torch.tensor([S]).log()
    assert jsd(0.5)(s, tokens(t)).item() == pytest.approx(jsd(0.5)(t, tokens(s)).item(), abs=1e-7)
    assert jsd(0.1)(s, tokens(t)).item() == pytest.approx(jsd(0.9)(t, tokens(s)).item(), abs=1e-7)
    assert jsd(0.1)(s, tokens(t)).item() != pytest.approx(jsd(0.9)(s, tokens(t)).item(), abs=1e-4)


@pytest.mark.parametrize(("beta", "scale", "limit"), [(1e-4, 1e-4, forward_kl), (1 - 1e-4, 1e-4, reverse_kl)])
def test_rescaled_jsd_tends_to_the_kls(beta: float, scale: float, limit: Loss) -> None:
    t, s = torch.tensor([T], dtype=torch.float64).log(), torch.tensor([S], dtype=torch.float64).log()
    m = mixture(t, s, beta)
    value = (beta * kl(t, m) + (1 - beta) * kl(s, m)) / scale
    assert value.item() == pytest.approx(limit(s, tokens(t)).item(), rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_is_zero_without_gradient_at_its_ends(beta: float) -> None:
    teacher_NV, logits_NV = random_pair()
    teacher_NV[:, 0] = -math.inf
    loss_N = jsd(beta)(logits_NV, tokens(teacher_NV))
    torch.testing.assert_close(loss_N, torch.zeros(7), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradient(loss_N, logits_NV), torch.zeros(7, 11), atol=1e-7, rtol=0)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_mixture_weight_outside_the_unit_interval_is_refused(share: float) -> None:
    teacher_NV, logits_NV = random_pair()
    for loss in (jsd(share), skew_forward_kl(share), skew_reverse_kl(share)):
        with pytest.raises(UserError, match="between 0 and 1"):
            loss(logits_NV, tokens(teacher_NV))


def test_skew_without_share_is_the_plain_kl() -> None:
    teacher_NV, logits_NV = random_pair()
    batch = tokens(teacher_NV)
    torch.testing.assert_close(skew_forward_kl(0)(logits_NV, batch), forward_kl(logits_NV, batch))
    torch.testing.assert_close(skew_reverse_kl(0)(logits_NV, batch), reverse_kl(logits_NV, batch))


def test_forward_kl_gradient_is_student_minus_teacher() -> None:
    teacher_NV, logits_NV = random_pair()
    expected = logits_NV.softmax(-1) - teacher_NV.exp()
    torch.testing.assert_close(gradient(forward_kl(logits_NV, tokens(teacher_NV)), logits_NV), expected, atol=1e-6, rtol=0)


def test_reverse_kl_gradient_is_the_mass_times_the_centred_log_ratio() -> None:
    teacher_NV, logits_NV = random_pair()
    t_NV, s_NV = teacher_NV.double(), logits_NV.detach().double().log_softmax(-1)
    ratio_NV = s_NV - t_NV
    expected = s_NV.exp() * (ratio_NV - (s_NV.exp() * ratio_NV).sum(-1, keepdim=True))
    got = gradient(reverse_kl(logits_NV, tokens(teacher_NV)), logits_NV)
    torch.testing.assert_close(got, expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_gradients_beneath_match_finite_differences_in_float64(share: float) -> None:
    teacher_NV, logits_NV = random_pair(n=2, v=5)
    t_NV, logits_NV = teacher_NV.double().log_softmax(-1), logits_NV.detach().double().requires_grad_()

    def both(x_NV: Tensor) -> Tensor:
        s_NV = x_NV.log_softmax(-1)
        return torch.stack([kl(s_NV, mixture(t_NV, s_NV, share)), kl(t_NV, mixture(t_NV, s_NV, share)), entropy(s_NV)])

    assert torch.autograd.gradcheck(both, logits_NV)


@EVERY
def test_equal_models_have_no_loss_and_no_gradient(name: str) -> None:
    _, logits_NV = random_pair()
    loss_N = divergence(name)(logits_NV, tokens(logits_NV.detach().log_softmax(-1)))
    torch.testing.assert_close(loss_N, torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(loss_N, logits_NV), torch.zeros(7, 11), atol=1e-6, rtol=0)


@EVERY
def test_divergence_is_positive_between_different_models(name: str) -> None:
    teacher_NV, logits_NV = random_pair()
    assert (divergence(name)(logits_NV, tokens(teacher_NV)) > 1e-3).all()


@EVERY
def test_token_impossible_in_both_models_changes_nothing(name: str) -> None:
    teacher_NV, logits_NV = random_pair()
    nowhere = torch.full((7, 2), -math.inf)
    wide_NV = torch.cat([logits_NV.detach(), nowhere], -1).requires_grad_()
    wide_N = divergence(name)(wide_NV, tokens(torch.cat([teacher_NV, nowhere], -1)))
    narrow_N = divergence(name)(logits_NV, tokens(teacher_NV))
    torch.testing.assert_close(wide_N, narrow_N)
    expected = torch.cat([gradient(narrow_N, logits_NV), torch.zeros(7, 2)], -1)
    torch.testing.assert_close(gradient(wide_N, wide_NV), expected, atol=1e-6, rtol=0)


@EVERY
def test_mass_below_float32_is_no_nan(name: str) -> None:
    logits_NV = torch.tensor([[0.0, 1.0, -300.0]], requires_grad=True)
    loss_N = divergence(name)(logits_NV, tokens(torch.tensor([[0.5, 0.5, 0.0]]).log()))
    assert loss_N.isfinite().all()
    assert gradient(loss_N, logits_NV).isfinite().all()


def test_kl_is_infinite_where_only_the_first_has_mass() -> None:
    everywhere, nowhere = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert kl(everywhere, nowhere).item() == math.inf
    assert kl(nowhere, everywhere).item() == pytest.approx(math.log(2))


def test_entropy_of_uniform_and_certain() -> None:
    torch.testing.assert_close(entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]).log()), torch.tensor([math.log(4), 0.0]))


LOSSES: list[Loss] = [*DIVERGENCES.values(), cross_entropy, policy_gradient]


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_sum_to_the_whole(loss: Loss) -> None:
    teacher_NV, logits_NV = random_pair()
    ids_N, weight_N = torch.arange(7), torch.linspace(-1, 1, 7)
    whole_N = loss(logits_NV, tokens(teacher_NV, ids_N, weight_N))
    cuts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    parts_N = torch.cat([loss(logits_NV[cut], tokens(teacher_NV[cut], ids_N[cut], weight_N[cut])) for cut in cuts])
    torch.testing.assert_close(parts_N, whole_N)
    torch.testing.assert_close(gradient(parts_N, logits_NV), gradient(whole_N, logits_NV))


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_logits_are_computed_in_float32(loss: Loss) -> None:
    teacher_NV, logits_NV = random_pair()
    low_NV = logits_NV.detach().bfloat16()
    loss_N = loss(low_NV, tokens(teacher_NV))
    assert loss_N.dtype == torch.float32
    torch.testing.assert_close(loss_N, loss(low_NV.float(), tokens(teacher_NV)))


def test_policy_gradient_raises_rewarded_and_lowers_punished_tokens() -> None:
    _, logits_NV = random_pair(n=3)
    ids_N, weight_N = torch.tensor([4, 4, 4]), torch.tensor([2.0, -1.0, 0.0])
    step_NV = -gradient(policy_gradient(logits_NV, tokens(None, ids_N, weight_N, n=3)), logits_NV)
    expected = weight_N[:, None] * (torch.nn.functional.one_hot(ids_N, 11) - logits_NV.softmax(-1))
    torch.testing.assert_close(step_NV, expected, atol=1e-6, rtol=0)
    assert step_NV[0, 4] > 0 > step_NV[1, 4]


def test_unit_weight_makes_policy_gradient_cross_entropy() -> None:
    _, logits_NV = random_pair()
    batch = tokens(None, n=7)
    torch.testing.assert_close(policy_gradient(logits_NV, batch), cross_entropy(logits_NV, batch))


@EVERY
def test_divergence_without_teacher_says_what_to_do(name: str) -> None:
    with pytest.raises(UserError, match=r"bench\.teacher"):
        divergence(name)(torch.zeros(1, 3), tokens(None))


def test_unknown_divergence_suggests_a_known_one() -> None:
    with pytest.raises(UserError, match="did you mean 'reverse_kl'"):
        divergence("revers_kl")


def test_advantages_are_centred_and_scaled_within_their_group():
    verdict_B = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.2, 0.2, 0.2, 0.2])
    advantage_GK = group_normalised(verdict_B, 4).view(2, 4)
    torch.testing.assert_close(advantage_GK.mean(1), torch.zeros(2), rtol=0, atol=1e-6)
    assert advantage_GK[0].std() == pytest.approx(1, abs=0.01)
    assert advantage_GK[0].argsort().tolist() == [1, 2, 3, 0]
    assert advantage_GK[1].tolist() == [0, 0, 0, 0]


def test_advantages_know_no_unit_but_the_one_that_tells_equal_verdicts_apart():
    verdict_B = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.8, 0.2, 0.2, 0.2], dtype=torch.float64)
    torch.testing.assert_close(group_normalised(1e6 * verdict_B + 3, 4), group_normalised(1e6 * verdict_B, 4))
    torch.testing.assert_close(group_normalised(verdict_B, 4)[4:], group_normalised(verdict_B[4:], 4), rtol=0, atol=0)
