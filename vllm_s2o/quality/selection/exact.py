"""Two bounds: what selection could reach that knows every weight before it is computed."""

from abc import abstractmethod

import torch

from .rule import Head, Rule


class RowRule(Rule):
    """Each row's heaviest keys. A kernel could not do so: it computes every weight first, and visits single pairs."""

    tile = 1

    @abstractmethod
    def kept(self, ranked: torch.Tensor, value: float, num_tokens: int) -> torch.Tensor:
        """How many keys each row visits, [rows].

        Args:
            ranked: [rows, keys], weights in descending order, up to a factor for each row; invisible keys are 0.
            num_tokens: length of the prompt.
        """

    def select(self, head: Head, value: float) -> torch.Tensor:
        tokens = len(head.key)
        invisible = torch.ones(tokens, tokens, dtype=torch.bool, device=head.key.device).triu(1)
        weights = (head.query @ head.key.T * head.scale).masked_fill(invisible, -torch.inf).softmax(-1)
        ranked, places = weights.sort(dim=-1, descending=True)
        taken = torch.arange(tokens, device=places.device) < self.kept(ranked, value, tokens)[:, None]
        return torch.zeros_like(taken).scatter(-1, places, taken)


class TopK(RowRule):
    """The same number of keys for every row, `value` times the prompt's length (Gupta et al., arXiv 2106.06899)."""

    values = (0.5, 0.3, 0.2, 0.15, 0.1, 0.075, 0.05, 0.03, 0.02, 0.01)

    def kept(self, ranked: torch.Tensor, value: float, num_tokens: int) -> torch.Tensor:
        return (ranked > 0).sum(-1).clamp(max=max(1, round(value * num_tokens)))


class TopP(RowRule):
    """The fewest keys that hold a share of each row's mass (as in Twilight, arXiv 2502.02770)."""

    values = (0.99999, 0.9999, 0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8, 0.6)

    def kept(self, ranked: torch.Tensor, value: float, num_tokens: int) -> torch.Tensor:
        ranked = ranked.double()  # sums of thousands of weights decide about the last of them
        sums = ranked.cumsum(-1)
        return (sums - ranked < value * sums[:, -1:]).sum(-1)
