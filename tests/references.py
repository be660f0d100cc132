"""Float64 NumPy from the paper's equations and TransformerLens' documentation, not from the code under test."""

import numpy as np
import scipy.special

PENALTIES = {  # of z >= 0 and a scale: (value, slope)
    "l1": lambda z, c: (z, np.ones_like(z)),
    "tanh": lambda z, c: (np.tanh(c * z) / c, 1 / np.cosh(c * z) ** 2),
    "log": lambda z, c: (np.log(1 + c * z) / c, 1 / (1 + c * z)),
}


def gated_sae(params, x, l1, tie=True, r_mag=True, freeze=True, penalty="l1", scale=1.0):
    """Loss and gradients of the Gated SAE (equations 3-8; Appendix G), by hand."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    B, D = x.shape
    W_gate, W_dec, b_dec = p["W_gate"], p["W_dec"], p["b_dec"]
    ratio = np.exp(p["r_mag"]) if tie and r_mag else np.ones(W_gate.shape[1])
    W_mag = W_gate * ratio if tie else p["W_mag"]
    c = x - b_dec
    pi_gate, pi_mag = c @ W_gate + p["b_gate"], c @ W_mag + p["b_mag"]
    on, above = pi_gate > 0, pi_mag > 0
    f, gate = on * np.maximum(pi_mag, 0), np.maximum(pi_gate, 0)
    error, gate_error = f @ W_dec + b_dec - x, gate @ W_dec + b_dec - x
    penalties, slopes = PENALTIES[penalty](gate, scale)
    loss = np.sum(error**2) / (B * D) + l1 * np.sum(penalties) / B + np.sum(gate_error**2) / (B * D)

    d_x_hat, d_x_gate = 2 * error / (B * D), 2 * gate_error / (B * D)
    d_pi_mag = (d_x_hat @ W_dec.T) * on * above
    d_pi_gate = (d_x_gate @ W_dec.T + l1 / B * slopes) * on
    grads = {"W_dec": f.T @ d_x_hat, "b_dec": d_x_hat.sum(0)}
    if not freeze:
        grads["W_dec"] += gate.T @ d_x_gate
        grads["b_dec"] += d_x_gate.sum(0)
    grads["b_dec"] -= (d_pi_gate @ W_gate.T + d_pi_mag @ W_mag.T).sum(0)
    grads |= {"b_gate": d_pi_gate.sum(0), "b_mag": d_pi_mag.sum(0)}
    if tie:
        grads["W_gate"] = c.T @ (d_pi_gate + d_pi_mag * ratio)
        grads["r_mag"] = (d_pi_mag * (c @ W_mag)).sum(0) if r_mag else np.zeros(W_gate.shape[1])
    else:
        grads |= {"W_gate": c.T @ d_pi_gate, "W_mag": c.T @ d_pi_mag}
    return loss, grads, f


def of_aligned(reference, encoder, params, x, l1, **options):
    """Loss and gradients of an SAE whose encoder is aligned with its decoder, from a reference of the plain SAE."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    w, d = p[encoder].T, p["W_dec"]

    def dot(a, b):
        return (a * b).sum(1, keepdims=True)

    gap, square = 1 - dot(w, d), dot(d, d)
    loss, grads, f = reference(p | {encoder: (w + gap / square * d).T}, x, l1, **options)
    d_w = grads[encoder].T
    along = dot(d_w, d) / square
    grads[encoder] = (d_w - along * d).T
    grads["W_dec"] = grads["W_dec"] + gap / square * d_w - along * w - 2 * gap / square * along * d
    return loss, grads, f


def signed_gated_sae(params, x, l1):
    """Loss and gradients of the sign-aware gated SAE, by hand."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    B, D = x.shape
    W_gate, W_dec, b_dec, ratio = p["W_gate"], p["W_dec"], p["b_dec"], np.exp(p["r_mag"])
    c = x - b_dec
    z = c @ W_gate
    sign, pi_gate, pi_mag = np.sign(z), np.abs(z) + p["b_gate"], ratio * np.abs(z) + p["b_mag"]
    on, above = pi_gate > 0, pi_mag > 0
    f, gate = sign * on * np.maximum(pi_mag, 0), sign * np.maximum(pi_gate, 0)
    error, gate_error = f @ W_dec + b_dec - x, gate @ W_dec + b_dec - x
    loss = np.sum(error**2) / (B * D) + l1 * np.sum(np.abs(gate)) / B + np.sum(gate_error**2) / (B * D)

    d_x_hat, d_x_gate = 2 * error / (B * D), 2 * gate_error / (B * D)
    d_pi_mag = sign * (d_x_hat @ W_dec.T) * on * above
    d_pi_gate = (sign * (d_x_gate @ W_dec.T) + l1 / B) * on
    d_z = sign * (d_pi_gate + d_pi_mag * ratio)
    grads = {"W_gate": c.T @ d_z, "W_dec": f.T @ d_x_hat, "b_dec": d_x_hat.sum(0) - (d_z @ W_gate.T).sum(0)}
    grads |= {"b_gate": d_pi_gate.sum(0), "b_mag": d_pi_mag.sum(0)}
    return loss, grads | {"r_mag": (d_pi_mag * ratio * np.abs(z)).sum(0)}, f


def relu_sae(params, x, l1):
    """Loss and gradients of the baseline SAE (equations 1-2), by hand."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    B, D = x.shape
    c = x - p["b_dec"]
    f = np.maximum(c @ p["W_enc"] + p["b_enc"], 0)
    error = f @ p["W_dec"] + p["b_dec"] - x
    d_x_hat = 2 * error / (B * D)
    d_pi = (d_x_hat @ p["W_dec"].T + l1 / B) * (f > 0)
    grads = {"W_dec": f.T @ d_x_hat, "W_enc": c.T @ d_pi, "b_enc": d_pi.sum(0)}
    grads["b_dec"] = d_x_hat.sum(0) - (d_pi @ p["W_enc"].T).sum(0)
    return np.sum(error**2) / (B * D) + l1 * np.sum(f) / B, grads, f


def largest(values, k, of_batch=False):
    """Which of the values are the k largest of a row, or the len(values) * k largest of all, by a stable sort."""
    rows = values.reshape(1, -1) if of_batch else values
    n = k * len(values) if of_batch else k
    on = np.zeros(rows.shape, bool)
    np.put_along_axis(on, np.argsort(-rows, axis=1, kind="stable")[:, :n], True, axis=1)
    return on.reshape(values.shape) & (values > 0)


def auxk(values, residual, W_dec, dead, k):
    """AuxK (2406.04093, appendix A.2) over the residual's variance, and its gradients by values and by W_dec."""
    g = values * dead * largest(values * dead, k)
    variance = np.square(residual - residual.mean(0)).mean()
    error = g @ W_dec - residual
    d_error = 2 * error / error.size / variance
    return np.square(error).mean() / variance, (d_error @ W_dec.T) * (g > 0), g.T @ d_error


def topk_sae(params, x, k, of_batch=False, sizes=(), dead=None, k_aux=0, weight=0.0):
    """Loss, gradients and features of TopK, BatchTopK and, with sizes of prefixes, Matryoshka SAEs, by hand."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    W_dec, c = p["W_dec"], x - p["b_dec"]
    pi = np.maximum(c @ p["W_enc"] + p["b_enc"], 0)
    f = pi * largest(pi, k, of_batch)
    loss, d_f, d_W_dec, d_b_dec = 0.0, np.zeros_like(f), np.zeros_like(W_dec), 0.0
    for size in sizes or (len(W_dec),):
        error = f[:, :size] @ W_dec[:size] + p["b_dec"] - x
        d_x_hat = 2 * error / error.size
        loss += np.square(error).mean()
        d_f[:, :size] += d_x_hat @ W_dec[:size].T
        d_W_dec[:size] += f[:, :size].T @ d_x_hat
        d_b_dec = d_b_dec + d_x_hat.sum(0)
    d_pi = d_f * (f > 0)
    if weight:
        value, by_values, by_W_dec = auxk(pi, -error, W_dec, dead, k_aux)
        loss, d_pi, d_W_dec = loss + weight * value, d_pi + weight * by_values, d_W_dec + weight * by_W_dec
    grads = {"W_dec": d_W_dec, "W_enc": c.T @ d_pi, "b_enc": d_pi.sum(0)}
    grads["b_dec"] = d_b_dec - (d_pi @ p["W_enc"].T).sum(0)
    return loss, grads, f


def jumprelu_sae(params, x, coefficient, bandwidth):
    """Loss and gradients of the JumpReLU SAE (arXiv 2407.14435, equations 9 to 12), by hand; `bandwidth` as in use."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    B, D = x.shape
    theta, pi = np.maximum(p["threshold"], 0), np.maximum(x @ p["W_enc"] + p["b_enc"], 0)
    on, kernel = pi > theta, (np.abs(pi - theta) < bandwidth / 2) * (pi > 0) / bandwidth
    f = pi * on
    error = f @ p["W_dec"] + p["b_dec"] - x
    d_x_hat = 2 * error / (B * D)
    d_f = d_x_hat @ p["W_dec"].T
    d_pi = d_f * on
    grads = {"W_dec": f.T @ d_x_hat, "b_dec": d_x_hat.sum(0), "W_enc": x.T @ d_pi, "b_enc": d_pi.sum(0)}
    grads["threshold"] = -(kernel * (theta * d_f + coefficient / B)).sum(0)
    return np.sum(error**2) / (B * D) + coefficient * on.sum() / B, grads, f


def relu_april_sae(params, x, coefficient):
    """Loss and gradients of the ReLU SAE of April 2024, by hand: the penalty weighs features by their rows' norms."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    B, D = x.shape
    norms = np.linalg.norm(p["W_dec"], axis=1)
    pi = x @ p["W_enc"] + p["b_enc"]
    f = np.maximum(pi, 0)
    error = f @ p["W_dec"] + p["b_dec"] - x
    d_x_hat = 2 * error / (B * D)
    d_pi = (d_x_hat @ p["W_dec"].T + coefficient / B * norms) * (pi > 0)
    d_norms = coefficient / B * f.sum(0)
    grads = {"W_dec": f.T @ d_x_hat + (d_norms / norms)[:, None] * p["W_dec"], "b_dec": d_x_hat.sum(0)}
    grads |= {"W_enc": x.T @ d_pi, "b_enc": d_pi.sum(0)}
    return np.sum(error**2) / (B * D) + coefficient * (f @ norms).mean(), grads, f


def gelu_lm(tensors, config, tokens, replace=None):
    """Logits and every site of a TransformerLens GELU model; `replace` maps sites to other values."""
    t = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    found = {}

    def site(name, x):
        found[name] = np.broadcast_to((replace or {}).get(name, x), x.shape)
        return found[name]

    def layer_norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"]) * t[f"{name}.w"] + t[f"{name}.b"]

    T = tokens.shape[1]
    x = t["embed.W_E"][tokens] + t["pos_embed.W_pos"][:T]
    for layer in range(config["n_layers"]):
        b = f"blocks.{layer}"
        x = site(f"{b}.hook_resid_pre", x)
        normed = layer_norm(x, f"{b}.ln1")
        q, k, v = (
            np.einsum("btd,hdk->bhtk", normed, t[f"{b}.attn.W_{n}"]) + t[f"{b}.attn.b_{n}"][:, None] for n in "QKV"
        )
        scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(config["d_head"])
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        z = (weights / weights.sum(-1, keepdims=True)) @ v
        z = site(f"{b}.attn.hook_z", np.concatenate([z[:, head] for head in range(config["n_heads"])], axis=-1))
        W_O = np.concatenate(list(t[f"{b}.attn.W_O"]))
        x = site(f"{b}.hook_resid_mid", x + site(f"{b}.hook_attn_out", z @ W_O + t[f"{b}.attn.b_O"]))
        pre = layer_norm(x, f"{b}.ln2") @ t[f"{b}.mlp.W_in"] + t[f"{b}.mlp.b_in"]
        post = site(f"{b}.mlp.hook_post", pre * 0.5 * (1 + scipy.special.erf(pre / np.sqrt(2))))
        out = site(f"{b}.hook_mlp_out", post @ t[f"{b}.mlp.W_out"] + t[f"{b}.mlp.b_out"])
        x = site(f"{b}.hook_resid_post", x + out)
    return layer_norm(x, "ln_final") @ t["unembed.W_U"] + t["unembed.b_U"], found


def assert_same_support(f, theirs, x, form):
    """One feature in 100,000 that fire may be off in the other; its activation is within rounding of the threshold.

    `form` has the SAE's parameters in the JumpReLU form.
    """
    W_enc, b_enc, threshold = (np.asarray(form[name], np.float64) for name in ("W_enc", "b_enc", "threshold"))
    x, differ = np.asarray(x, np.float64), (f > 0) != (theirs > 0)
    distance = np.abs(x @ W_enc + b_enc[None] - threshold[None])
    rounding = 1e-6 * np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(W_enc, axis=0)[None]
    assert differ.sum() <= 1e-5 * (f > 0).sum()
    assert (distance <= rounding)[differ].all()
