"""Eight CPU devices, strict promotion of ranks, and the small things that many tests start from.

With `-m gpu` the device is the machine's own.
"""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Many tests compile the same programs; they are kept for one session, also for commands that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="gsae_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "8000000000"  # with a limit, it is written under a lock
    # Small programs are not kept, because to read many of them takes longer than to compile them again.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import filelock
import jax
import jax.numpy as jnp
import pytest
from absl import flags

from gsae_jax import config as config_lib
from gsae_jax import config_trees, experiment_config, stack_config
from gsae_jax.lms import checkpoints, gelu, loading
from gsae_jax.lms.transformer import Model

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser):
    parser.addoption(
        "--quickstart-steps", type=int, help="fewer steps for the main job of README, which is then shorter"
    )


def pytest_configure(config):
    if config.option.markexpr == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a test starts a second process
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    # To compile programs that run for a moment is most of the quick tests' work; the long ones gain from optimisation.
    if "not quickstart" in config.option.markexpr:
        options = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
        if jax.__version_info__ < (0, 11):  # a flag that a version does not know ends the process
            options.append("--xla_cpu_use_fusion_emitters=false")  # half the time
        os.environ.setdefault("XLA_FLAGS", " ".join(options))
    assert jax.device_count() == 8


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Frees compiled programs after a file of tests: Linux ends a process with more than 65,530 mappings of memory."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


MOST_MAPPINGS = 25_000  # a compiled program has about 15
WORDS = [
    "def",
    "return",
    "import",
    "class",
    "self",
    "value",
    "index",
    "while",
    "for",
    "in",
    "range",
    "the",
    "of",
    "a",
    "list",
    "from",
    "and",
    "or",
    "not",
    "if",
    "else",
    "key",
]


@pytest.fixture(scope="session")
def real():
    """Folder of TinyStories-656K, its text and a published SAE. Without it, a test that asks for it is skipped."""
    for above in Path(__file__).parents:
        if (folder := above / "shared" / "real").exists():
            return folder
    return pytest.skip("the real model, SAE and text are not there (../shared/real)")


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """About 130,000 tokens of words in random order, in two files."""
    folder = tmp_path_factory.mktemp("text")
    picks = jax.random.randint(jax.random.key(0), (120_000,), 0, len(WORDS)).tolist()
    for part, name in enumerate(("a.txt", "b.md")):
        words = [WORDS[pick] for pick in picks[part::2]]
        lines = [" ".join(words[start : start + 12]) for start in range(0, len(words), 12)]
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def lm_dir(tmp_path_factory):
    """A random two-layer GELU model under the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("lm") / "small"
    tokenizer = loading.load_lm().tokenizer
    sizes = dict(n_layers=2, d_model=32, n_heads=4, d_head=8, d_mlp=64, d_vocab=len(tokenizer), n_ctx=32)
    module = Model(gelu.config(sizes))
    params = module.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    # Biases and gains away from 0 and 1, so that a forgotten one shows.
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    checkpoints.save(folder, module.config, params, tokenizer)
    return folder


@pytest.fixture
def config_dict(text_dir, lm_dir, tmp_path_factory):
    """A tiny experiment as a ConfigDict: two stacks at two sites of the small model, on the small text."""
    return tiny(text_dir, lm_dir, tmp_path_factory.getbasetemp() / "tfds")


def tiny(text_dir, lm_dir, data_dir):
    config = experiment_config()
    config.lm.path = str(lm_dir)
    config.data.corpus, config.data.path = "text", str(text_dir)
    config.data.data_dir = str(data_dir)
    config.data.context_length = 16
    gated = stack_config("gated", "blocks.0.hook_mlp_out", 64, (0.01, 0.03), learning_rates=(1e-2,), seeds=(0, 1))
    config.stacks.gated = gated
    config.stacks.baseline = stack_config("relu", "blocks.0.mlp.hook_post", 128, (0.01,), learning_rates=(3e-3,))
    config.activations.rows_per_forward = 16
    config.activations.buffer_size = 8 * 64
    config.activations.scale_tokens = 1024
    config.train.steps, config.train.batch_size, config.train.warmup_steps, config.train.log_every = 16, 64, 4, 4
    config.checkpoint.every = 8
    config.evaluation.tokens, config.evaluation.rows_per_forward = 2048, 16
    return config


@pytest.fixture
def experiment(config_dict):
    """The tiny experiment, checked."""
    return config_trees.from_dict(config_lib.Experiment, config_dict)


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory, request):
    """The README's main job."""
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "gsae_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    if steps := request.config.getoption("quickstart_steps"):
        command += [f"--config.train.steps={steps}"]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    return workdir


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's."""
    return loading.load_lm().tokenizer


@pytest.fixture
def documents():
    """Short texts of one to many tokens, with letters that are not ASCII."""
    return [f"document {number}: {'é ' * number}end" for number in range(45)]


@pytest.fixture(scope="session")
def lm(lm_dir):
    """The random two-layer model, loaded."""
    return loading.load_lm(lm_dir)


@pytest.fixture(scope="session")
def collected_run(text_dir, lm_dir, tmp_path_factory):
    """A run of two gated SAEs and a baseline at one site, with collected features. All workers share it."""
    import gsae_jax
    from gsae_jax import collecting

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "collected" / "run"
    with filelock.FileLock(shared / "collected.lock"):
        if not (shared / "collected" / "whole").exists():
            config = tiny(text_dir, lm_dir, base / "tfds")
            config.stacks.baseline.site = "blocks.0.hook_mlp_out"
            gsae_jax.fit(config, folder)
            collecting.collect(collecting.Wanted(str(folder), tokens=4096))
            (shared / "collected" / "whole").touch()
    return folder


@pytest.fixture(scope="module")
def viewed(collected_run):
    """(pages, what loads the language model) of the run."""
    from gsae_jax import viewing

    return viewing.pages(viewing.Wanted(str(collected_run)))


@pytest.fixture(scope="module")
def client(viewed):
    """Asks the server of the pages, without a network."""
    from gsae_jax.viewer import server

    return server.application(*viewed).test_client()
