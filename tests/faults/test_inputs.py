"""Whatever is damaged or hostile in what a user hands over either works or is refused in one sentence.

Many mutants of every kind, and the table that docs/reliability.md shows:

python -m pytest -n 0 -m faults tests/faults/test_inputs.py
"""

import collections
import contextlib
import gc
import io
import json
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from absl import flags

import gsae_jax
from configs import base
from gsae_jax import cli
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax import workdir as workdir_lib
from gsae_jax.config import ConfigError, Experiment
from gsae_jax.data.corpora import text
from gsae_jax.evaluation import plots, report
from gsae_jax.lms import loading
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.weights import INDEX, WEIGHTS
from gsae_jax.training import loop
from tests.conftest import tiny
from tests.faults import mutants
from tests.fixtures.lms import make

LMS = Path(make.__file__).parent
SITE = "blocks.0.hook_mlp_out"
FEW, MANY = 8, 200  # mutants of each kind
SECONDS = 60  # for one of them
MEMORY = 256 * 2**20  # bytes that one of them may take; its files are smaller than 2**20


# Of orbax, where it cannot read one of several files.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.fixture(scope="module")
def originals(tmp_path_factory, text_dir, lm_dir):
    """The folders that mutants are made of, by what they hold."""
    root = tmp_path_factory.mktemp("originals")
    config = tiny(text_dir, lm_dir, root / "tfds")
    config.stacks.gated.l1_coefficients, config.stacks.gated.seeds = (0.01,), (0,)
    config.train.steps = 8  # one checkpoint: there is none to go back to
    loop.train(config_lib.from_dict(Experiment, config), root / "run")
    for name in ("config", "override", "text", "published"):
        (root / name).mkdir()
    (root / "config" / "config.json").write_text(json.dumps(config.to_dict()))
    documents = [f"document {number} é " * 20 for number in range(60)]
    table = pyarrow.table({"text": documents, "id": range(60)})
    pyarrow.parquet.write_table(table, root / "text" / "a.parquet", row_group_size=20)
    lines = [json.dumps({"text": document, "id": [1, {"a": None}]}) for document in documents]
    (root / "text" / "a.jsonl").write_text("\n".join(lines))
    (root / "text" / "a.txt").write_text("\n".join(documents))
    rows = [f"someone,relu,{site},0,{l0},0.9,0.8" for site in ("mlp", SITE) for l0 in (10.5, 20, 40)]
    (root / "published" / "points.csv").write_text(
        "\n".join(["model,architecture,site,layer,l0,loss_recovered,gamma", *rows])
    )
    lms = [lm_dir, *(folder for folder in sorted(LMS.iterdir()) if (folder / "config.json").exists())]
    sharded = [folder for folder in lms if (folder / INDEX).exists()]
    whole = [folder for folder in lms if (folder / WEIGHTS).exists()]
    folders = {name: [root / name] for name in ("config", "override", "text", "published", "run")}
    return folders | {"lm": lms, "sharded": sharded, "whole": whole}


def an_edit(name, mutate):
    def damage(draw, folder):
        (folder / name).write_bytes(mutate(draw, (folder / name).read_bytes()))

    return damage


def a_line(mutate):
    def damaged(draw, content):
        lines = content.split(b"\n")
        number = draw.randrange(len(lines) - 1)
        lines[number] = mutate(draw, lines[number])
        return b"\n".join(lines)

    return damaged


def a_tree(draw, content):
    return json.dumps(mutants.tree(draw, json.loads(content))).encode()


def an_override(draw, folder):
    tree = base.get_config().to_dict() | {"stacks": {"a": base.stack("gated", SITE, 64, (0.1,)).to_dict()}}
    path = ".".join(map(str, draw.choice(mutants.paths(tree))))
    path = draw.choice((path,) * 6 + (f"{path}.x", f"{path}[0]", path[1:], f"{path}.", "__class__", "to_dict"))
    values = [repr(value) for value in mutants.VALUES if value is not mutants.DEEP]
    values += [
        "(1,",
        "abc",
        "1e999",
        "1_000",
        "0x10",
        "(0.1,0.2)",
        "[1,2]",
        "{'a':1}",
        "-" * 100_000 + "1",
        "[" * 10_000,
    ]
    (folder / "argument").write_text(f"--config.{path}={draw.choice(values)}", errors="replace")


def a_checkpoint_file(draw, folder):
    """Of which half have a manifest that says that all is as it should be, or none."""
    checkpoint = folder / "checkpoints" / "8"
    parts = [checkpoint.glob("*.*"), (checkpoint / "params").rglob("*"), (checkpoint / "facts").glob("*")]
    files = [[path for path in sorted(part) if path.is_file() and path.stat().st_size] for part in parts]
    file = draw.choice(draw.choice(files))
    content = file.read_bytes()
    is_json = content[:1] in b"{[" and file.suffix != ".ocdbt"
    file.write_bytes((mutants.json_file if is_json else mutants.file)(draw, content))
    manifest = checkpoint / workdir_lib.MANIFEST
    kind = draw.randrange(4)
    if kind == 0:
        manifest.unlink()
    elif kind < 3 and file != manifest:
        names = json.loads(manifest.read_text())["files"]
        files = {name: ((checkpoint / name).stat().st_size, digest(checkpoint / name)) for name in names}
        sealed = workdir_lib._digest(json.dumps(files, sort_keys=True).encode())
        manifest.write_text(json.dumps({"files": files, "digest": sealed}))


def digest(file):
    return workdir_lib._digest(file.read_bytes())


def use_config(folder):
    experiment = config_lib.from_dict(Experiment, json.loads((folder / "config.json").read_text()))
    mesh = mesh_lib.make_mesh(experiment.mesh)
    mesh_lib.check(experiment, mesh)
    loop.build(experiment, mesh, Checkpoint.open(experiment.lm.path, experiment.lm.revision))


def parsed(argument):
    values, argv = flags.FlagValues(), ["train", "--config=configs/quickstart.py", argument]
    config = cli.define_config(values, argv)
    cli.parse(argv, values)
    return config_lib.from_dict(Experiment, cli.given(config))


def use_override(folder):
    parsed((folder / "argument").read_text().replace("stacks.a.", "stacks.gated."))


def use_settings(folder):
    checkpoint = Checkpoint.open(folder)
    loading.site_widths(checkpoint.module())
    checkpoint.check()


def use_tokenizer(folder):
    tokenizer = Checkpoint.open(folder).tokenizer()
    tokenizer(["def main():  é", ""], add_special_tokens=False)
    loading.special_tokens(tokenizer)


def use_run(folder):
    gsae_jax.load(folder)
    workdir_lib.Workdir(folder).check(config_lib.to_dict(workdir_lib.Workdir(folder).experiment()))


def use_metrics(folder):
    figure = plots.training(workdir_lib.read_metrics(workdir_lib.Workdir(folder)))
    figure.set_layout_engine("none")  # which takes most of the time
    figure.draw_without_rendering()


def use_documents(file):
    def use(folder):
        for document in text.read_documents(str(folder / file), "text", ""):
            document.encode()

    return use


def use_published(folder):
    points = report.read_published(str(folder / "points.csv"))
    record = {"ito": 0, "site": SITE, "learning_rate": 0.1, "seed": 0, "variant": "gated", "width": 64, "gamma": 1.0}
    records = [record | {"name": f"a_{number}", "l0": 9.0 + number, "loss_recovered": 0.5} for number in range(2)]
    for figure in (plots.frontier(records, points), plots.gamma(records, points)):
        figure.savefig(io.BytesIO())


KINDS = {  # what it is made of, how it is damaged, what a command does with it
    "config of an experiment": ("config", an_edit("config.json", a_tree), use_config),
    "`--config.…=` argument": ("override", an_override, use_override),
    "language model's config.json": ("lm", an_edit("config.json", mutants.json_file), use_settings),
    "tokenizer.json": ("lm", an_edit("tokenizer.json", mutants.json_file), use_tokenizer),
    "tokenizer_config.json": ("lm", an_edit("tokenizer_config.json", mutants.json_file), use_tokenizer),
    "model.safetensors": ("whole", an_edit(WEIGHTS, mutants.safetensors_file), gsae_jax.load_lm),
    "model.safetensors.index.json": ("sharded", an_edit(INDEX, mutants.json_file), use_settings),
    "config.json of a run": ("run", an_edit("config.json", mutants.json_file), use_run),
    "checkpoint": ("run", a_checkpoint_file, use_run),
    "metrics.jsonl": ("run", an_edit("metrics.jsonl", a_line(mutants.json_file)), use_metrics),
    ".jsonl text": ("text", an_edit("a.jsonl", a_line(mutants.json_file)), use_documents("a.jsonl")),
    ".parquet text": ("text", an_edit("a.parquet", mutants.file), use_documents("a.parquet")),
    ".txt text": ("text", an_edit("a.txt", mutants.file), use_documents("a.txt")),
    "`--published` points": ("published", an_edit("points.csv", mutants.csv_file), use_published),
}


LENIENT = ("metrics.jsonl",)  # a line that says nothing is left out, with a warning: no figure is worth a run


def listing(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def bounded():
    """Within `SECONDS` and `MEMORY`; what asks for ever more memory ends before the machine's does."""

    def late(number, frame):
        raise TimeoutError(f"not done in {SECONDS} seconds")

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    limits, before = resource.getrlimit(resource.RLIMIT_AS), memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**33, limits[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert memory("VmHWM") - before < MEMORY


def works(use, *args):
    """Whether it does; what is refused is refused in one sentence."""
    with warnings.catch_warnings(action="ignore"), bounded():
        try:
            use(*args)
        except ConfigError as error:
            message = str(error)
        else:
            return True
    assert message.isprintable()
    assert ": " in message
    return False


def try_mutants(kind, originals, folder, seeds):
    made_of, damage, use = KINDS[kind]
    counts = collections.Counter()
    for seed in seeds:
        draw = random.Random(f"{kind} {seed}")
        mutant = folder / "mutant"
        shutil.copytree(draw.choice(originals[made_of]), mutant)
        damage(draw, mutant)
        before = listing(folder)
        try:
            counts["worked" if works(use, mutant) else "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind}, mutant {seed}") from error
        assert listing(folder) == before
        shutil.rmtree(mutant)
    gc.collect()  # what was not awaited, here, where that is no error
    return counts


def test_mutants(originals, tmp_path):
    """In one test, so that one process makes the originals."""
    for kind in KINDS:
        counts = try_mutants(kind, originals, tmp_path, range(FEW))
        assert counts["refused"] or kind in LENIENT


@pytest.fixture(scope="module")
def table(request):
    """Prints the counts at the end."""
    counts = {}
    yield counts
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("\n\n| input | mutants | worked | refused |\n| --- | --: | --: | --: |")
        for kind, count in counts.items():
            print(f"| {kind} | {count.total()} | {count['worked']} | {count['refused']} |")


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutants(kind, originals, tmp_path, table):
    table[kind] = try_mutants(kind, originals, tmp_path, range(FEW, FEW + MANY))
    assert table[kind]["worked"] > MANY // 50
    assert table[kind]["refused"] > MANY // 50 or kind in LENIENT
