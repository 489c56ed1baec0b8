"""The options of attacks that look at a model of their own: which one it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from benchmark.contract import Attack
from benchmark.data.attack_lab import SURROGATE_SEED, SurrogateRequest
from benchmark.stages import file_sha256


class SurrogateOptions(Attack):
    """Base of the attacks that have access to a surrogate's features or gradients.

    Source: the options of the attacks that share them.
    """

    surrogate: str | None = Field(None, description="File of weights that is the surrogate; None trains plain CLIP on the clean pairs.")
    surrogate_model: str | None = Field(None, description="Architecture of the file, where it does not say it: an open_clip name, or a JSON file with a configuration.")
    surrogate_writer: Literal["auto", "open_clip", "cyclip"] = Field("auto", description="Who wrote the file, where it leaves that open; cyclip means quick GELU.")
    surrogate_hash: str | None = Field(None, description="Hash of the file; filled in, and refused if another is found.")
    surrogate_seed: int = Field(SURROGATE_SEED, ge=0, description="Seed of a surrogate trained here: any but the victim's.")

    @model_validator(mode="after")
    def _the_file_is_there(self) -> Self:
        if self.surrogate is None:
            if self.surrogate_hash is not None or self.surrogate_model is not None:
                raise ValueError("surrogate_model and surrogate_hash belong to a file; give it with surrogate")
            return self
        path = Path(self.surrogate)
        if not path.is_file():
            raise ValueError(f"no file of weights at {self.surrogate}")
        found = file_sha256(path)
        if self.surrogate_hash not in (None, found):
            raise ValueError(f"{self.surrogate} has the hash {found[:16]} and not {self.surrogate_hash[:16] if self.surrogate_hash else ''}; it holds other weights than before")
        self.surrogate_hash = found
        return self

    def surrogate_request(self) -> SurrogateRequest:
        """What these options ask the lab for."""
        checkpoint = None if self.surrogate is None else Path(self.surrogate)
        return SurrogateRequest(self.surrogate_seed, checkpoint, self.surrogate_model, self.surrogate_writer)
