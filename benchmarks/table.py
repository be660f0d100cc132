"""The results as Markdown: a table for each file, with the command that measured it, the machine and the commit.

    python benchmarks/table.py [FILE ...] [--write docs/benchmarks.md]

Takes all of `benchmarks/results` where no files are named, and prints where no file is to be written.
"""

import argparse
import json
from pathlib import Path

HEAD = """# Benchmarks

Written by `python benchmarks/table.py --write docs/benchmarks.md`. The top of each command's file says what it
measures and how.

## Your GPU

`python benchmarks/accelerator.py` measures one NVIDIA GPU in eight minutes, from a clone and without a network: the
tests marked `gpu`, dense and sparse steps with their memory, the whole pipeline with a language model of GPT-2 small's
size, and SAELens and dictionary_learning where they are installed. It needs the packages of `setup.py` with
`jax[cuda13]` and pytest, but not Grain, TensorFlow Datasets, ml_collections and tensorboardX.

**No GPU has been measured yet**: the command was tested on a CPU only (`--platform=cpu`). If you have one, please send
the JSON file whose name it prints, in a pull request that adds it to `benchmarks/results`, or in an issue.
"""
MILLISECONDS, MEBIBYTES = ("{:,.1f} ms", 1e3), ("{:,.0f} MiB", 2**-20)
COLUMNS = {  # key of a result -> title, form, factor; others stand as they are
    "step_seconds": ("a step", *MILLISECONDS),
    "call_seconds": ("a call", *MILLISECONDS),
    "times_ours": ("times ours", "{:.2f}", 1),
    "activations_per_second": ("activations/s", "{:,.0f}", 1),
    "of_product_rate": ("of the products' rate", "{:.0%}", 1),
    "of_whole": ("of the whole", "{:.1%}", 1),
    "product_flops_per_second": ("the products' rate", "{:,.0f} GFLOP/s", 1e-9),
    "bytes_per_parameter": ("bytes a parameter", "{:.2f}", 1),
    "products": ("in encoder products", "{:.2f}", 1),
    "times_faster": ("times faster", "{:.2f}", 1),
    "seconds": ("took", "{:.2f} s", 1),
    "error": ("largest error", "{:.1e}", 1),
    "peak_bytes": ("allocated at most", *MEBIBYTES),
    "planned_bytes": ("by the compiler", *MEBIBYTES),
    "estimated_bytes": ("by the planner's estimate", *MEBIBYTES),
    "bytes_of_arguments": ("arguments", *MEBIBYTES),
    "bytes_of_temporaries": ("temporaries", *MEBIBYTES),
    "every": ("steps between saves", "{}", 1),
    "megabytes": ("size", "{:,.0f} MB", 1),
    "megabytes_per_second": ("MB/s", "{:,.0f}", 1),
    "reading": ("reading costs", "{:+.1%}", 1),
    "throughput": ("of the throughput without", "{:.1%}", 1),
    "throughput_low": ("at least", "{:.1%}", 1),
    "throughput_high": ("at most", "{:.1%}", 1),
    "cost_seconds": ("a save costs", *MILLISECONDS),
    "wait_seconds": ("the loop waits", *MILLISECONDS),
    "whole_seconds": ("whole after", *MILLISECONDS),
    "active": ("active", "{:.0f}", 1),
    "forward_share": ("the forward pass of runs of one", "{:.0%}", 1),
    "apart_seconds": ("runs of one", *MILLISECONDS),
    "together_seconds": ("one run", *MILLISECONDS),
    "seconds_per_sae_and_activation": ("an SAE and activation", "{:.2f} us", 1e6),
    "times_cheaper": ("times cheaper", "{:.2f}", 1),
    "dense_seconds": ("dense", *MILLISECONDS),
    "sparse_seconds": ("sparse", *MILLISECONDS),
    "bytes_of_dense_temporaries": ("dense, temporaries", *MEBIBYTES),
    "bytes_of_sparse_temporaries": ("sparse, temporaries", *MEBIBYTES),
    "loss_recovered": ("loss recovered", "{:.4f}", 1),
    "l0": ("L0", "{:.1f}", 1),
    "collect": ("collecting", "{:.1f} s", 1),
    "measure": ("measuring", "{:.1f} s", 1),
    "ratio": ("ratio", "{:.2f}", 1),
    "peak_mib": ("peak", "{:,.0f} MiB", 1),
    "steps_meanwhile": ("steps meanwhile", "{:.0f}", 1),
}


def section(path):
    """A file's lines."""
    file = json.loads(path.read_text())
    facts, results = file["facts"], file["results"]
    devices, versions = facts["devices"], [name for name in ("jax", "torch", "python") if name in facts]
    on = [facts["machine"], facts["cpu"], f"{facts['cores']} cores", f"{len(devices)} x {devices[0]}"]
    on += [f"{name} {facts[name]}" for name in versions] + [f"commit {facts['commit']}"]
    yield from (f"## {path.stem}", "", f"`{facts['command']}`", "", f"On {', '.join(filter(None, on))}.", "")
    for name, rows in results.items() if isinstance(results, dict) else [("", results)]:
        if rows:
            yield from [f"### {name}", ""] if name else []
            yield from table(rows)
            yield ""
    for note in file["notes"]:
        yield from (note, "")


def table(rows):
    """The lines of a table; a row may lack what others have."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [(key, *COLUMNS.get(key, (key, "{}", 1))) for key in keys]
    yield f"| {' | '.join(title for _, title, _, _ in columns)} |"
    words = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    yield f"| {' | '.join('---' if key in words else '--:' for key in keys)} |"
    for row in rows:
        cells = (form.format(row[key] * factor) if row.get(key) is not None else "" for key, _, form, factor in columns)
        yield f"| {' | '.join(cells)} |"


def main():
    """Print or write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "files", type=Path, nargs="*", default=sorted(Path(__file__).with_name("results").glob("*.json"))
    )
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    text = "\n".join(line for path in arguments.files for line in section(path))
    if arguments.write:
        arguments.write.write_text(f"{HEAD}\n{text}")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
