"""Plain CLIP: no defense."""

from benchmark.contract import Defense


class Clip(Defense):
    """Trains on every pair with the CLIP loss.

    The row that every defense is compared with; `clip+aug` is the one for defenses that end in `+aug`.

    Source: Radford et al., ICML 2021, arXiv 2103.00020.
    Differs from the paper: nothing known beside the scale.
    """

    paper = "Radford et al. 2021, arXiv 2103.00020"
