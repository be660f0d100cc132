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


def gated_batch_topk_sae(params, x, k, dead, k_aux, weight):
    """Loss, gradients, features and selected gates of the gated SAE whose gates BatchTopK opens, by hand."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = np.asarray(x, np.float64)
    W_gate, W_dec, ratio, c = p["W_gate"], p["W_dec"], np.exp(p["r_mag"]), x - p["b_dec"]
    pi_gate, pi_mag = np.maximum(c @ W_gate + p["b_gate"], 0), c @ W_gate * ratio + p["b_mag"]
    gate = pi_gate * largest(pi_gate, k, of_batch=True)
    f = (gate > 0) * np.maximum(pi_mag, 0)
    error, gate_error = f @ W_dec + p["b_dec"] - x, gate @ W_dec + p["b_dec"] - x
    d_x_hat, d_x_gate = 2 * error / error.size, 2 * gate_error / error.size
    value, by_gates, by_W_dec = auxk(pi_gate, -error, W_dec, dead, k_aux)
    d_pi_mag = (d_x_hat @ W_dec.T) * (f > 0)
    d_pi_gate = (d_x_gate @ W_dec.T) * (gate > 0) + weight * by_gates
    grads = {"W_dec": f.T @ d_x_hat + weight * by_W_dec, "W_gate": c.T @ (d_pi_gate + d_pi_mag * ratio)}
    grads["b_dec"] = d_x_hat.sum(0) - (d_pi_gate @ W_gate.T + (d_pi_mag * ratio) @ W_gate.T).sum(0)
    grads |= {"b_gate": d_pi_gate.sum(0), "b_mag": d_pi_mag.sum(0), "r_mag": (d_pi_mag * (c @ W_gate) * ratio).sum(0)}
    return np.square(error).mean() + np.square(gate_error).mean() + weight * value, grads, f, gate


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


def transcoder(kind, params, x, t, l1=0.0, k=0, bandwidth=0.0):
    """Loss, gradients and features of a transcoder (2406.11944; with W_skip 2501.18823), by hand."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    B, W_dec = len(x), p["W_dec"]
    c = x if kind == "jumprelu" else x - p["b_in"]
    encoder = p["W_gate" if kind == "gated" else "W_enc"]
    z = c @ encoder
    penalty, d_penalty = 0.0, 0.0
    match kind:
        case "gated":
            ratio = np.exp(p["r_mag"])
            on, pi_mag = z + p["b_gate"] > 0, ratio * z + p["b_mag"]
            f, gate, slope = on * np.maximum(pi_mag, 0), np.maximum(z + p["b_gate"], 0), on * (pi_mag > 0)
        case "jumprelu":
            theta, pi = np.maximum(p["threshold"], 0), np.maximum(z + p["b_enc"], 0)
            slope = pi > theta
            f, penalty = pi * slope, l1 * slope.sum() / B
        case "relu":
            f = np.maximum(z + p["b_enc"], 0)
            slope, penalty, d_penalty = f > 0, l1 * f.sum() / B, l1 / B
        case _:
            pi = np.maximum(z + p["b_enc"], 0)
            slope = largest(pi, k, kind == "batch_topk")
            f = pi * slope
    offset = p["b_dec"] + (x @ p["W_skip"] if "W_skip" in p else 0)
    error = f @ W_dec + offset - t
    d_x_hat = 2 * error / error.size
    d_f = d_x_hat @ W_dec.T
    d_pi = (d_f + d_penalty) * slope
    loss = np.square(error).mean() + penalty
    grads = {"W_dec": f.T @ d_x_hat, "b_dec": d_x_hat.sum(0)} | ({"W_skip": x.T @ d_x_hat} if "W_skip" in p else {})
    if kind == "gated":
        gate_error = gate @ W_dec + offset - t
        d_gate = (2 * gate_error / error.size @ W_dec.T + l1 / B) * on
        loss += l1 * gate.sum() / B + np.square(gate_error).mean()
        grads |= {"b_gate": d_gate.sum(0), "b_mag": d_pi.sum(0), "r_mag": (d_pi * ratio * z).sum(0)}
        d_pi = d_gate + d_pi * ratio
    else:
        grads["b_enc"] = d_pi.sum(0)
    if kind == "jumprelu":
        kernel = (np.abs(pi - theta) < bandwidth / 2) * (pi > 0) / bandwidth
        return loss, grads | {"W_enc": c.T @ d_pi, "threshold": -(kernel * (theta * d_f + l1 / B)).sum(0)}, f
    name = "W_gate" if kind == "gated" else "W_enc"
    return loss, grads | {name: c.T @ d_pi, "b_in": -(d_pi @ encoder.T).sum(0)}, f


def crosscoder(kind, params, xs, l1=0.0, k=0, dead=None, k_aux=0, weight=0.0):
    """Loss, gradients and features of a crosscoder (Lindsey et al. 2024), by hand.

    The penalty is of each feature times the sum of its rows' norms, and squared errors are divided by a site's width.
    """
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    xs, B, S = [np.asarray(x, np.float64) for x in xs], len(xs[0]), range(len(xs))
    name = "W_gate" if kind == "gated" else "W_enc"
    encoders, decoders, biases = ([p[f"{part}_{s}"] for s in S] for part in (name, "W_dec", "b_dec"))
    lengths = [np.linalg.norm(W, axis=1) for W in decoders]
    n = sum(lengths)
    cs = [x - b for x, b in zip(xs, biases, strict=True)]
    z = sum(c @ W for c, W in zip(cs, encoders, strict=True))

    def errors(f):
        of_sites = [f @ decoders[s] + biases[s] - xs[s] for s in S]
        return of_sites, sum(np.square(e).mean() for e in of_sites), [2 * e / e.size for e in of_sites]

    grads, d_n = {}, np.zeros_like(n)
    if kind == "gated":
        ratio = np.exp(p["r_mag"])
        on, pi_mag = z + p["b_gate"] > 0, ratio * z + p["b_mag"]
        f, gate, slope = on * np.maximum(pi_mag, 0), np.maximum(z + p["b_gate"], 0), on * (pi_mag > 0)
    else:
        pi = np.maximum(z + p["b_enc"], 0)
        slope = pi > 0 if kind == "relu" else largest(n * pi, k, of_batch=True)
        f = pi * slope
    of_sites, loss, d_x_hats = errors(f)
    d_pi = sum(d_x_hats[s] @ decoders[s].T for s in S) * slope
    d_decoders = [f.T @ d for d in d_x_hats]
    if kind == "relu":
        loss, d_pi, d_n = loss + l1 * (n * f).sum() / B, d_pi + l1 * n / B * slope, l1 * f.sum(0) / B
    if kind == "gated":
        _, auxiliary, d_gate_hats = errors(gate)
        loss += auxiliary + l1 * (n * gate).sum() / B
        # Of n * gate; the rows over n, by which it reconstructs, are frozen.
        d_weighted = sum(d_gate_hats[s] @ (decoders[s] / n[:, None]).T for s in S) + l1 / B
        d_gate, d_n = n * d_weighted * on, (gate * d_weighted).sum(0)
        grads = {"b_gate": d_gate.sum(0), "b_mag": d_pi.sum(0), "r_mag": (d_pi * ratio * z).sum(0)}
        d_pi = d_gate + d_pi * ratio
    if weight:
        scales = [np.sqrt(sum(x.shape[1] for x in xs) / x.shape[1]) for x in xs]
        residual = np.concatenate([-a * e for a, e in zip(scales, of_sites, strict=True)], 1)
        rows = np.concatenate([a * W for a, W in zip(scales, decoders, strict=True)], 1)
        value, by_values, by_rows = auxk(n * pi, residual, rows / n[:, None], dead, k_aux)
        loss, d_pi = loss + weight * value, d_pi + weight * n * by_values
        parts = np.split(by_rows / n[:, None], np.cumsum([x.shape[1] for x in xs])[:-1], 1)
        d_decoders = [d + weight * a * part for d, a, part in zip(d_decoders, scales, parts, strict=True)]
    if kind != "gated":
        grads["b_enc"] = d_pi.sum(0)
    for s in S:
        grads[f"W_dec_{s}"] = d_decoders[s] + (d_n / lengths[s])[:, None] * decoders[s]
        grads[f"b_dec_{s}"] = d_x_hats[s].sum(0) - (d_pi @ encoders[s].T).sum(0)
        grads[f"{name}_{s}"] = cs[s].T @ d_pi
    return loss, grads, f


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
        normed = site(f"{b}.ln2.hook_normalized", layer_norm(x, f"{b}.ln2"))
        pre = normed @ t[f"{b}.mlp.W_in"] + t[f"{b}.mlp.b_in"]
        post = site(f"{b}.mlp.hook_post", pre * 0.5 * (1 + scipy.special.erf(pre / np.sqrt(2))))
        out = site(f"{b}.hook_mlp_out", post @ t[f"{b}.mlp.W_out"] + t[f"{b}.mlp.b_out"])
        x = site(f"{b}.hook_resid_post", x + out)
    return layer_norm(x, "ln_final") @ t["unembed.W_U"] + t["unembed.b_U"], found


def assert_same_support(f, theirs, x, form):
    """One feature in 100,000 that fire may be off in the other; its activation is within rounding of the threshold.

    `form` has the parameters in the JumpReLU form, the thresholds for all tokens [F] or for each [B, 1].
    """
    W_enc, b_enc, threshold = (np.asarray(form[name], np.float64) for name in ("W_enc", "b_enc", "threshold"))
    x, differ = np.asarray(x, np.float64), (f > 0) != (theirs > 0)
    distance = np.abs(x @ W_enc + b_enc[None] - threshold)
    rounding = 1e-6 * np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(W_enc, axis=0)[None]
    assert differ.sum() <= 1e-5 * (f > 0).sum()
    assert (distance <= rounding)[differ].all()
