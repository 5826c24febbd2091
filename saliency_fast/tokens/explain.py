"""`explain_tokens`: attributions of the tokens of texts, beside attention to the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution
from saliency_fast.engine import recipe as engine
from saliency_fast.engine.recipe import Method, WeightedSum
from saliency_fast.errors import InputError, InputTypeError, ModelError, NoAttentionError, warn
from saliency_fast.methods import attention as methods
from saliency_fast.methods import read_method
from saliency_fast.methods.parts import checks
from saliency_fast.model.attention import AttentionTaps
from saliency_fast.model.layers import Lookup, lookups, names_of
from saliency_fast.model.preserve import preserve_model_state
from saliency_fast.model.targets import PREDICTED, NextToken, Target
from saliency_fast.record import restore_target
from saliency_fast.tokens.encoding import Encoded, Text, baseline_id, encode, id_of
from saliency_fast.tokens.result import TokenAttribution

ZERO = "zero"


@dataclass(frozen=True)
class Similarity:
    """A target of `explain_tokens`: the cosine of a text's embedding and another text's embedding.

    The embedding of the other text is a constant.

    Args:
        to: One text, or one for each text that is explained.
        pooling: How the last hidden states [B, T, E] become embeddings [B, E]: "mean" over the
            tokens without padding, the "first" token, or a function of the model's output and a
            bool mask [B, T] that is False at padding.

    Raises:
        InputError: If `pooling` is neither a name nor a function.

    Example:
        >>> Similarity("A kitten takes a nap.", pooling="first")
        Similarity(to='A kitten takes a nap.', pooling='first')
    """

    to: str | Sequence[str]
    pooling: str | Callable[[Any, Tensor], Tensor] = "mean"

    def __post_init__(self) -> None:
        if not callable(self.pooling) and self.pooling not in POOLINGS:
            raise InputError(
                f"pooling must be {', '.join(map(repr, POOLINGS))} or a function: got "
                f"{self.pooling!r}"
            )

    def texts(self, count: int) -> list[str]:
        several = [self.to] if isinstance(self.to, str) else list(self.to)
        if len(several) not in (1, count):
            raise InputError(f"to must be one text, or one for each of {count}: got {len(several)}")
        return several * count if len(several) == 1 else several

    def pool(self, raw: Any, mask: Tensor) -> Tensor:
        """The embeddings [B, E] of a model's output."""
        if callable(self.pooling):
            return self.pooling(raw, mask)
        return POOLINGS[self.pooling](_hidden_states(raw), mask)


class SimilarityModel(nn.Module):
    """A model whose output is the cosine of its texts' embeddings and constant embeddings."""

    def __init__(self, model: nn.Module, similarity: Similarity) -> None:
        super().__init__()
        self.model, self.similarity = model, similarity
        # A new module is in training mode, and the model's own mode must stay.
        self.training = model.training

    def get_input_embeddings(self) -> nn.Module | None:
        result: nn.Module | None = getattr(self.model, "get_input_embeddings", lambda: None)()
        return result

    def forward(self, input_ids: Tensor, pooled: Tensor, other: Tensor, **further: Any) -> Tensor:
        embedding = self.similarity.pool(self.model(input_ids, **further), pooled)
        return functional.cosine_similarity(embedding, other, 1)

    def embedded(self, texts: Encoded) -> Tensor:
        """The embeddings [B, E] of encoded texts, without gradients."""
        with preserve_model_state(self.model, texts.ids.device), torch.no_grad():
            return self.similarity.pool(self.model(texts.ids, **texts.arguments), texts.real)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    # Padding may be on the left.
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.int().argmax(1)]


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": _mean, "first": _first}


def _hidden_states(raw: Any) -> Tensor:
    result = raw if isinstance(raw, Tensor) else getattr(raw, "last_hidden_state", None)
    if result is None and isinstance(raw, (tuple, list)):
        result = raw[0]
    if not isinstance(result, Tensor) or result.dim() != 3:
        got = list(result.shape) if isinstance(result, Tensor) else type(raw).__name__
        raise ModelError(
            f"similarity needs a model of last hidden states [B, T, E]: got {got}; pass "
            "pooling=function, from what the model returns and a mask [B, T] to [B, E]"
        )
    return result


@dataclass(frozen=True, eq=False)
class AttentionColumns:
    """A method: all three kinds of attention from one forward and one backward pass.

    query: the token whose attention is read. layer: the one whose weights are read.
    """

    real: Tensor
    query: str | int
    layer: int
    name = "attention"

    def __post_init__(self) -> None:
        names = ("auto", "first", "last", "mean")
        checks.fields(self, query=names if isinstance(self.query, str) else checks.integer)

    def recipe(self) -> engine.Recipe:
        return engine.RoundsRecipe(self._rounds, 1, at_input=True)

    def _rounds(self, context: engine.RoundContext) -> engine.Rounds:
        (x,) = context.inputs
        parts: list[tuple[Tensor, Tensor, Tensor]] = []

        def each(rows: slice, result: engine.RoundResult) -> None:
            layers, real = methods.wide(result.taps), self.real[rows]
            if layers[0].shape[2] != real.shape[1]:
                raise NoAttentionError(
                    f"attention is over {layers[0].shape[2]} tokens, and the tokenizer gives "
                    f"{real.shape[1]}; pass attention=False"
                )
            start = self._start(real, layers)
            weights = methods.last_row(start, layers, self.layer)
            rolled = methods.rollout(start, layers, 0.5, "mean", 0.0)
            # The identity, which every token has of itself, is no evidence.
            weighted = (
                methods.weighted_by_gradient(start, layers, methods.wide(result.grads[0])) - start
            )
            parts.append((weights, rolled, weighted))

        example = torch.arange(len(x), device=x.device)
        yield engine.Round(
            lambda example, _: (x[example],), example, example, taps=AttentionTaps(), each=each
        )
        weights, rolled, weighted = (torch.cat(one)[:, None] for one in zip(*parts, strict=True))
        return engine.Maps((weighted,), extras={"attention": weights, "rollout": rolled})

    def _start(self, real: Tensor, layers: methods.Layers) -> Tensor:
        """The weight of each token as a query [R, T]."""
        start = real.to(layers[0].dtype)
        if self.query == "mean":
            return start / start.sum(1, keepdim=True)
        query = self.query
        if query == "auto":
            query = "last" if methods.is_causal(layers[0], real) else "first"
        index = {"first": 0, "last": -1}[query] if isinstance(query, str) else query
        count = real.sum(1)
        wanted = torch.full_like(count, index) + (count if index < 0 else 0)
        if bool(((wanted < 0) | (wanted >= count)).any()):
            raise InputError(
                f"query out of range: got {index}, and a text has {int(count.min())} tokens"
            )
        # The index counts real tokens, on whichever side padding is.
        return start * (real.cumsum(1) == wanted[:, None] + 1)


def explain_tokens(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    texts: Text | Sequence[Text],
    *,
    target: Target | Similarity = None,
    method: Method | str = "integrated_gradients",
    baseline: str | int = "pad",
    attention: bool | None = None,
    query: str | int = "auto",
    layer: int = -1,
    reduction: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    forward_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> TokenAttribution:
    """Explains the output of a Hugging Face kind of model for texts, token by token.

    The embeddings of the tokens are explained and reduced over their channels. Methods that use
    scores alone replace whole tokens instead. Positions count a text's own tokens, on whichever
    side padding is.

    Args:
        model: Called as `model(ids, attention_mask=...)` with the arguments that it accepts.
        tokenizer: The model's own tokenizer.
        texts: One text, a list of B texts, a pair of texts as a tuple, or a list of pairs.
        target: As in `explain`, or a `Similarity` to other texts. For language models, `NextToken`
            names the token that follows by its id or text, and "predicted" is the likeliest one.
        method: A method or its name.
        baseline: The replacement of the texts' own tokens that stands for no information: "pad",
            "mask", "unk", a token id, or "zero" for embeddings of zeros. Special tokens stay.
        attention: Whether attention is read too; by default where the model has any.
        query: The token whose attention is read: "first", "last", "mean", an index, or "auto": the
            pooled token of a `Similarity`, else the last token of causal models, else the first.
        layer: The layer whose attention weights are returned.
        reduction: "sum", "absmax" or "l2" over channels. By default the norm for gradients alone,
            whose sum is almost zero in front of a layer norm, and the sum for all other methods.
        max_length: The largest number of tokens of a text; by default as many as the model takes.
        truncate: Whether longer texts are cut, with a warning, instead of raising.
        forward_kwargs: Further arguments of the model.
        **options: Further arguments of `Engine`, such as `precision` or `memory_budget`.

    Returns:
        The attributions [B, T] with the attention weights, rollout and gradient-weighted attention.

    Raises:
        InputError: If texts are too long, or for arguments that do not fit; see also `explain`.
        NoAttentionError: If `attention` is True and the model has none.

    Example:
        >>> class Words:
        ...     names, pad_token_id = ["[PAD]", "a", "good", "film"], 0
        ...     def __call__(self, texts, **options):
        ...         return {"input_ids": [[self.names.index(w) for w in t.split()] for t in texts]}
        ...     def convert_ids_to_tokens(self, ids):
        ...         return [self.names[one] for one in ids]
        ...     def get_vocab(self):
        ...         return {name: number for number, name in enumerate(self.names)}
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 1, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[0.0, 0.0], [1, 0], [3, 1], [2, 0]]))
        ...     _ = model[2].weight.fill_(1.0)
        >>> found = explain_tokens(model, Words(), "a good film", method="input_x_gradient")
        >>> found.tokens, found.values
        ((('a', 'good', 'film'),), tensor([[1., 4., 2.]]))
    """
    listed = _as_list(texts)
    if not callable(tokenizer):
        raise InputTypeError(f"tokenizer must be callable: got {type(tokenizer).__name__}")
    encoded = encode(model, tokenizer, listed, max_length, truncate)
    arguments: dict[str, Any] = {**encoded.arguments, **(forward_kwargs or {})}
    goal: Target
    if isinstance(target, Similarity):
        if query == "auto" and isinstance(target.pooling, str):
            query = target.pooling
        others = encode(model, tokenizer, target.texts(len(listed)), max_length, truncate)
        model, goal = SimilarityModel(model, target), None
        arguments |= {"pooled": encoded.real, "other": model.embedded(others)}
    else:
        goal = _with_ids(tokenizer, target)
        if query == "auto" and isinstance(goal, NextToken) and isinstance(goal.position, int):
            query = goal.position
    method = read_method(method)
    # Methods that use scores alone replace ids and need no table.
    table = None
    if attention is not False or method.recipe().gradients:
        table = _embedding_table(model, encoded, arguments)
    call = _Call(model, encoded, arguments, table)
    result = call.attribution(method, goal, _baseline(tokenizer, baseline, call, method), options)
    values = _per_token(result, method, reduction) * encoded.real
    columns: _Columns = (None, None, None, None)
    if attention is not False:
        # Where "predicted" chose classes, attention is read for the same ones.
        if result.classes is not None:
            goal = restore_target(
                result.provenance.target, result.classes, result.many, result.kept
            )
        reading = AttentionColumns(encoded.real, query, layer)
        columns = call.attention(reading, goal, bool(attention), options)
    return TokenAttribution(
        encoded.tokens, encoded.words, encoded.real, encoded.special, values, *columns, result
    )


_Columns = tuple[Tensor | None, Tensor | None, Tensor | None, str | None]
"""Attention weights, rollout and gradient-weighted attention [B, T], or why there are none."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A model with encoded texts, and the table that embeds them where embeddings are explained."""

    model: nn.Module
    encoded: Encoded
    arguments: Mapping[str, Any]
    table: Lookup | None

    def attribution(
        self, method: Method, target: Target, baseline: Tensor | None, options: Mapping[str, Any]
    ) -> Attribution:
        """The attribution of embeddings, or of ids by methods that use scores alone."""
        recipe, encoded, features = method.recipe(), self.encoded, None
        if not recipe.gradients and recipe.features:
            # Each token is a segment; special tokens and padding are the one that stays.
            index = torch.arange(encoded.ids.shape[1], device=encoded.ids.device)
            features = torch.where(encoded.content, index, -1)
        at: dict[str, Any] = {"at": self._at} if recipe.gradients else {}
        explain = Engine(self.model, method, **at, **options)
        result = explain(
            encoded.ids, target, baseline, forward_kwargs=self.arguments, features=features
        )
        if result.many:
            count = result.scores.shape[1]
            raise InputError(f"target must be one per text: got {count}; call once for each")
        return result

    @property
    def _at(self) -> str:
        assert self.table is not None
        return names_of(self.model, [self.table.layer])[0]

    def attention(
        self, reading: AttentionColumns, target: Target, needed: bool, options: Mapping[str, Any]
    ) -> _Columns:
        """The attention of the same call; without attention this raises only where it is needed."""
        # Half types are for sums of gradients, whose error can be measured.
        of = {**options, "at": self._at, "hashes": False, "precision": "float32", "tolerance": None}
        explain = Engine(self.model, reading, **of)
        try:
            result = explain(self.encoded.ids, target, forward_kwargs=self.arguments)
        except NoAttentionError as error:
            if needed:
                raise
            return None, None, None, str(error)
        assert isinstance(result.values, Tensor)
        real, extras = self.encoded.real, result.extras
        return extras["attention"] * real, extras["rollout"] * real, result.values * real, None


def _per_token(result: Attribution, method: Method, reduction: str | None) -> Tensor:
    values = result.values
    if isinstance(values, Tensor) and values.dim() > 2:
        recipe = method.recipe()
        is_gradient = isinstance(recipe, WeightedSum) and recipe.factor == "none"
        values = result.map(reduction or ("l2" if is_gradient else "sum"), channel_axis=-1)
    assert isinstance(values, Tensor)
    return values


def _with_ids(tokenizer: Any, target: Target) -> Target:
    """The target with the ids of tokens that it names by their text."""
    if not isinstance(target, NextToken):
        return target
    token = target.token
    if isinstance(token, str) and token != PREDICTED:
        return replace(target, token=id_of(tokenizer, token))
    if isinstance(token, (list, tuple)) and all(isinstance(one, str) for one in token):
        return replace(target, token=[id_of(tokenizer, one) for one in token])
    return target


def _embedding_table(model: nn.Module, encoded: Encoded, arguments: Mapping[str, Any]) -> Lookup:
    """The table that embeds the texts' tokens; raises InputError unless exactly one takes them."""
    ids = encoded.ids
    with preserve_model_state(model, ids.device):
        tables = lookups(model, lambda: model(ids, **arguments), (ids,))
    own = [one for one in tables if one.ids.shape == ids.shape and one.ids.equal(ids)]
    if len(own) == 1 and len(tables) > 1:
        rest = names_of(model, [one.layer for one in tables if one is not own[0]])
        (name,) = names_of(model, [own[0].layer])
        warn(
            f"{', '.join(rest)} embeds the texts' tokens, too, beside {name}, which is explained: "
            "evidence through it is left out (of a decoder, pass decoder_input_ids in "
            "forward_kwargs)"
        )
    chosen = own if len(own) == 1 else tables
    if len(chosen) > 1:
        names = ", ".join(map(repr, names_of(model, [one.layer for one in chosen])))
        raise InputError(
            f"several tables embed the tokens: got {names}; explain the ids themselves by "
            "sf.explain(..., at=[...]) with those names, a map for each"
        )
    return chosen[0]


def _as_list(texts: Text | Sequence[Text]) -> list[Text]:
    """Several texts. A tuple of two strings is a pair: several texts come in a list."""
    several = [texts] if _is_text(texts) else list(texts)
    if not several:
        raise InputError("texts is empty: expected one or more")
    for one in several:
        if not _is_text(one):
            raise InputTypeError(f"texts must be strings or pairs of them: got {one!r}")
    return several


def _is_text(one: object) -> TypeGuard[Text]:
    is_pair = isinstance(one, tuple) and len(one) == 2 and all(isinstance(p, str) for p in one)
    return is_pair or isinstance(one, str)


def _baseline(tokenizer: Any, baseline: str | int, call: _Call, method: Method) -> Tensor | None:
    """Token ids or embeddings in which the texts' own tokens are replaced by the baseline."""
    recipe, encoded = method.recipe(), call.encoded
    if recipe.baseline == "none":
        return None
    if baseline != ZERO:
        return encoded.ids.masked_fill(encoded.content, baseline_id(tokenizer, baseline))
    if not recipe.gradients:
        raise InputError(
            "baseline 'zero' is of embeddings, and this method exchanges tokens: pass 'pad', "
            "'mask', 'unk' or a token id"
        )
    assert call.table is not None
    with torch.no_grad():
        vectors: Tensor = call.table.table(encoded.ids)
    return vectors.masked_fill(encoded.content[..., None], 0.0)
