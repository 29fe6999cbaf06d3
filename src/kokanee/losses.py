"""Losses on log-probabilities: DPO, gDPO and cross-entropy, as pure functions.

Equation of arXiv 2506.15220, section on mrDPO:

    L_gDPO = -log sigmoid(beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x)) - lambda log pi(y_gt|x)

with beta = 0.1 and lambda (here `gt_weight`) = 0.1 as published. The log-probability of an answer is the sum over its
label tokens, the end token and the newline after it included; the ground truth's is their mean (as published).

Axes: N label tokens of a batch, A answers, P preference pairs, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Preference:
    """DPO of P pairs. loss_P; rewards_P2: beta x (policy - reference) of chosen and rejected, without gradient."""

    loss_P: torch.Tensor
    rewards_P2: torch.Tensor

    @property
    def margin(self) -> float:
        """The mean by which the chosen's reward is above the rejected's."""
        return float((self.rewards_P2[:, 0] - self.rewards_P2[:, 1]).mean())

    @property
    def accuracy(self) -> float:
        """The share of pairs whose chosen has the higher reward."""
        return float((self.rewards_P2[:, 0] > self.rewards_P2[:, 1]).float().mean())


def token_log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The log-probability of each target, (N,) in float32 whatever the logits are in."""
    return -functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def answer_log_probs(log_probs_N: torch.Tensor, answers_N: torch.Tensor, n_answers: int) -> torch.Tensor:
    """The sum of each answer's token log-probabilities, (A,); `answers_N` says which answer a token belongs to."""
    return log_probs_N.new_zeros(n_answers).index_add(0, answers_N, log_probs_N)


def dpo(policy_P2: torch.Tensor, reference_P2: torch.Tensor, beta: float = 0.1) -> Preference:
    """Direct preference optimisation of answers' log-probabilities; columns are chosen and rejected."""
    rewards_P2 = beta * (policy_P2 - reference_P2)
    loss_P = -functional.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1])
    return Preference(loss_P, rewards_P2.detach())


def gdpo(preference: Preference, gt_log_probs_N: torch.Tensor, gt_weight: float = 0.1) -> torch.Tensor:
    """The mean DPO loss of the pairs + `gt_weight` x the mean cross-entropy of the ground truth's tokens; a scalar."""
    return preference.loss_P.mean() - gt_weight * gt_log_probs_N.mean()
