"""Two bounds: what selection could reach that knows every weight before it is computed."""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from .rule import Head, Rule


class RowRule(Rule):
    """Each row's heaviest keys. A kernel could not do so: it computes every weight first, and visits single pairs."""

    tile = 1

    @abstractmethod
    def kept(self, ranked: torch.Tensor, values: Sequence[float], num_tokens: int) -> torch.Tensor:
        """How many keys each row visits at each value, [rows, values].

        Args:
            ranked: [rows, keys], weights in descending order, up to a factor for each row; invisible keys are 0.
            num_tokens: length of the prompt.
        """

    def select(self, head: Head, value: float) -> torch.Tensor:
        tokens = len(head.key)
        invisible = torch.ones(tokens, tokens, dtype=torch.bool, device=head.key.device).triu(1)
        weights = (head.query @ head.key.T * head.scale).masked_fill(invisible, -torch.inf).softmax(-1)
        ranked, places = weights.sort(dim=-1, descending=True)
        taken = torch.arange(tokens, device=places.device) < self.kept(ranked, [value], tokens)
        return torch.zeros_like(taken).scatter(-1, places, taken)


class TopK(RowRule):
    """The same number of keys for every row, `value` times the prompt's length (Gupta et al., arXiv 2106.06899)."""

    values = (0.3, 0.2, 0.15, 0.1, 0.075, 0.05, 0.03, 0.01)

    def kept(self, ranked: torch.Tensor, values: Sequence[float], num_tokens: int) -> torch.Tensor:
        most = torch.tensor([max(1, round(value * num_tokens)) for value in values], device=ranked.device)
        return (ranked > 0).sum(-1, keepdim=True).minimum(most)


class TopP(RowRule):
    """The fewest keys that hold a share of each row's mass (as in Twilight, arXiv 2502.02770)."""

    values = (0.9999, 0.9995, 0.998, 0.995, 0.98, 0.95, 0.9, 0.8)

    def kept(self, ranked: torch.Tensor, values: Sequence[float], num_tokens: int) -> torch.Tensor:
        sums = ranked.cumsum(-1, dtype=torch.float64)  # of thousands of weights, and the last ones matter
        enough = sums[:, -1:] * torch.tensor(values, dtype=torch.float64, device=sums.device)
        return torch.searchsorted(sums, enough) + 1
