"""The toy model of Appendix F: what a threshold of its own buys an activation function.

    python docs/toy_model.py    # seconds; writes docs/toy_model.png and prints the table

Editors that know `# %%` cells run it as a notebook.
"""

# %% [markdown]
# A feature is on in half of all inputs. The projection of an input on its direction is noise, a ~ N(0, 1), while it is
# off, and a ~ N(2, 1/4) while it is on. An SAE should give a while the feature is on, and 0 while it is off.
#
# ReLU(a - t) has one number for two jobs: t says below what the feature counts as off, and t is what is missing from
# the feature where it is on. JumpReLU gives a itself wherever a > t.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

SAMPLES = 1_000_000
for_on, for_noise = jax.random.split(jax.random.key(0))
on = jax.random.bernoulli(for_on, 0.5, (SAMPLES,))
noise = jax.random.normal(for_noise, (SAMPLES,))
a = jnp.where(on, 2 + 0.5 * noise, noise)
wanted = jnp.where(on, a, 0)

FUNCTIONS = {
    "ReLU(a - t)": lambda a, t: jax.nn.relu(a - t),
    "JumpReLU: a where a > t": lambda a, t: jnp.where(a > t, a, 0),
}


@jax.jit
def measured(features):
    """How often the feature fires while off, mean squared error, and gamma over the inputs where it is on."""
    gamma = jnp.square(features * on).sum() / (features * wanted).sum()
    return jnp.mean(features > 0, where=~on), jnp.square(features - wanted).mean(), gamma


# %% [markdown]
# At the same threshold both fire on the same inputs. The ReLU's reconstructions are too small by t.

# %%
thresholds = np.linspace(0, 1.6, 81)
curves = {name: np.array([measured(f(a, t)) for t in thresholds]) for name, f in FUNCTIONS.items()}
print("| function | t | fires while off | squared error | gamma while on |\n| --- | --: | --: | --: | --: |")
for name, curve in curves.items():
    for index in sorted({int(curve[:, 1].argmin()), 50}):
        off, error, gamma = curve[index]
        print(f"| {name} | {thresholds[index]:.2f} | {off:.1%} | {error:.3f} | {gamma:.3f} |")

# %% [markdown]
# Over all thresholds the least errors are nearly equal, because noise of deviation 1 exceeds any threshold that spares
# the feature. The difference is where they are: the ReLU has its own at a threshold so low that the feature fires on
# two fifths of the inputs where it is off. Ask for sparse firing, as an SAE does, and only the JumpReLU keeps its
# error.

# %%
figure = Figure(figsize=(10, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
x = np.linspace(-2, 4, 1201)
for mean, deviation, label, colour in ((0, 1, "off", "0.5"), (2, 0.5, "on", "#448361")):
    density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation
    left.fill_between(x, density, alpha=0.2, color=colour, label=f"how often, while {label}")
for (name, f), colour in zip(FUNCTIONS.items(), ("#d9730d", "#0b6e99"), strict=True):
    left.plot(x, f(x, 1.0), color=colour, label=f"{name}, t = 1")
    right.plot(curves[name][:, 0], curves[name][:, 1], color=colour, label=name)
    right.plot(*curves[name][50, :2], "o", color=colour)
left.set(xlabel="projection a", ylabel="activation")
right.set(xlabel="fires while off (dots: t = 1)", ylabel="mean squared error", ylim=(0, None))
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
figure.savefig(Path("docs/toy_model.png"), dpi=120)
