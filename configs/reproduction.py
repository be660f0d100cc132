"""The paper's comparison at one site: gated SAEs, baselines 1.5 times as wide, and ablations.

    python -m gsae_jax.train --config configs/reproduction.py:blocks.0.hook_mlp_out \
        --workdir runs/reproduction/blocks.0.hook_mlp_out
    python -m gsae_jax.train --config configs/reproduction.py:blocks.0.hook_mlp_out,ablations \
        --workdir runs/reproduction/blocks.0.hook_mlp_out_ablations

The first command trains both architectures at two learning rates. There are three seeds at 2.4e-2, the best rate of
a first sweep (at 4.8e-2, training fails for both). The report compares each architecture at its best rate. The second
command trains what lies between a baseline and a gated SAE, at 1.2e-2 and with three seeds. Rescale and shift (section
5.2) starts from the baselines of such a run:
`blocks.0.hook_mlp_out,from=runs/reproduction/blocks.0.hook_mlp_out_ablations`.

The word `tinystories`, as in `blocks.1.hook_resid_post,tinystories`, is for sites of the model of
configs/tinystories.py. A number is of steps of training. With it there are three seeds at 1.2e-2, which a first run of
14,000 steps found best for gated SAEs, and one at 2.4e-2. The word `lower` is for one seed at 6e-3 in place of these.
`width=4096` is for gated SAEs of that width and baselines 1.5 times as wide.
"""

from configs import quickstart, tinystories
from gsae_jax import stack_config
from gsae_jax.errors import UserError

WIDTHS = {"embedded": (1024, 1536), "tinystories": (512, 768)}  # gated and baseline: four and six times d_model
# Chosen for a loss recovered from 0.8 to 0.95.
L1 = {
    "embedded": {
        "blocks.0.hook_mlp_out": {"gated": (2e-3, 8e-3, 1.5e-2, 2.6e-2), "relu": (1.2e-3, 3e-3, 6e-3, 1.2e-2)},
        "blocks.0.hook_resid_post": {"gated": (4e-3, 1e-2, 1.8e-2, 3e-2), "relu": (2e-3, 5e-3, 9e-3, 1.4e-2)},
        "blocks.0.attn.hook_z": {"gated": (4e-3, 1.5e-2, 5e-2, 1e-1), "relu": (2e-3, 8e-3, 2e-2, 4e-2)},
        "blocks.0.mlp.hook_post": {"gated": (1.5e-3, 4e-3, 8e-3, 1.6e-2), "relu": (6e-4, 2e-3, 4e-3, 8e-3)},
    },
    "tinystories": {
        "blocks.0.attn.hook_z": {"gated": (4e-3, 1.5e-2, 4e-2, 8e-2), "relu": (2e-3, 8e-3, 2e-2, 4e-2)},
        "blocks.0.hook_mlp_out": {"gated": (1e-2, 3e-2, 6e-2, 1e-1), "relu": (4e-3, 1.2e-2, 2.5e-2, 4e-2)},
        "blocks.0.hook_resid_post": {"gated": (8e-3, 2e-2, 4e-2, 8e-2), "relu": (4e-3, 9e-3, 2e-2, 3.5e-2)},
        "blocks.1.attn.hook_z": {"gated": (4e-3, 1.5e-2, 4e-2, 8e-2), "relu": (2e-3, 8e-3, 2e-2, 4e-2)},
        "blocks.1.hook_mlp_out": {"gated": (4e-3, 1e-2, 2e-2, 4e-2), "relu": (2e-3, 4e-3, 8e-3, 1.6e-2)},
        "blocks.1.hook_resid_post": {"gated": (4e-3, 1e-2, 1.8e-2, 3e-2), "relu": (2e-3, 5e-3, 9e-3, 1.8e-2)},
    },
}
# Learning rates and seeds.
RATES = ((1.2e-2, 0), (2.4e-2, 0), (2.4e-2, 1), (2.4e-2, 2))
# Of these, with the first three λ.
ABLATED = ((1.2e-2, 0), (1.2e-2, 1), (1.2e-2, 2))
LONGER = (*ABLATED, (2.4e-2, 0))
LOWER = ((6e-3, 0),)
ABLATIONS = {
    "no_r_mag": {"use_r_mag": False},
    "untied": {"tie_encoder": False},
    "unfrozen": {"freeze_aux_decoder": False},
    "untied_unfrozen": {"tie_encoder": False, "freeze_aux_decoder": False},
}


def parts(which, known, words, values=()):
    """What stands after the colon: (site, model, steps or 0, words, values by name).

    Args:
        which: a site, and words after it, separated by commas.
        known: by model, the sites.
        words: that may stand after the site.
        values: names that may stand there with `=` and a value.
    """
    site, *given = which.split(",")
    model = "tinystories" if "tinystories" in given else "embedded"
    if site not in known[model]:
        others = next((f"; `{site},{m}` is of {m}" for m in known if site in known[m]), "")
        raise UserError(f"has {site!r}; write one of {', '.join(known[model])} after the colon{others}")
    found = {}
    for word in (word for word in given if word != "tinystories"):
        name, _, value = word.partition("=")
        kind = "steps" if word.isdecimal() else name
        if not (int(word) if word.isdecimal() else value if name in values else word in words):
            choices = ", ".join(("tinystories", "a number of steps", *words, *(f"{each}=..." for each in values)))
            raise UserError(f"has {word!r}; write any of {choices} after the site")
        if kind in found:
            raise UserError(f"has {word!r} and {found[kind]!r}; write one of them")
        found[kind] = word
    steps = int(found.pop("steps", 0))
    return site, model, steps, set(found) & {*words}, {k: found[k].partition("=")[2] for k in values if k in found}


def rates(steps, words):
    """The learning rates and seeds for a number of steps."""
    return LOWER if "lower" in words else LONGER if steps else RATES


def get_config(which="blocks.0.hook_mlp_out"):
    site, model, steps, words, values = parts(which, L1, ("lower", "ablations"), ("from", "width"))
    run = values.get("from")
    if len(words | values.keys()) > 1 or (steps and (run or "ablations" in words)):
        alone = (
            "`lower` and `width=` also take a number of steps, but no other word; `ablations` and `from=` stand alone"
        )
        raise UserError(f"has words that do not go together: {which}. {alone}")
    width, wide = WIDTHS[model]
    if "width" in values:
        if not values["width"].isdecimal() or int(values["width"]) < 2:
            raise UserError(f"has width={values['width']}; write a number of features, such as width=4096")
        width = int(values["width"])
        wide = width * 3 // 2

    def stack(architecture, width, members=ABLATED, **options):
        """SAEs of an architecture, for each λ with these learning rates and seeds."""
        chosen = L1[model][site][architecture][: 3 if members is ABLATED else None]
        l1_coefficients, learning_rates, seeds = zip(*((l1, *each) for each in members for l1 in chosen), strict=True)
        # Zero biases, as inputs are not centred.
        start = {} if "start_from" in options else {"initial_l0": 0}
        settings = {"learning_rates": learning_rates, "seeds": seeds} | start | options
        return stack_config(architecture, site, width, l1_coefficients, **settings)

    config = (quickstart if model == "embedded" else tinystories).get_config()
    config.activations.center = False  # the paper's units, for which the l1 coefficients above are chosen
    config.evaluation.tokens = 2**17
    config.train.steps = steps or config.train.steps
    config.stacks = {}
    if run:
        for name, size in (("baseline", wide), ("baseline_narrow", width)):
            rescaled = stack("gated", size, only_magnitude=True, start_from=f"{run}:{name}")
            rescaled.l1_coefficients = stack("relu", size).l1_coefficients  # those of the baselines
            config.stacks[name.replace("baseline", "rescaled")] = rescaled
        config.train.steps = 400
    elif "ablations" in words:
        config.stacks.gated = stack("gated", width)
        for name, options in ABLATIONS.items():
            config.stacks[name] = stack("gated", width, **options)
        config.stacks.baseline = stack("relu", wide)
        config.stacks.baseline_narrow = stack("relu", width)
    else:
        config.stacks.gated = stack("gated", width, rates(steps, words))
        config.stacks.baseline = stack("relu", wide, rates(steps, words))
    return config
