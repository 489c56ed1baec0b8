"""A token embedding that trains the rows in use and leaves the others as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ActiveEmbedding(nn.Module):
    """The embedding of tokens that occur in the training texts, as a parameter of its own.

    A vocabulary of 49,408 tokens costs the optimizer more than the whole text tower of a small model, and all but a few
    hundred rows never get a gradient. Looked-up rows train exactly as in `nn.Embedding`; rows that no training text holds
    keep their initial values, where decoupled decay would have shrunk them.
    """

    weight: Tensor
    position: Tensor

    def __init__(self, full: nn.Embedding, tokens: Tensor) -> None:
        """`tokens` are all ids that training may look up; the full embedding is taken over, not copied."""
        super().__init__()
        self.register_buffer("weight", full.weight.detach())
        used = torch.unique(tokens)
        position = torch.full((full.num_embeddings,), -1, dtype=torch.int64, device=full.weight.device)
        position[used] = torch.arange(len(used), device=position.device)
        self.register_buffer("position", position, persistent=False)
        self.register_buffer("used", used, persistent=False)
        self.active = nn.Parameter(self.weight[used].clone(), requires_grad=full.weight.requires_grad)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, L) to (b, L, d); a token outside the training texts is looked up without gradient."""
        position = self.position[tokens]
        known = functional.embedding(position.clamp(min=0), self.active)
        return torch.where((position >= 0).unsqueeze(-1), known, functional.embedding(tokens, self.weight))

    def whole(self) -> Tensor:
        """The weight (vocabulary, d) of the plain embedding that this stands for."""
        full = self.weight.clone()
        full[self.get_buffer("used")] = self.active.detach()
        return full
