"""The result: attributions of tokens, and what attention says of the same ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError
from saliency_fast.tokens import show
from saliency_fast.tokens.words import Word

ATTENTION = ("attention", "rollout", "gradient_attention")


@dataclass(frozen=True, eq=False, repr=False)
class TokenAttribution:
    """Attributions of texts' tokens, beside attention to the same tokens.

    tokens: of each text, without padding. real, special: bool [B, T]. values [B, T]: attributions,
    which add up to the score's gain where the method is complete. attention, rollout,
    gradient_attention [B, T]: of one layer, through all layers (Abnar, 2020), and weighed by its
    gradient, without the identity (Chefer, 2021); None for a `reason`. All are zero at padding,
    and those of a word are the sums of its tokens'. pieces: of each text, its words. attribution:
    the whole result, of embeddings [B, T, E].
    """

    tokens: tuple[tuple[str, ...], ...]
    pieces: tuple[tuple[Word, ...], ...]
    real: Tensor
    special: Tensor
    values: Tensor
    attention: Tensor | None
    rollout: Tensor | None
    gradient_attention: Tensor | None
    reason: str | None
    attribution: Attribution

    @property
    def columns(self) -> dict[str, Tensor]:
        """What there is of each token, by name."""
        found = {"attribution": self.values}
        for name in ATTENTION:
            if (column := getattr(self, name)) is not None:
                found[name] = column
        return found

    @property
    def correlation(self) -> dict[str, Tensor]:
        """How well each kind of attention ranks tokens as |attribution| does: [B] by name.

        Spearman's rank correlation over the tokens that are not special; NaN under three of them,
        and where all are alike.
        """
        columns = self.columns
        size, content = columns.pop("attribution").abs(), self.real & ~self.special
        return {
            name: torch.stack(
                [_spearman(size[n][own], column[n][own]) for n, own in enumerate(content)]
            )
            for name, column in columns.items()
        }

    def words(self) -> TokenAttribution:
        """The same of whole words: sums over their tokens."""
        widest = max(map(len, self.pieces))
        start = self.real.int().argmax(1).tolist()
        member = self.values.new_zeros(len(self.pieces), widest, self.values.shape[1])
        for number, words in enumerate(self.pieces):
            for place, word in enumerate(words):
                for token, share in word.tokens:
                    member[number, place, start[number] + token] = share

        def summed(column: Tensor | None) -> Tensor | None:
            if column is None:
                return None
            return (member.to(column.dtype) @ column[..., None])[..., 0]

        counts = torch.tensor([len(words) for words in self.pieces], device=self.real.device)
        values = summed(self.values)
        assert values is not None
        return replace(
            self,
            tokens=tuple(tuple(word.text for word in words) for words in self.pieces),
            pieces=tuple(
                tuple(Word(word.text, (place,)) for place, word in enumerate(words))
                for words in self.pieces
            ),
            real=torch.arange(widest, device=counts.device) < counts[:, None],
            special=(member @ self.special.to(member.dtype)[..., None])[..., 0] > 0,
            values=values,
            attention=summed(self.attention),
            rollout=summed(self.rollout),
            gradient_attention=summed(self.gradient_attention),
        )

    def rows(self, text: int = 0) -> list[tuple[str, bool, dict[str, float]]]:
        """(token, whether special, its number in each column) of one text."""
        if not -len(self.tokens) <= text < len(self.tokens):
            raise InputError(f"text out of range: got {text}, there are {len(self.tokens)}")
        own = self.real[text]
        columns = {name: one[text][own].tolist() for name, one in self.columns.items()}
        special = self.special[text][own].tolist()
        return [
            (token, special[place], {name: one[place] for name, one in columns.items()})
            for place, token in enumerate(self.tokens[text])
        ]

    def table(self, text: int = 0) -> str:
        """One text's tokens with their numbers, as plain text."""
        shown = show.table(self.rows(text), self._facts(text), self._ranks(text))
        return shown if self.reason is None else f"{shown}\nno attention: {self.reason}"

    def html(self) -> str:
        """All texts as a fragment of HTML: a line per column of shaded tokens."""
        several = range(len(self.tokens))
        return show.html([(self.rows(n), self._facts(n), self._ranks(n)) for n in several])

    def _repr_html_(self) -> str:
        return self.html()

    def __str__(self) -> str:
        """The tables of all texts."""
        return "\n\n".join(self.table(number) for number in range(len(self.tokens)))

    def __repr__(self) -> str:
        """One line."""
        lengths = ", ".join(str(len(one)) for one in self.tokens[:5])
        more = ", ..." if len(self.tokens) > 5 else ""
        return f"<TokenAttribution {self.attribution.provenance.method}; tokens: {lengths}{more}>"

    def _facts(self, text: int) -> str:
        found = self.attribution
        facts = [found.provenance.method, f"score {float(found.scores[text]):.4g}"]
        if found.baseline_scores is not None:
            facts.append(f"baseline {float(found.baseline_scores[text]):.4g}")
        if found.delta is not None:
            facts.append(f"delta {float(found.delta[text]):.2g}")
        return "; ".join(facts)

    def _ranks(self, text: int) -> dict[str, float]:
        return {name: float(one[text]) for name, one in self.correlation.items()}


def _spearman(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of ranks, equal values sharing theirs."""
    if len(x) < 3:
        return x.new_full((), torch.nan, dtype=torch.float64)
    a, b = (_ranked(one) for one in (x, y))
    a, b = a - a.mean(), b - b.mean()
    # 0 / 0, where all are alike, is NaN.
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def _ranked(x: Tensor) -> Tensor:
    less = (x[None] < x[:, None]).double().sum(1)
    same = (x[None] == x[:, None]).double().sum(1)
    return less + (same - 1) / 2
