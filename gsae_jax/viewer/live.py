"""What the pages compute with a language model and SAEs: the features of a text, and what interventions do."""

import threading
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import batching, taps
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.saes.trained import SAE, for_export

COUNTS = (16, 32, 64, 128)  # new tokens; each is compiled once
MOST_PAIRS = 200_000  # of a token and an active feature in one answer
MOST_EDITS = 32
TOP = 10  # tokens with the largest probabilities
STRONGEST = 1e6  # of strengths; far beyond, numbers are no longer finite


class Live:
    """A language model and SAEs. Requests are computed one after the other, whichever threads they come from."""

    def __init__(
        self,
        lm: loading.LM,
        saes: Mapping[str, SAE],
        others: Mapping[str, loading.LM] = MappingProxyType({}),
        prepend_bos: bool = True,
    ):
        """Takes what a run has.

        Args:
            lm: its language model.
            saes: by their keys in addresses.
            others: more models, by the names after the @ of sites.
            prepend_bos: whether its rows begin with BOS, so that texts begin with it here.
        """
        self.lm, self.saes, self._lms, self._prepend_bos = lm, saes, {"": lm, **others}, prepend_bos
        self._special_tokens = loading.special_tokens_of(lm, others)
        self._lock = threading.Lock()

    def active(self, sae: str, text: str) -> dict[str, Any]:
        """The active features of each token of a text.

        Special tokens, and tokens above the SAE's norm limit, are not looked at, as in a collection.

        Returns:
            `tokens`, their texts; `active`, for each the pairs (feature, activation) by descending |activation|, None
            where it is not looked at; `left_out`, how many pairs of weak features were left out.

        Raises:
            UserError: no such SAE, no text, or one that is longer than the language model's context.
        """
        chosen, ids = self._sae(sae), self._tokens(text)
        with self._lock:
            x: dict[str, jax.Array] = {}
            for model in chosen.models:
                wanted = map(sites_lib.parts, sorted({*chosen.sites, *chosen.targets}))
                own = self._lms[model].activations(np.array([ids]), [hook for hook, of in wanted if of == model])
                x |= {sites_lib.at(hook, model): value for hook, value in own.items()}
            looked_at = ~np.isin(ids, self._special_tokens)
            for site, limit in chosen.norm_limits.items():
                looked_at &= np.linalg.norm(np.asarray(x[site][0], np.float32), axis=-1) <= limit
            inputs = tuple(x[site][0] for site in chosen.sites)
            f_TxF = np.asarray(chosen.encode(inputs if isinstance(chosen.d_in, tuple) else inputs[0]), np.float32)
        active: list[list[tuple[int, float]] | None] = []
        most, left_out = max(TOP, MOST_PAIRS // len(ids)), 0
        for f_F, is_looked_at in zip(f_TxF, looked_at.tolist(), strict=True):
            (numbers,) = np.nonzero(f_F)
            numbers = numbers[np.argsort(-np.abs(f_F[numbers]), kind="stable")]
            left_out += max(0, len(numbers) - most) if is_looked_at else 0
            pairs = [(int(number), float(f"{f_F[number]:.4g}")) for number in numbers[:most]]
            active.append(pairs if is_looked_at else None)
        return {"tokens": self._texts(ids), "active": active, "left_out": left_out}

    def steered(self, text: str, edits: list[Any], tokens: int, temperature: float, seed: int) -> dict[str, Any]:
        """Next-token probabilities and a continuation of a text, without and with interventions.

        Args:
            text: the prompt.
            edits: dicts of an SAE's key `sae`, the number `feature`, and `strength`, as for `taps.steer`; None ablates
                the feature. Features are ablated first, and steering is added then.
            tokens: how many new tokens, one of COUNTS.
            temperature: of sampling; 0 takes the most likely token.
            seed: of sampling, the same for both continuations.

        Returns:
            `probabilities`, of the tokens that are likely in either case, [text, without, with] each, by descending
            probability with the interventions; `without` and `with`, the continuations.

        Raises:
            UserError: a value is not one of those above, or the SAE does not allow the intervention.
        """
        (lm, tap), ids = self._tap(edits), self._tokens(text)
        if tokens not in COUNTS:
            raise UserError(f"is {tokens}; write one of {', '.join(map(str, COUNTS))}", "tokens")
        if not 0 <= seed < 2**32:
            raise UserError(f"is {seed}; write a whole number from 0 to {2**32 - 1}", "seed")
        length = min(batching.padded_size(max(len(ids), loading.SHORTEST)), lm.config.n_ctx)
        padded = np.array([ids + [0] * (length - len(ids))], np.int32)
        written, after = [], []
        with self._lock:
            for each in (taps.chain(), tap):
                sampling: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed}
                sampling["prepend_bos"] = self._prepend_bos
                written.append(lm.generate(text, each, **sampling)[len(text) :])
                after.append(np.asarray(_next(lm.module, lm.params, each, padded, len(ids) - 1)))
        if not np.isfinite(after[1]).all():
            raise UserError("are so large that the predictions are not finite; write smaller ones", "strength")
        likely = {int(token) for p_V in after for token in np.argsort(-p_V)[:TOP]}
        order = sorted(likely, key=lambda token: -after[1][token])
        rows = zip(self._texts(order), *([float(p_V[token]) for token in order] for p_V in after), strict=True)
        return {"probabilities": [*rows], "without": written[0], "with": written[1]}

    def _sae(self, key: Any) -> SAE:
        if key not in self.saes:
            raise UserError(f"{key!r} is not an SAE; known: {', '.join(self.saes)}", "SAE")
        return self.saes[key]

    def _tokens(self, text: str) -> list[int]:
        """The ids of a text."""
        if not text:
            raise UserError("is empty; write some", "text")
        (ids,) = tokenizer_lib.tokenize(self.lm.tokenizer, [text], self._prepend_bos)
        most = min(lm.config.n_ctx for lm in self._lms.values())
        if len(ids) > most:
            raise UserError(f"has {len(ids):,} tokens; this language model has {most:,} positions", "text")
        return list(ids)

    def _texts(self, ids: list[int]) -> list[str]:
        return tokenizer_lib.token_texts(self.lm.tokenizer, ids)

    def _tap(self, edits: list[Any]) -> tuple[loading.LM, sites_lib.Chain]:
        """The language model of which the edited sites are, and the tap that edits them."""
        if not 1 <= len(edits) <= MOST_EDITS:
            raise UserError(f"are {len(edits)}; choose 1 to {MOST_EDITS}", "features")
        steered, ablated, models = [], dict[str, list[int]](), set[str]()
        for edit in edits:
            if not isinstance(edit, dict) or edit.keys() != {"sae", "feature", "strength"}:
                raise UserError(f"has {edit!r}; write objects of sae, feature and strength", "edits")
            sae, feature, strength = self._sae(edit["sae"]), edit["feature"], edit["strength"]
            if type(feature) is not int or not 0 <= feature < sae.width:
                raise UserError(f"is {feature!r}; {edit['sae']} has features 0 to {sae.width - 1}", "feature")
            models |= {*sae.models}
            sae = for_export(sae)  # its sites have the names that they have in their own language model
            if len(models) > 1:
                raise UserError("are of several language models; choose features of one", "features")
            if strength is None:
                ablated.setdefault(edit["sae"], []).append(feature)
            elif type(strength) not in (int, float) or not abs(strength) <= STRONGEST:
                raise UserError(f"is {strength!r}; write a number up to {STRONGEST:,.0f}", "strength")
            else:
                steered.append(taps.steer(sae, feature, jnp.float32(strength)))
        ablations = [taps.ablate(for_export(self.saes[key]), numbers) for key, numbers in ablated.items()]
        return self._lms[models.pop()], taps.chain(*ablations, *steered)


@partial(jax.jit, static_argnums=0)
def _next(module: Any, params: Any, tap: sites_lib.Chain, tokens_1xT: jax.Array, last: int) -> jax.Array:
    """Probabilities [V] of the token after position `last`; compiled once for all features and strengths."""
    logits_1xTxV = module.apply({"params": params}, tokens_1xT, tap, None)
    return jax.nn.softmax(logits_1xTxV[0, last].astype("float32"))
