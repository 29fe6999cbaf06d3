"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kokanee.losses import answer_log_probs, dpo, gdpo, token_log_probs


def test_a_tokens_log_probability_is_its_logit_less_the_log_of_all():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]]))
    assert token_log_probs(logits, torch.tensor([2, 0])).exp().tolist() == pytest.approx([5 / 8, 3 / 8])
    assert token_log_probs(logits.bfloat16(), torch.tensor([2, 0])).dtype == torch.float32


def test_an_answers_log_probability_is_the_sum_of_its_tokens():
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    assert answer_log_probs(log_probs, torch.tensor([0, 2, 0, 2]), 3).tolist() == [-5.0, 0.0, -10.0]


def test_where_policy_and_reference_agree_the_loss_is_log_two():
    same = torch.tensor([[-30.0, -90.0], [-5.0, -4.0]])
    found = dpo(same, same)
    assert found.loss_P.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert found.margin == 0.0 and found.accuracy == 0.0


def test_dpo_of_two_pairs():
    """Rewards 0.5 x (2, -1) and 0.5 x (-1, 1): margins 1.5 and -1."""
    policy, reference = torch.tensor([[-8.0, -11.0], [-6.0, -4.0]]), torch.tensor([[-10.0, -10.0], [-5.0, -5.0]])
    found = dpo(policy, reference, beta=0.5)
    assert found.rewards_P2.tolist() == [[1.0, -0.5], [-0.5, 0.5]]
    assert found.loss_P.tolist() == pytest.approx([math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.0))])
    assert found.margin == pytest.approx(0.25) and found.accuracy == 0.5


def test_dpos_gradient_pushes_the_two_apart_as_far_as_they_are_wrong():
    policy = torch.tensor([[-8.0, -11.0]], requires_grad=True)
    dpo(policy, torch.tensor([[-10.0, -10.0]]), beta=0.5).loss_P.sum().backward()
    push = 0.5 / (1 + math.exp(1.5))
    assert policy.grad is not None and policy.grad.tolist()[0] == pytest.approx([-push, push])


def test_gdpo_adds_the_mean_cross_entropy_of_the_ground_truth():
    same = torch.tensor([[-3.0, -7.0]])
    truth = torch.tensor([-1.0, -2.0, -6.0])
    assert float(gdpo(dpo(same, same), truth, 0.1)) == pytest.approx(math.log(2) + 0.1 * 3.0)
    assert float(gdpo(dpo(same, same), truth, 0.0)) == pytest.approx(math.log(2))
