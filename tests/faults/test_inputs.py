"""Whatever is damaged or hostile in what a user hands over either works or is refused in one sentence.

Many mutants of every kind, and the table that docs/reliability.md shows:

python -m pytest -n 0 -m faults tests/faults/test_inputs.py
"""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

import gsae_jax
from gsae_jax import cli, config_trees, experiment_config, stack_config
from gsae_jax import mesh as mesh_lib
from gsae_jax.config import Experiment
from gsae_jax.data import files as files_lib
from gsae_jax.errors import UserError
from gsae_jax.evaluation import plots, report
from gsae_jax.lms import loading
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.weights import INDEX, WEIGHTS, Tensors
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import metrics_log, reading, run_directory
from gsae_jax.training import loop, preparation
from tests import test_tokenizers
from tests.conftest import tiny
from tests.faults import mutants
from tests.faults.trials import FEW, MANY, bounded, listing, try_mutants, works
from tests.fixtures.lms import make
from tests.refusals import refused

LMS = Path(make.__file__).parent
TOKENIZER = tokenizer_lib.FILE
SITE = "blocks.0.hook_mlp_out"


pytestmark = [  # of orbax, which does not wait for other files where it cannot read one
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory, text_dir, lm_dir):
    """The folders that mutants are made of, by what they hold."""
    root = tmp_path_factory.mktemp("originals")
    config = tiny(text_dir, lm_dir, root / "tfds")
    config.stacks.gated.l1_coefficients, config.stacks.gated.seeds = (0.01,), (0,)
    config.train.steps = 8  # one checkpoint: there is none to go back to
    loop.train(config_trees.from_dict(Experiment, config), root / "run")
    for name in ("config", "override", "text", "published"):
        (root / name).mkdir()
    (root / "config" / "config.json").write_text(json.dumps(config.to_dict()))
    documents = [f"document {number} é " * 20 for number in range(60)]
    table = pyarrow.table({"text": documents, "id": range(60)})
    pyarrow.parquet.write_table(table, root / "text" / "a.parquet", row_group_size=20)
    lines = [json.dumps({"text": document, "id": [1, {"a": None}]}) for document in documents]
    (root / "text" / "a.jsonl").write_text("\n".join(lines))
    (root / "text" / "a.json").write_text(json.dumps([{"text": document} for document in documents]))
    (root / "text" / "a.txt").write_text("\n".join(documents))
    rows = [f"someone,relu,{site},0,{l0},0.9,0.8" for site in ("mlp", SITE) for l0 in (10.5, 20, 40)]
    (root / "published" / "points.csv").write_text(
        "\n".join(["model,architecture,site,layer,l0,loss_recovered,gamma", *rows])
    )
    lms = [lm_dir, *(folder for folder in sorted(LMS.iterdir()) if (folder / "config.json").exists())]
    sharded = [folder for folder in lms if (folder / INDEX).exists()]
    whole = [folder for folder in lms if (folder / WEIGHTS).exists()]
    vocabularies = test_tokenizers.folders(root / "tokenizers")
    folders = {name: [root / name] for name in ("config", "override", "text", "published", "run")}
    return folders | {"lm": lms, "sharded": sharded, "whole": whole, "tokenizers": vocabularies}


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
    tree = experiment_config().to_dict() | {"stacks": {"a": stack_config("gated", SITE, 64, (0.1,)).to_dict()}}
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


def seal(checkpoint, files):
    """A manifest that says that all is as it should be."""
    sealed = checkpoints_lib._digest(json.dumps(files, sort_keys=True).encode())
    (checkpoint / checkpoints_lib.MANIFEST).write_text(json.dumps({"files": files, "digest": sealed}))


def a_checkpoint_file(draw, folder):
    """Of which half have a manifest that says that all is as it should be, or none."""
    checkpoint = folder / "checkpoints" / "8"
    parts = [checkpoint.glob("*.*"), (checkpoint / "params").rglob("*"), (checkpoint / "facts").glob("*")]
    files = [[path for path in sorted(part) if path.is_file() and path.stat().st_size] for part in parts]
    file = draw.choice(draw.choice(files))
    content = file.read_bytes()
    is_json = content[:1] in b"{[" and file.suffix != ".ocdbt"
    file.write_bytes((mutants.json_file if is_json else mutants.file)(draw, content))
    manifest = checkpoint / checkpoints_lib.MANIFEST
    kind = draw.randrange(4)
    if kind == 0:
        manifest.unlink()
    elif kind < 3 and file != manifest:
        names = json.loads(manifest.read_text())["files"]
        files = {name: ((checkpoint / name).stat().st_size, digest(checkpoint / name)) for name in names}
        seal(checkpoint, files)


def digest(file):
    return checkpoints_lib._digest(file.read_bytes())


def use_config(folder):
    experiment = config_trees.from_dict(Experiment, json.loads((folder / "config.json").read_text()))
    checkpoint = Checkpoint.open(experiment.lm.path, experiment.lm.revision)
    preparation.build(experiment, mesh_lib.make_mesh(experiment.mesh), checkpoint)


def parsed(argument):
    values, argv = flags.FlagValues(), ["train", "--config=configs/quickstart.py", argument]
    config = cli.define_config(values, argv)
    cli.parse(argv, values)
    return config_trees.from_dict(Experiment, cli.given(config))


def use_override(folder):
    parsed((folder / "argument").read_text().replace("stacks.a.", "stacks.gated."))


def use_settings(folder):
    checkpoint = Checkpoint.open(folder)
    loading.site_widths(checkpoint.module())
    if faults := checkpoint.faults():
        raise UserError("; ".join(faults), "lm.path")


def use_tokenizer(folder):
    tokenizer = Checkpoint.open(folder).tokenizer()
    tokenizer(["def main():  é", ""], add_special_tokens=False)
    loading.special_tokens(tokenizer)


def a_tokenizer_file(draw, folder):
    """One of them is gone, another's, a git-lfs pointer, or damaged."""
    names = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    file = draw.choice([folder / name for name in names if (folder / name).exists()])
    kind = draw.randrange(8)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_text(draw.choice(("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "{}", "")))
    elif kind == 2:
        roles = {
            draw.choice(tokenizer_lib.ROLES): draw.choice(("<eos>", "the", "</s>", "", "a b", 3)) for _ in range(3)
        }
        (folder / draw.choice(names[1:3])).write_text(json.dumps(roles))
    elif kind == 3:
        settings = json.loads((folder / "config.json").read_text())
        settings |= {
            "vocab_size": draw.choice((1, 2, 20, 300)),
            "eos_token_id": draw.choice((None, 0, 1, [1], -1, 300)),
        }
        (folder / "config.json").write_text(json.dumps(settings | {"model_type": draw.choice(("gpt2", "gpt3"))}))
    else:
        content = file.read_bytes()
        file.write_bytes((mutants.file if file.suffix == ".txt" else mutants.json_file)(draw, content))


def use_tokens(folder):
    """What is opened gives the tokens of its file, and none that the model lacks between documents."""
    checkpoint = Checkpoint.open(folder)
    tokenizer = checkpoint.tokenizer()
    tokens = tokenizer(test_tokenizers.TEXTS, add_special_tokens=False)["input_ids"]
    assert {tokenizer.eos_token_id, tokenizer.bos_token_id} <= {None, *range(checkpoint.config.d_vocab)}
    if (folder / TOKENIZER).exists():
        plain = test_tokenizers.plain(folder)
        assert tokens == [
            encoding.ids for encoding in plain.encode_batch(test_tokenizers.TEXTS, add_special_tokens=False)
        ]
        assert tokenizer.get_vocab() == plain.get_vocab()
    else:
        assert set(json.loads((folder / "vocab.json").read_text())) <= set(tokenizer.get_vocab())


def use_run(folder):
    gsae_jax.load(folder)
    run_directory.Workdir(folder).check(config_trees.to_dict(run_directory.Workdir(folder).experiment()))


def use_metrics(folder):
    figure = plots.training(metrics_log.read_metrics(run_directory.Workdir(folder)))
    figure.set_layout_engine("none")  # which takes most of the time
    figure.draw_without_rendering()


def use_documents(file):
    def use(folder):
        for document in files_lib.Reader("text", "").documents(str(folder / file)):
            document.encode()

    return use


def a_packed_file(draw, folder):
    """JSON lines, packed and then damaged, or packed many times over."""
    content = (folder / "a.jsonl").read_bytes()
    ending, pack = draw.choice(list(mutants.PACK.items()))
    kind = draw.randrange(16)
    if kind < 5:
        content = mutants.file(draw, content)
    packed = pack(content + b" " * (2**27 if kind == 15 and ending in (".gz", ".zst") else 0))
    (folder / f"packed.jsonl{ending}").write_bytes(mutants.file(draw, packed) if 5 <= kind < 10 else packed)


def use_packed(folder):
    (file,) = folder.glob("packed.*")
    use_documents(file.name)(folder)


def a_tree_of_files(draw, folder):
    """Files of any name in folders of any name, links that lead anywhere, and a path that may mean some of them."""
    at, places = folder, [folder]
    for _ in range(draw.randrange(1, 8)):
        at = draw.choice(places) / mutants.name(draw)
        if not at.exists():
            places.append(at)
            at.mkdir()
    contents = {".txt": b"text", ".TXT": b"", ".md.gz": gzip.compress(b"text"), ".csv": b"a,b", "": b"", ".json": b"[]"}
    for _ in range(draw.randrange(8)):
        ending = draw.choice(list(contents))
        at = draw.choice(places) / (mutants.name(draw) + ending)
        if os.path.lexists(at):
            continue
        kind = draw.randrange(8)
        if kind == 0:
            at.symlink_to(draw.choice([*places, folder / "a.txt", folder / "nowhere", Path("/dev/zero")]))
        elif kind == 1:
            os.mkfifo(at)
        else:
            at.write_bytes(b"\xff" if kind == 2 else contents[ending])
    path = os.path.join(draw.choice((folder, folder, at)), draw.choice(("", "", "*", "**/*.txt", "[", "..")))
    (folder / "path").write_bytes(os.fsencode(path))


def use_found(folder):
    path = os.fsdecode((folder / "path").read_bytes())
    config_trees.check_text(path)
    for file in files_lib.find(path).stamps:
        for document in files_lib.Reader("text", "").documents(file):
            document.encode()


def use_published(folder):
    points = report.read_published(str(folder / "points.csv"))
    record = {"ito": 0, "site": SITE, "learning_rate": 0.1, "seed": 0, "variant": "gated", "width": 64, "gamma": 1.0}
    records = [record | {"name": f"a_{number}", "l0": 9.0 + number, "loss_recovered": 0.5} for number in range(2)]
    for point in points:
        point["site"] = SITE  # so that it is drawn
    for figure in (plots.frontier(records, points), plots.gamma(records, points)):
        figure.savefig(io.BytesIO())


KINDS = {  # what it is made of, how it is damaged, what a command does with it
    "config of an experiment": ("config", an_edit("config.json", a_tree), use_config),
    "`--config.…=` argument": ("override", an_override, use_override),
    "language model's config.json": ("lm", an_edit("config.json", mutants.json_file), use_settings),
    "tokenizer.json": ("lm", an_edit("tokenizer.json", mutants.json_file), use_tokenizer),
    "tokenizer_config.json": ("lm", an_edit("tokenizer_config.json", mutants.json_file), use_tokenizer),
    "tokenizers": ("tokenizers", a_tokenizer_file, use_tokens),
    "model.safetensors": ("whole", an_edit(WEIGHTS, mutants.safetensors_file), gsae_jax.load_lm),
    "model.safetensors.index.json": ("sharded", an_edit(INDEX, mutants.json_file), use_settings),
    "config.json of a run": ("run", an_edit("config.json", mutants.json_file), use_run),
    "checkpoint": ("run", a_checkpoint_file, use_run),
    "metrics.jsonl": ("run", an_edit("metrics.jsonl", a_line(mutants.json_file)), use_metrics),
    ".jsonl text": ("text", an_edit("a.jsonl", a_line(mutants.json_file)), use_documents("a.jsonl")),
    ".json text": ("text", an_edit("a.json", mutants.json_file), use_documents("a.json")),
    "packed text": ("text", a_packed_file, use_packed),
    "folder of text": ("text", a_tree_of_files, use_found),
    ".parquet text": ("text", an_edit("a.parquet", mutants.file), use_documents("a.parquet")),
    ".txt text": ("text", an_edit("a.txt", mutants.file), use_documents("a.txt")),
    "`--published` points": ("published", an_edit("points.csv", mutants.csv_file), use_published),
}


LENIENT = ("metrics.jsonl",)  # a line that says nothing is left out, with a warning: no figure is worth a run


def test_mutants(originals, tmp_path):
    """In one test, so that one process makes the originals."""
    for kind in KINDS:
        counts = try_mutants(kind, originals, tmp_path, range(FEW), KINDS)
        assert counts["refused"] or kind in LENIENT


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutants(kind, originals, tmp_path, table):
    table[kind] = try_mutants(kind, originals, tmp_path, range(FEW, FEW + MANY), KINDS)
    assert table[kind]["worked"] > MANY // 50
    assert table[kind]["refused"] > MANY // 50 or kind in LENIENT


ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)
STACKS = {"stacks": {"a": stack_config("gated", SITE, 64, (0.1,)).to_dict()}}
FIELDS = [path for path in mutants.paths(experiment_config().to_dict() | STACKS) if isinstance(path[-1], str)]
COUNTS = {"max_examples": 100, "deadline": None, "derandomize": True}


def experiment_with(changes):
    tree = json.loads(json.dumps(experiment_config().to_dict() | STACKS))
    for (*above, key), value in changes:
        parent = tree
        for step in above:
            parent = parent.get(step) if isinstance(parent, dict) else None
        if isinstance(parent, dict):
            parent[key] = value
    experiment = config_trees.from_dict(Experiment, tree)
    as_json = config_trees.to_dict(experiment)
    assert config_trees.from_dict(Experiment, json.loads(json.dumps(as_json, allow_nan=False))) == experiment


@settings(**COUNTS)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), ANYTHING), min_size=1, max_size=3))
def test_any_value_in_any_field(changes):
    """What is accepted comes back from JSON as it was."""
    works(experiment_with, changes)


@settings(**COUNTS)
@given(st.sampled_from(FIELDS), st.one_of(st.text(), ANYTHING.map(repr)))
def test_any_argument(path, value):
    works(parsed, f"--config.{'.'.join(path).replace('stacks.a', 'stacks.gated')}={value}")


@settings(**COUNTS)
@given(st.binary(max_size=200), st.booleans())
def test_any_header(tmp_path_factory, header, framed):
    folder = tmp_path_factory.getbasetemp() / "header"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes((len(header).to_bytes(8, "little") if framed else b"") + header)
    assert not works(Tensors, folder)


@settings(**COUNTS)
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text()), st.lists))
def test_json_is_read_as_it_was_written(value):
    assert reading.parse_json(json.dumps({"a": value, "b": [value]})) == {"a": value, "b": [value]}


@pytest.mark.parametrize(
    "hostile",
    [
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "a": 1}}',
        "[" * 10**6,
        '{"a":' * 10**5,
        "1" * 10**5,
        "",
        "{} {}",
        "[]",
        "null",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_json_is_refused(hostile):
    with bounded(), pytest.raises(ValueError):  # noqa: PT011 (json's messages are its own)
        reading.parse_json(hostile)


# What takes long to import, once; then each command as its user starts it.
COMMANDS = """
import json, os, runpy, sys
import gsae_jax, gsae_jax.cli, gsae_jax.evaluation.report, gsae_jax.sae_loading, gsae_jax.planning.planner

codes, folder = [], sys.argv[2]
for number, (module, arguments) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        sys.argv = [module, *arguments]
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        runpy.run_module(f"gsae_jax.{module}", run_name="__main__", alter_sys=True)
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.faults
def test_commands_end_with_one_line_and_code_2(tmp_path, lm_dir):
    (tmp_path / "raises.py").write_text("def get_config():\n    return {}['absent']\n")
    (tmp_path / "none.py").write_text("")
    (tmp_path / "number.py").write_text("def get_config():\n    return 3\n")
    (tmp_path / "points.csv").write_bytes(b"\xff")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"lm": {}, "stacks": {}, "new": 1}')
    shutil.copytree(lm_dir, tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "gelu", "n_layers": 1e9}')
    quickstart, new = "--config=configs/quickstart.py", f"--workdir={tmp_path / 'new'}"
    wide = "--config.stacks.gated.width=2147483640"
    cases = [
        ("train", [f"--config={tmp_path}/raises.py", new], "--config: .*raises.py line 2: KeyError: 'absent'"),
        ("train", [f"--config={tmp_path}/none.py", new], "--config: the file cannot be used: .*'get_config'"),
        ("train", [f"--config={tmp_path}/number.py", new], "config: is 3; .*seed"),
        ("train", [f"--config={tmp_path}", new], "--config: the file cannot be read: .*Is a directory"),
        (
            "train",
            [quickstart, new, "--config.train.steps=abc"],
            r"train\.steps: is 'abc', .*int",
        ),
        ("train", [quickstart, new, "--config.train.log_every=1e9"], r"train\.log_every: .*write 1000000000"),
        ("train", [quickstart, new, "--config.stacks.gated.l1_coefficients=(1,"], "command line: .*l1_coefficients"),
        (
            "train",
            [quickstart, new, "--config.stacks.gated.l1_coefficients=1e999"],
            ".*l1_coef.*: is inf; ",
        ),
        ("train", [quickstart, new, wide], r"stacks\.gated: needs [\d,.]+ GiB on each device\."),
        ("train", [quickstart, "--workdir=/proc/self/run"], "--workdir: /proc/self is not writable"),
        ("train", [quickstart, f"--workdir={tmp_path}/none.py"], "--workdir: .* is not a run"),
        (
            "train",
            [quickstart, new, f"--config.lm.path={tmp_path}/lm"],
            r"lm\.path: .*config\.json lacks d_head",
        ),
        ("evaluate", [f"--workdir={tmp_path}/run"], "--workdir: .*config.json is not a config of this .*new: is not a"),
        (
            "evaluate",
            [f"--workdir={tmp_path}/run", f"--published={tmp_path}/points.csv"],
            "--published: .* cannot be read",
        ),
        ("evaluate", [f"--workdir={tmp_path}/raises.py"], "--workdir: .* holds no run"),
        ("sites", [f"--model={tmp_path}/lm"], "--model: .*config.json lacks d_head"),
        ("plan", [quickstart, "--topology=v5e:0x0"], "--topology"),
    ]
    (tmp_path / "said").mkdir()
    before = listing(tmp_path)
    commands = [*((module, arguments) for module, arguments, _ in cases), ("train", [*cases[0][1], "--traceback"])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS, json.dumps(commands), str(tmp_path / "said")],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [(tmp_path / "said" / f"{number}.err").read_text() for number in range(len(commands))]
    shutil.rmtree(tmp_path / "said")
    assert json.loads(done.stdout) == [2] * len(commands), said
    for (_, _, message), stderr in zip(cases, said, strict=False):
        assert re.fullmatch(f"error: {message}.*\n", stderr), stderr
    assert said[-1].startswith("Traceback")
    assert said[-1].splitlines()[-1] == said[0].strip()
    before.pop(str(tmp_path / "said"))
    assert listing(tmp_path) == before


def test_metrics_go_on_behind_a_broken_line(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 4, "a/l0": [1.0]}\n\0\0\n{"step": 8, "a/l0": [1.0]}\n{"step": 12, "a/l')
    metrics = metrics_log.Metrics(run_directory.Workdir(tmp_path), 8, (), {})
    metrics.write(12, {"a/l0": [2.0]})
    metrics.close(complete=True)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [4, 8, 12]
    assert capsys.readouterr().err == f"warning: {file} line 2 is not a line of metrics and is left out\n"


def test_a_manifest_leads_nowhere_else(tmp_path):
    """Nor to what has no end."""
    checkpoint = tmp_path / "checkpoints" / "8"
    checkpoint.mkdir(parents=True)
    for name in checkpoints_lib.SEALS:
        (checkpoint / name).write_text("{}")
    os.mkfifo(checkpoint / "pipe")
    workdir = run_directory.Workdir(tmp_path)
    for name, problem in (
        ("/dev/zero", "names /dev/zero"),
        ("../../x", "names ../../x"),
        ("a/../../b", "names a/../../b"),
        ("pipe", "pipe is missing"),
    ):
        seal(checkpoint, {name: (0, "")})
        with bounded(), refused("--workdir", str(tmp_path), "checkpoint 8", problem):
            workdir.sound_step()
    seal(checkpoint, {})
    assert workdir.sound_step() == 8
    (checkpoint / checkpoints_lib.MANIFEST).unlink()
    for file in (checkpoint / checkpoints_lib.MANIFEST, tmp_path / "config.json", tmp_path / "metrics.jsonl"):
        os.mkfifo(file)
    with bounded():
        with refused("--workdir", "manifest.json is missing"):
            workdir.sound_step()
        with refused("--workdir", "config.json is not a JSON object", "not a file"):
            workdir.config()
        assert metrics_log.read_metrics(workdir) == []
