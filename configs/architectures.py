"""Every architecture at one site, at equal compute, with L0 between about 20 and 100. One run trains all of them.

    python -m gsae_jax.train --config configs/architectures.py:rates --workdir runs/architectures_rates
    python -m gsae_jax.train --config configs/architectures.py --workdir runs/architectures

The first command trains at several learning rates with one seed. The second takes the best rate of each kind (`RATES`)
and three seeds. Words after the colon are separated by commas: `tinystories` for the model of configs/tinystories.py,
and `transcoders` or `crosscoders` for those kinds in place of SAEs.
"""

from configs import quickstart, tinystories
from gsae_jax import stack_config
from gsae_jax.errors import UserError
from gsae_jax.saes import products

# Of gated kinds: four features for each dimension of the site. The others have the width of equal compute.
WIDTHS = {"embedded": 1024, "tinystories": 512}
L0 = (20, 50, 100)  # of the kinds that have a k
# The architecture and options of each kind, and its values of λ. They are fixed, as an L0 that is reached at a high
# learning rate does not stay when the rate falls. All others of a family are compared with its first kind.
GATED = (3e-3, 8e-3, 1.8e-2)
RELU = (1.5e-3, 4e-3, 1e-2)
FAMILIES = {
    "saes": {
        "gated": ("gated", {}, GATED),
        "gated_tanh": ("gated", {"penalty": "tanh"}, GATED),
        "gated_aligned": ("gated", {"aligned": True}, GATED),
        "signed_gated": ("signed_gated", {}, GATED),
        "relu": ("relu", {}, RELU),
        "relu_april": ("relu_april", {}, (2e-3, 5e-3, 1.2e-2)),
        "jumprelu": ("jumprelu", {}, (4e-4, 1e-3, 3e-3)),
        "topk": ("topk", {}, ()),
        "batch_topk": ("batch_topk", {}, ()),
        "matryoshka": ("matryoshka", {}, ()),
        "gated_batch_topk": ("gated_batch_topk", {}, ()),
    },
    "transcoders": {
        "gated_transcoder": ("gated_transcoder", {}, (1e-3, 5e-3, 1.8e-2)),
        "relu_transcoder": ("relu_transcoder", {}, (5e-4, 3e-3, 1e-2)),
        "batch_topk_transcoder": ("batch_topk_transcoder", {}, ()),
        # As wide as gated ones.
        "relu_transcoder_narrow": ("relu_transcoder", {}, (5e-4, 3e-3, 1e-2)),
        "batch_topk_transcoder_narrow": ("batch_topk_transcoder", {}, ()),
    },
    "crosscoders": {
        "gated_crosscoder": ("gated_crosscoder", {}, GATED),
        "relu_crosscoder": ("relu_crosscoder", {}, RELU),
        "batch_topk_crosscoder": ("batch_topk_crosscoder", {}, ()),
    },
}
# The learning rates of the first command. `signed_gated` fails at 6e-3 and above, and TopK kinds are better at 1.2e-2
# than at any lower rate.
SWEPT = {name: (6e-3, 1.2e-2, 2.4e-2) for kinds in FAMILIES.values() for name in kinds}
SWEPT |= {"signed_gated": (1.5e-3, 3e-3, 6e-3), "relu_crosscoder": (3e-3, 6e-3, 1.2e-2)} | dict.fromkeys(
    ("topk", "batch_topk", "matryoshka", "gated_batch_topk"), (1.2e-2, 2.4e-2, 4.8e-2)
)
# The best of `SWEPT` (docs/architectures.md). That of `gated_batch_topk` was not searched.
RATES = dict.fromkeys(SWEPT, 1.2e-2) | dict.fromkeys(("signed_gated",), 3e-3) | dict.fromkeys(("matryoshka",), 2.4e-2)
RATES |= dict.fromkeys(("gated", "gated_tanh", "gated_aligned", "jumprelu"), 6e-3)
RATES |= dict.fromkeys(("gated_crosscoder", "relu_crosscoder"), 6e-3)
RATES |= dict.fromkeys(("batch_topk_transcoder", "batch_topk_transcoder_narrow"), 2.4e-2)


def width(family, kind, model="embedded"):
    """Of equal compute. Each feature of a sign-aware SAE counts as two, as their paper compares them."""
    if kind == "signed_gated":
        return WIDTHS[model] // 2
    if kind.endswith("_narrow"):
        return WIDTHS[model]
    architecture, options, _ = FAMILIES[family][kind]
    return products.equal_width(architecture, WIDTHS[model], of=next(iter(FAMILIES[family])), **options)


def get_config(which=""):
    words = set(filter(None, which.split(",")))
    families = words & FAMILIES.keys() or {"saes"}
    if unknown := words - {"tinystories", "rates"} - FAMILIES.keys():
        raise UserError(
            f"has {', '.join(sorted(unknown))}; write any of tinystories, rates, {', '.join(FAMILIES)} after the colon"
        )
    if len(families) > 1:
        raise UserError(f"has {' and '.join(sorted(families))}; write one of them after the colon")
    (family,) = families
    model = "tinystories" if "tinystories" in words else "embedded"
    config, last = (quickstart.get_config(), 0) if model == "embedded" else (tinystories.get_config(), 1)  # last block
    site = {
        "saes": {"site": config.stacks.gated.site},
        "transcoders": {"site": f"blocks.{last}.ln2.hook_normalized", "target": f"blocks.{last}.hook_mlp_out"},
        "crosscoders": {"site": (f"blocks.{last}.hook_resid_pre", f"blocks.{last}.hook_resid_post")},
    }[family]
    config.stacks = {}
    for kind, (architecture, options, l1_coefficients) in FAMILIES[family].items():
        if "rates" in words:
            numbers = {"learning_rates": SWEPT[kind], "seeds": (0,)}
        else:
            numbers = {"learning_rates": (RATES[kind],), "seeds": (0, 1, 2)}
        common = {**site, "width": width(family, kind, model), "grid": True, **numbers, **options}
        if not l1_coefficients:
            for k in L0[1:2] if "rates" in words else L0:
                config.stacks[f"{kind}_{k}"] = stack_config(architecture, k=k, **common)
        else:
            config.stacks[kind] = stack_config(architecture, l1_coefficients=l1_coefficients, **common)
    return config
