"""Filter by the similarity of image and caption."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._filter import Filter, top

OWN_SHARE = 0.1


class ClipScore(Filter):
    """Drops pairs whose image and caption are least similar under a CLIP model.

    A caption that names something else than its image shows should score low, as long as the model has not learned the poison
    itself: one trained on these rows to the end has. `suspicious=high` takes the most similar pairs instead.

    Source: Hessel et al., EMNLP 2021, arXiv 2104.08718; as a detector Huang et al., ICLR 2025, arXiv 2502.01385.
    Differs from the paper: the model is trained on the audited rows, where a published one would be downloaded.
    """

    paper = "Hessel et al. 2021, arXiv 2104.08718; Huang et al. 2025, arXiv 2502.01385"

    suspicious: Literal["low", "high"] = Field("low", description="Which similarities are suspicious.")

    def defend(self, lab: Lab) -> Model:
        image, text = lab.features(self.suspect(lab))
        cosine = (image.double() * text.double()).sum(dim=1)
        scores = -cosine if self.suspicious == "low" else cosine
        return self.without_the_most_suspicious(lab, "clipscore", scores, top(scores.numpy(), OWN_SHARE))
