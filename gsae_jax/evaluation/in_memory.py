"""Metrics of SAEs that are in memory, without a report: `gsae_jax.measure(saes, lm, tokens)`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.evaluation import measure as measure_lib
from gsae_jax.evaluation import metrics
from gsae_jax.lms.loading import LM, check_tokens, special_tokens_of
from gsae_jax.saes.trained import SAE


def measure(
    saes: SAE | Iterable[SAE] | Mapping[str, SAE],
    lm: LM,
    tokens: Any,
    *,
    drop_special_tokens: bool = True,
    ito: Sequence[int] = (),
    others: Mapping[str, LM] = MappingProxyType({}),
    rows_per_forward: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The report's metrics of SAEs, for example of changed ones (`dataclasses.replace`), by name.

        sae = gsae_jax.load("runs/quickstart")["gated_1"]
        tokens = gsae_jax.held_out("runs/quickstart", 20_000)
        gsae_jax.measure(sae, gsae_jax.load_lm(), tokens)["gated_1"]["loss_recovered"]

    Args:
        saes: one SAE, several of different names, or a dict, whose names are used.
        lm: the language model.
        tokens: token ids [rows, T] of whole rows without padding, as `gsae_jax.held_out` returns them.
        drop_special_tokens: whether BOS, EOS and other special tokens are left out, as in training by default.
        ito: as in `gsae_jax.evaluation.measure.measure`.
        others: the other language models that crosscoders read, by the names after the @ of their sites.
        rows_per_forward: rows in one forward pass; the default gives about 4,096 tokens.

    Returns:
        For each name in `report.json`, which for SAEs with several targets has the site: the metrics that
            `gsae_jax.evaluation.metrics.combine` lists. Intervals are over rows, and those of reports over documents.
            With `data.roles`, reports leave out tokens of other roles, which are measured here.

    Raises:
        UserError: tokens that are none of the language model, two SAEs of one name, or an SAE that does not fit.
    """
    rows = _checked(tokens, lm)
    at_once = max(1, measure_lib.MEDIAN_TOKENS // rows.shape[1]) if rows_per_forward is None else rows_per_forward
    if at_once < 1:
        raise UserError(f"is {at_once}; write a whole number from 1 on", "rows_per_forward")
    batches = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    special = special_tokens_of(lm, others) if drop_special_tokens else ()
    sums = measure_lib.measure(lm, _named(saes), batches, special, ito=ito, others=others)
    return {name: metrics.combine(of_one) for name, of_one in sums.items()}


def _named(saes: SAE | Iterable[SAE] | Mapping[str, SAE]) -> list[SAE]:
    """The SAEs, at least one, each of its own name."""
    if isinstance(saes, Mapping):
        saes = [dataclasses.replace(sae, name=name) for name, sae in saes.items()]
    each = [saes] if isinstance(saes, SAE) else list(saes)
    names = [sae.name for sae in each]
    if not names or len({*names}) < len(names):
        what = f"are called {', '.join(names)}" if names else "are none"
        raise UserError(f"{what}; give SAEs of different names, or a dict, whose names are used", "saes")
    return each


def _checked(tokens: Any, lm: LM) -> np.ndarray:
    rows = np.asarray(tokens)
    if rows.ndim != 2 or not len(rows) or not np.issubdtype(rows.dtype, np.integer):
        raise UserError(f"are {rows.dtype}{list(rows.shape)}; give integers of shape [rows, tokens]", "tokens")
    if not 2 <= rows.shape[1] <= lm.config.n_ctx:
        raise UserError(f"have rows of {rows.shape[1]}; write rows of 2 to {lm.config.n_ctx} tokens", "tokens")
    check_tokens(rows, lm.config.d_vocab, "tokens")
    return rows
