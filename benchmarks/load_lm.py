"""Host memory while a checkpoint is loaded onto 8 devices: what is needed beside the parameters themselves.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/load_lm.py [--gigabytes 2]

(The setting has glibc give freed memory back at once; without it the heap's holes are counted too, some 2%.)

Writes a random Llama checkpoint in bfloat16 shards to a temporary directory and loads it in bfloat16 on 8 virtual CPU
devices, where device memory is host memory: the peak of this process' anonymous memory, less the parameters, is what
loading takes on a host whose parameters go to accelerators. (The files' own pages are mapped and can be dropped.)
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from gsae_jax import config, mesh
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.weights import INDEX

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

MB = 2**20
D, M, V, H, G = 2048, 5632, 32000, 32, 8


def write(folder: Path, layers: int) -> None:
    """A checkpoint of 4 layers a shard."""
    rng = np.random.default_rng(0)
    K = D // H
    weight_map = {}

    def save(name, shapes):
        tensors = {key: rng.standard_normal(shape, np.float32).astype("bfloat16") for key, shape in shapes.items()}
        safetensors.numpy.save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    save("model-0.safetensors", {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)})
    for start in range(0, layers, 4):
        shapes = {}
        for layer in range(start, min(start + 4, layers)):
            p = f"model.layers.{layer}."
            shapes |= {f"{p}input_layernorm.weight": (D,), f"{p}post_attention_layernorm.weight": (D,)}
            shapes |= {f"{p}self_attn.q_proj.weight": (H * K, D), f"{p}self_attn.o_proj.weight": (D, H * K)}
            shapes |= {f"{p}self_attn.{name}_proj.weight": (G * K, D) for name in "kv"}
            shapes |= {f"{p}mlp.{name}_proj.weight": (M, D) for name in ("gate", "up")}
            shapes |= {f"{p}mlp.down_proj.weight": (D, M)}
        save(f"model-{start + 1}.safetensors", shapes)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    settings = {"hidden_size": D, "intermediate_size": M, "vocab_size": V, "num_hidden_layers": layers}
    settings |= {"num_attention_heads": H, "num_key_value_heads": G, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def peak_while(work) -> tuple[object, int]:
    """(what `work()` returns, how far anonymous memory rose meanwhile)."""
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return result, max(peak, anonymous()) - before


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    layer = D * (2 * D + 2 * G * D // H + 3 * M) * 2
    layers = max(1, round((parser.parse_args().gigabytes * 2**30 - V * D * 2) / layer))
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), layers)
        checkpoint = Checkpoint.open(scratch)
        on = mesh.make_mesh(config.Mesh(data=4, latent=2))
        start = time.perf_counter()
        params, rise = peak_while(lambda: checkpoint.params(checkpoint.module(mesh=on), "bfloat16"))
        seconds = time.perf_counter() - start
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    print(
        f"{layers} layers, {size / MB:,.0f} MB of parameters, largest tensor {V * D * 2 / MB:,.0f} MB: memory rose by "
        f"{rise / MB:,.0f} MB, {(rise - size) / MB:,.0f} MB beside the parameters, in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
