"""How far counts may be from shares, proven on paper for the nested divisions (order.split_draws).

With k sets by falling share, the error that reaches set i is at most P_i·Σ 1/Q_j over the rests Q_j before it, and
Q_j ≥ (i − j)·P_i: so N_i is less than 1 under its share and less than H(k−1) = 1 + 1/2 + … + 1/(k−1) over it. A batch
is the difference of two such counts.
"""

from fractions import Fraction

ROUNDED = Fraction(1, 10**6)  # weights become integers of 40 bits


def _harmonic(n: int) -> Fraction:
    return sum((Fraction(1, i) for i in range(1, n + 1)), Fraction(0))


def in_total(sets: int) -> Fraction:
    """The most that a count of draws so far is from its share."""
    return max(Fraction(1), _harmonic(sets - 1))


def in_a_batch(sets: int) -> Fraction:
    """The same of one batch."""
    return 1 + _harmonic(sets - 1)
