"""Explains texts: attributions of their tokens, beside attention to the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saliency_fast.api import Engine
from saliency_fast.attribution import Attribution
from saliency_fast.engine.recipe import Method, WeightedSum
from saliency_fast.errors import InputError, InputTypeError, NoAttentionError, warn
from saliency_fast.methods import read_method
from saliency_fast.model.embeddings import Lookup, lookups
from saliency_fast.model.guard import preserve_model_state
from saliency_fast.model.layers import names_of
from saliency_fast.model.positions import PREDICTED, NextToken
from saliency_fast.model.targets import Target
from saliency_fast.specs import restore_target
from saliency_fast.tokens.beside import Beside
from saliency_fast.tokens.encoding import Encoded, Text, encode, id_of, token_named
from saliency_fast.tokens.result import TokenAttribution
from saliency_fast.tokens.similarity import Compared, Similarity

ZERO = "zero"
Seen = tuple[Tensor | None, Tensor | None, Tensor | None, str | None]
"""Attention weights, rollout, and weighed by gradients [B, T]; else why there are none."""


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
    """Explains what a model of the Hugging Face kind says of texts, token by token.

    The embeddings of the tokens are explained, and reduced over their channels: `reduction` is
    "sum", "absmax", "l2" or None, the sum, and the norm of gradients alone, whose sum is next to
    zero where a layer norm follows. Methods that look at scores alone exchange tokens instead.
    texts: one, several, or pairs. target: as in `explain`, or a `Similarity` to other texts. Of
    language models `NextToken` names the token that follows, by its id or text; "predicted" is the
    likeliest one behind each text. Positions count a text's own tokens, whatever the padding.
    baseline: what stands for no information in the place of the texts' own tokens, while special
    tokens stay: "pad", "mask", "unk", a token id, or "zero" for embeddings of zeros. attention:
    whether attention is read too; None: where the model has any. query: the token whose attention
    is read: "first", "last", its number in the text, "mean", or "auto", what a `Similarity` pools;
    the last where tokens see only what is before them; else the first. layer: the one whose
    attention weights are shown. max_length: tokens of a text, where that is less than the
    model takes. truncate: cuts longer texts with a warning. options: further arguments of `Engine`,
    such as `precision`, `memory_budget` or `progress`.

    Raises InputError where texts are longer than the model takes, and what `explain` raises.
    """
    several = _listed(texts)
    if not callable(tokenizer):
        raise InputTypeError(f"tokenizer must be callable: got {type(tokenizer).__name__}")
    found = encode(model, tokenizer, several, max_length, truncate)
    further: dict[str, Any] = {**found.further, **(forward_kwargs or {})}
    if isinstance(target, Similarity):
        if query == "auto" and isinstance(target.pooling, str):
            query = target.pooling
        others = encode(model, tokenizer, target.texts(len(several)), max_length, truncate)
        model, target = Compared(model, target), None
        further |= {"pooled": found.real, "other": model.embedded(others)}
    if isinstance(target, NextToken):
        target = _named(tokenizer, target)
        if query == "auto" and isinstance(target.position, int):
            query = target.position
    # Methods that look at scores alone exchange ids, and need no table.
    table = None
    if attention is not False or read_method(method).recipe().gradients:
        table = _table(model, found, further)
    whole, values = _attributed(
        model, tokenizer, method, baseline, found, target, further, table, reduction, options
    )
    seen: Seen = (None, None, None, None)
    if attention is not False:
        reading = Beside(found.real, query, layer)
        # The classes that were explained, where "predicted" chose them.
        same = target if whole.classes is None else _same(whole)
        seen = _beside(model, reading, found, same, further, table, attention, options)
    return TokenAttribution(
        found.tokens, found.words, found.real, found.special, values * found.real, *seen, whole
    )


def _attributed(
    model: nn.Module,
    tokenizer: Any,
    method: Method | str,
    baseline: str | int,
    found: Encoded,
    target: Target,
    further: Mapping[str, Any],
    table: Lookup | None,
    reduction: str | None,
    options: Mapping[str, Any],
) -> tuple[Attribution, Tensor]:
    """The attribution of embeddings, and what is each token's [B, T]."""
    chosen = read_method(method)
    recipe, start = chosen.recipe(), None
    if recipe.baseline != "none":
        start = _baseline(tokenizer, baseline, found, recipe.gradients, table)
    if recipe.gradients:
        engine, features = Engine(model, chosen, at=_name(model, table), **options), None
    else:
        # Methods that look at scores alone take tokens away whole, one id for another.
        engine = Engine(model, chosen, **options)
        features = _numbered(found) if recipe.features else None
    whole = engine(found.ids, target, start, forward_kwargs=further, features=features)
    if whole.many:
        raise InputError(
            f"target must be one per text: got {whole.scores.shape[1]} for each; call once for each"
        )
    values = whole.values
    if isinstance(values, Tensor) and values.dim() > 2:
        alone = isinstance(recipe, WeightedSum) and recipe.factor == "none"
        values = whole.map(reduction or ("l2" if alone else "sum"), channel_axis=-1)
    assert isinstance(values, Tensor)
    return whole, values


def _same(whole: Attribution) -> Target:
    """The target that was explained, where "predicted" chose it."""
    target: Target = restore_target(whole.provenance.target, whole.classes, whole.many, whole.kept)
    return target


def _named(tokenizer: Any, target: NextToken) -> NextToken:
    """The target with the ids of tokens that it names by their text."""
    token = target.token
    if isinstance(token, str) and token != PREDICTED:
        return replace(target, token=id_of(tokenizer, token))
    if isinstance(token, (list, tuple)) and all(isinstance(one, str) for one in token):
        return replace(target, token=[id_of(tokenizer, one) for one in token])
    return target


def _name(model: nn.Module, table: Lookup | None) -> str:
    assert table is not None
    return names_of(model, [table.layer])[0]


def _table(model: nn.Module, found: Encoded, further: Mapping[str, Any]) -> Lookup:
    """The table that makes vectors of the texts' tokens; raises InputError where it is none, or
    several of which none takes the tokens as they are.
    """
    with preserve_model_state(model, found.ids.device):
        several = lookups(model, lambda: model(found.ids, **further), (found.ids,))
    own = [one for one in several if one.ids.shape == found.ids.shape and one.ids.equal(found.ids)]
    if len(own) == 1 and len(several) > 1:
        rest = names_of(model, [one.layer for one in several if one is not own[0]])
        warn(
            f"{', '.join(rest)} makes vectors of the texts' tokens, too, beside "
            f"{_name(model, own[0])}, which is explained: what the score owes to it is left out "
            "(of a decoder, pass decoder_input_ids in forward_kwargs)"
        )
    chosen = own if len(own) == 1 else several
    if len(chosen) > 1:
        names = ", ".join(map(repr, names_of(model, [one.layer for one in chosen])))
        raise InputError(
            f"tokens have vectors from several tables: got {names}; explain the ids themselves by "
            "sf.explain(..., at=[...]) with those names, a map for each"
        )
    return chosen[0]


def _listed(texts: Text | Sequence[Text]) -> list[Text]:
    """Several texts. A tuple of two strings is a pair: several texts come in a list."""
    if isinstance(texts, str) or (isinstance(texts, tuple) and _is_pair(texts)):
        return [texts]
    several = list(texts)
    if not several:
        raise InputError("texts is empty: expected one or more")
    for one in several:
        if not (isinstance(one, str) or (isinstance(one, tuple) and _is_pair(one))):
            raise InputTypeError(f"texts must be strings or pairs of them: got {one!r}")
    return several


def _is_pair(text: tuple[object, ...]) -> bool:
    return len(text) == 2 and all(isinstance(one, str) for one in text)


def _baseline(
    tokenizer: Any,
    baseline: str | int,
    found: Encoded,
    gradients: bool,
    table: Lookup | None,
) -> Tensor:
    """The token ids, or embeddings, with nothing in the place of the texts' own tokens."""
    if baseline == ZERO and not gradients:
        raise InputError(
            "baseline 'zero' is of embeddings, and this method exchanges tokens: pass 'pad', "
            "'mask', 'unk' or a token id"
        )
    if baseline != ZERO:
        return found.ids.masked_fill(found.content, token_named(tokenizer, baseline))
    assert table is not None
    with torch.no_grad():
        vectors: Tensor = table.table(found.ids)
    return vectors.masked_fill(found.content[..., None], 0.0)


def _numbered(found: Encoded) -> Tensor:
    """Tokens as segments [B, T]; what is not text is one that stays."""
    tokens = torch.arange(found.ids.shape[1], device=found.ids.device)
    return torch.where(found.content, tokens, -1)


def _beside(
    model: nn.Module,
    reading: Beside,
    found: Encoded,
    target: Target,
    further: Mapping[str, Any],
    table: Lookup | None,
    wanted: bool | None,
    options: Mapping[str, Any],
) -> Seen:
    """Attention of the same call; raises where there is none only if it is asked for."""
    # Half types are for sums of gradients, whose error can be measured.
    kept = {name: one for name, one in options.items() if name not in ("precision", "tolerance")}
    engine = Engine(model, reading, **{**kept, "at": _name(model, table), "hashes": False})
    try:
        answer = engine(found.ids, target, forward_kwargs=further)
    except NoAttentionError as error:
        if wanted:
            raise
        return None, None, None, str(error)
    assert isinstance(answer.values, Tensor)
    weights, rolled = answer.extras["attention"], answer.extras["rollout"]
    return weights * found.real, rolled * found.real, answer.values * found.real, None
