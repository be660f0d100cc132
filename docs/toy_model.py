"""The toy model of Appendix F: the advantage of an activation function with a separate threshold.

    python docs/toy_model.py    # seconds; writes docs/toy_model.png and the table of docs/reproduction.md

Editors that know `# %%` cells run it as a notebook.
"""

# %% [markdown]
# A feature is on in half of all inputs. The projection of an input on the feature's direction is a ~ N(2, 1/4) if the
# feature is on, and noise, a ~ N(0, 1), if it is off. An SAE should return a if the feature is on, and 0 if it is off.
#
# In ReLU(a - t), the same t is the threshold and is subtracted from the feature when it is on. JumpReLU returns a
# itself if a > t.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import results
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
    """How often the feature fires when off, the mean squared error, and gamma over inputs where the feature is on."""
    gamma = jnp.square(features * on).sum() / (features * wanted).sum()
    return jnp.mean(features > 0, where=~on), jnp.square(features - wanted).mean(), gamma


# %% [markdown]
# With the same threshold, both functions fire on the same inputs. The ReLU's reconstructions are too small by t.

# %%
thresholds = np.linspace(0, 1.6, 81)
curves = {name: np.array([measured(f(a, t)) for t in thresholds]) for name, f in FUNCTIONS.items()}
rows = []
for name, curve in curves.items():
    for index in sorted({int(curve[:, 1].argmin()), 50}):
        off, error, gamma = curve[index]
        rows.append((name, f"{thresholds[index]:.2f}", f"{off:.1%}", f"{error:.3f}", f"{gamma:.3f}"))
columns = ["Function", "t", "Fires when off", "Squared error", "γ when on"]
results.write(Path("docs/reproduction.md"), {"toy_model": results.table(columns, rows)})

# %% [markdown]
# Over all thresholds, the smallest errors are nearly equal, because noise with deviation 1 often exceeds a threshold
# that is low enough for the feature. However, the ReLU reaches its smallest error with a threshold so low that the
# feature fires on two fifths of the inputs where it is off. An SAE has to fire sparsely. Then only the JumpReLU has a
# small error.

# %%
figure = Figure(figsize=(10, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
x = np.linspace(-2, 4, 1201)
for mean, deviation, label, colour in ((0, 1, "off", "0.5"), (2, 0.5, "on", "#448361")):
    density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation / np.sqrt(2 * np.pi)
    left.fill_between(x, density, alpha=0.2, color=colour, label=f"density when {label}")
for (name, f), colour in zip(FUNCTIONS.items(), ("#d9730d", "#0b6e99"), strict=True):
    left.plot(x, f(x, 1.0), color=colour, label=f"{name}, t = 1")
    right.plot(curves[name][:, 0], curves[name][:, 1], color=colour, label=name)
    right.plot(*curves[name][50, :2], "o", color=colour)
left.set(xlabel="projection a", ylabel="activation; density")
right.set(ylabel="mean squared error", ylim=(0, None))
right.set_xlabel("fraction of inputs where it fires when off (dots: t = 1)")
for axis in (left, right):
    axis.legend(fontsize=10)
    axis.grid(alpha=0.25)
figure.savefig(Path("docs/toy_model.png"), dpi=120)
