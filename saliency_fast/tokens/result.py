"""The result of `explain_tokens`: columns of numbers per token, as tables and HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saliency_fast.attribution import Attribution
from saliency_fast.errors import InputError
from saliency_fast.render.pages import render
from saliency_fast.tokens.words import Word

TITLES = {
    "attribution": "attribution",
    "attention": "attention",
    "rollout": "rollout",
    "gradient_attention": "grad. attention",
}
AGREEMENT = "rank correlation with |attribution|"
NOTE = "Attention says where the model looked, attribution what its answer rests on."
_WARM, _COOL = "214, 69, 45", "45, 108, 214"
_OPACITY = 0.75
"""The opacity of the strongest shade."""
_LEAST_TOKENS = 3
"""A rank correlation of fewer tokens is undefined."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenAttribution:
    """Attributions of the tokens of B texts, beside attention to the same tokens.

    All columns are [B, T] and zero at padding.

    Attributes:
        tokens: The tokens of each text, without padding.
        pieces: The words of each text with the indices of their tokens.
        real: Which tokens are no padding, bool [B, T].
        special: Which tokens the tokenizer has added, bool [B, T].
        values: The attributions, which add up to the gain of the score for complete methods.
        attention: The attention weights of one layer; None where `reason` says why.
        rollout: The attention of all layers multiplied (Abnar and Zuidema, 2020), or None.
        gradient_attention: The attention of all layers weighted by its gradient, without the
            identity (Chefer et al., 2021), or None.
        reason: Why attention could not be read, or None.
        attribution: The whole result: scores, delta, error, provenance, values [B, T, E].

    Example:
        Of `found`, as in the example of `explain_tokens`:

        >>> found.tokens, found.values  # doctest: +SKIP
        ((('a', 'good', 'film'),), tensor([[1., 4., 2.]]))
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
        """The available columns by name, [B, T] each, "attribution" first."""
        several = (self.values, self.attention, self.rollout, self.gradient_attention)
        pairs = zip(TITLES, several, strict=True)
        return {name: column for name, column in pairs if column is not None}

    @property
    def correlation(self) -> dict[str, Tensor]:
        """Spearman's rank correlation of each kind of attention with |attribution|: [B] by name.

        Special tokens do not count. NaN for fewer than three other tokens and for constant columns.
        """
        columns, content = self.columns, self.real & ~self.special
        size = columns.pop("attribution").abs()
        rows = list(enumerate(content))
        return {
            name: torch.stack([_spearman(size[n][own], one[n][own]) for n, own in rows])
            for name, one in columns.items()
        }

    def words(self) -> TokenAttribution:
        """The same result per word: every column of a word is the sum over its tokens."""
        widest = max(map(len, self.pieces))
        start = self.real.int().argmax(1).tolist()
        member = self.values.new_zeros(len(self.pieces), widest, self.values.shape[1])
        for number, words in enumerate(self.pieces):
            for index, word in enumerate(words):
                for token, share in word.tokens:
                    member[number, index, start[number] + token] = share
        summed: dict[str, Any] = {
            "values" if name == "attribution" else name: _products(member, column)
            for name, column in self.columns.items()
        }
        texts = tuple(tuple(word.text for word in words) for words in self.pieces)
        counts = torch.tensor([len(words) for words in texts], device=self.real.device)
        return replace(
            self,
            tokens=texts,
            pieces=tuple(
                tuple(Word(text, (index,)) for index, text in enumerate(words)) for words in texts
            ),
            real=torch.arange(widest, device=counts.device) < counts[:, None],
            special=_products(member, self.special.to(member.dtype)) > 0,
            **summed,
        )

    def rows(self, text: int = 0) -> list[tuple[str, bool, dict[str, float]]]:
        """(token, whether it is special, its number in each column) for the tokens of one text.

        Args:
            text: The index of the text; InputError if there is none.
        """
        if not -len(self.tokens) <= text < len(self.tokens):
            raise InputError(f"text out of range: got {text}, there are {len(self.tokens)}")
        own, names = self.real[text], list(self.columns)
        columns = (one[text][own].tolist() for one in self.columns.values())
        special, numbers = self.special[text][own].tolist(), zip(*columns, strict=True)
        rows = zip(self.tokens[text], special, numbers, strict=True)
        return [
            (token, is_special, dict(zip(names, row, strict=True)))
            for token, is_special, row in rows
        ]

    def table(self, text: int = 0) -> str:
        """The tokens of one text with their numbers and the rank correlations, as plain text;
        special tokens are in brackets.

        Args:
            text: The index of the text; InputError if there is none.
        """
        rows = self.rows(text)
        labels = [f"({token})" if special else token for token, special, _ in rows]
        width = max(len(one) for one in (*labels, "token"))
        head = "token".ljust(width) + "".join(f"  {TITLES[name]:>15}" for name in self.columns)
        lines = [self._facts(text), head, "-" * len(head)]
        for label, (_, _, numbers) in zip(labels, rows, strict=True):
            cells = "".join(f"  {one:>15.3g}" for one in numbers.values())
            lines.append(label.ljust(width) + cells)
        if agreements := self._agreements(text):
            lines.append(f"{AGREEMENT}: {_listed(agreements)}")
        if self.reason is not None:
            lines.append(f"no attention: {self.reason}")
        return "\n".join(lines)

    def html(self) -> str:
        """All texts as a fragment of HTML: a line of shaded tokens per column."""
        texts = [self._shaded(number) for number in range(len(self.tokens))]
        return render("tokens.html.jinja", texts=texts, agrees=AGREEMENT, note=NOTE)

    _repr_html_ = html

    def __str__(self) -> str:
        return "\n\n".join(self.table(number) for number in range(len(self.tokens)))

    def __repr__(self) -> str:
        lengths = ", ".join(str(len(one)) for one in self.tokens[:5])
        more = ", ..." if len(self.tokens) > 5 else ""
        return f"<TokenAttribution {self.attribution.provenance.method}; tokens: {lengths}{more}>"

    def _facts(self, text: int) -> str:
        result = self.attribution
        facts = [result.provenance.method, f"score {float(result.scores[text]):.4g}"]
        if result.baseline_scores is not None:
            facts.append(f"baseline {float(result.baseline_scores[text]):.4g}")
        if result.delta is not None:
            facts.append(f"delta {float(result.delta[text]):.2g}")
        return "; ".join(facts)

    def _agreements(self, text: int) -> dict[str, str]:
        """The rank correlations of one text, written out."""
        values = ((name, float(one[text])) for name, one in self.correlation.items())
        return {name: "undefined" if one != one else f"{one:+.2f}" for name, one in values}

    def _shaded(self, text: int) -> dict[str, Any]:
        rows, agreements, columns = self.rows(text), self._agreements(text), []
        for name in self.columns:
            # Special tokens draw most of the attention: they would leave no shade for the others.
            own = [abs(numbers[name]) for _, special, numbers in rows if not special]
            top = max(filter(math.isfinite, own), default=0.0)
            tokens = []
            for token, special, numbers in rows:
                value = numbers[name]
                is_shaded = top and math.isfinite(value) and not special
                opacity = _OPACITY * min(abs(value) / top, 1.0) if is_shaded else 0.0
                tokens.append((token, special, value, _WARM if value > 0 else _COOL, opacity))
            columns.append((TITLES[name], agreements.get(name), tokens))
        return {"facts": self._facts(text), "columns": columns, "agreements": _listed(agreements)}


def _listed(agreements: dict[str, str]) -> str:
    return ", ".join(f"{TITLES[name]} {value}" for name, value in agreements.items())


def _products(member: Tensor, column: Tensor) -> Tensor:
    """Sums [B, W] of a column [B, T] over words by their shares [B, W, T] of tokens."""
    return (member.to(column.dtype) @ column[..., None])[..., 0]


def _spearman(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of ranks; NaN, as 0 / 0, for constant columns."""
    if len(x) < _LEAST_TOKENS:
        return x.new_full((), torch.nan, dtype=torch.float64)
    return torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1]


def _ranks(x: Tensor) -> Tensor:
    """Ranks, of which equal values share the mean."""
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[group]
