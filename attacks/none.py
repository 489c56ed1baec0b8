"""No attack: the clean data as they are."""

from benchmark.contract import Attack


class NoAttack(Attack):
    """Changes nothing.

    The row that says what a defense costs when nobody attacks, and the clean model that other rows are held against.

    Source: this project.
    Differs from the paper: none exists.
    """

    budget_unit = "none"
