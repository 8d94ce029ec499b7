"""Effective rank: the number of directions that features use. Detects a collapse that the loss does not show.

Effective rank (Roy & Vetterli 2007; RankMe, Garrido et al. 2023): exp of the entropy of the normalised
singular values of the centred feature matrix. It is D for isotropic features and 1 for a line.
"""

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """exp(−Σ p·log p) with p the singular values divided by their sum."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    p = singular_values / total
    return float(torch.special.entr(p).sum().exp())


def rank_of_covariance(centred_DD: Tensor) -> float:
    """Returns the effective rank of centred rows X [n, D] from XᵀX, float64."""
    return effective_rank(torch.linalg.eigvalsh(centred_DD).clamp(min=0).sqrt())
