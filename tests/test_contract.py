"""What holds of every architecture: those of the package, and one that reads two sites and has state.

Each file of `saes/` is tested with its default options, with each switch the other way, and with each other choice.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import shutil
import sys
import typing
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import gsae_jax
import gsae_jax.saes
from gsae_jax import config as config_lib
from gsae_jax import config_trees, measuring, plugins
from gsae_jax import mesh as mesh_lib
from gsae_jax.config import Experiment
from gsae_jax.errors import UserError
from gsae_jax.formats import jumprelu, llamascopium, saelens
from gsae_jax.saes import contract, linalg, parameters, trained
from gsae_jax.training import loop
from gsae_jax.training.stacks import Stack
from tests.refusals import refused

OWN = Path(__file__).parent / "architectures"
SITES = {"blocks.0.hook_mlp_out": 12, "blocks.0.hook_resid_post": 10}
F, B = 64, 32


def holds(format, name):
    """Whether a format can hold an architecture."""
    in_jumprelu_form = any(contract.converter(name, form) for form in jumprelu.FORMS)
    of_their_own = {
        "saelens": (*saelens.ARCHITECTURES, *saelens.FORMS),
        "llamascopium": (*llamascopium.HELD, llamascopium.CROSSCODER),
        "sparsify": ("topk", "topk_transcoder"),
    }
    own = name in of_their_own.get(format, ())
    return own or (in_jumprelu_form and format in ("jumprelu", "gemma_scope", "llamascopium"))


def kinds(field, architecture):
    return typing.get_type_hints(architecture.Config).get(field)


def variants():
    for name, architecture in plugins.known("saes", having="PARAMETERS").items():
        switches = [
            {setting.name: not setting.default}
            for setting in dataclasses.fields(architecture.Config)
            if isinstance(setting.default, bool)
        ]
        choices = [
            {setting.name: choice}
            for setting in dataclasses.fields(architecture.Config)
            if typing.get_origin(kind := kinds(setting.name, architecture)) is typing.Literal
            for choice in typing.get_args(kind)
            if choice != setting.default
        ]
        for options in ({}, *switches, *choices):
            shown = [key if isinstance(value, bool) else f"{key}={value}" for key, value in options.items()]
            yield pytest.param(name, options, id=" ".join([name, *shown]))


def trainable_names():
    return list(plugins.known("saes", having="loss"))


# Of each kind of activation, and of each kind of sites, one is enough for every commit. Where compiling is quick, there
# are more.
FEW = {"gated", "batch_topk_crosscoder"}
SOME = FEW | {"gated_transcoder", "jumprelu", "gated_batch_topk"}


def cases(trainable=False, quick=lambda name, options: name == "gated" or (name in SOME and not options)):
    """Every variant as a parameter; those that are not `quick` are marked as `variants`."""
    for case in variants():
        name, options = case.values
        if not trainable or name in TRAINABLE:
            yield case if quick(name, options) else pytest.param(*case.values, marks=pytest.mark.variants, id=case.id)


# While this file is collected and while its tests run, the tests' own files are architectures as well.
with mock.patch.object(gsae_jax.saes, "__path__", [*gsae_jax.saes.__path__, str(OWN)]) as PATHS:
    TRAINABLE = trainable_names()
    every = pytest.mark.parametrize(("name", "options"), list(cases()))
    every_trainable = pytest.mark.parametrize(("name", "options"), list(cases(trainable=True)))
    # Where compiling takes long.
    few_trainable = pytest.mark.parametrize(
        ("name", "options"), list(cases(trainable=True, quick=lambda name, options: name in FEW and not options))
    )


@pytest.fixture(autouse=True)
def own_architectures(monkeypatch):
    monkeypatch.setattr(gsae_jax.saes, "__path__", PATHS)


@dataclasses.dataclass
class Case:
    """An architecture, a Config of it, and where it reads and writes."""

    name: str
    architecture: object
    config: object
    sites: tuple
    targets: tuple

    @classmethod
    def make(cls, name, options=None, width=F, dtype="float32"):
        architecture = contract.module_of(name)
        sites = tuple(SITES) if kinds("d_in", architecture) is not int else tuple(SITES)[:1]
        d_in, d_out = tuple(SITES[site] for site in sites), None
        targets = sites
        if kinds("d_out", architecture):
            targets = tuple(SITES)[1:] if len(sites) == 1 else sites[:1]
            d_out = tuple(SITES[site] for site in targets)
        few = {option: min(8, width) for option in filter(None, [contract.sparsity(architecture)])}
        config = contract.build_config(architecture, name, d_in, d_out, width, dtype, few | (options or {}))
        return cls(name, architecture, config, sites, targets)

    def params(self, seed=0):
        """Every array in play: none is zero, and none is made of another."""
        params = self.architecture.init(jax.random.key(seed), self.config)
        keys = jax.random.split(jax.random.key(seed + 1), len(params))
        return {n: p + 0.3 * jax.random.normal(key, p.shape) for key, (n, p) in zip(keys, params.items(), strict=True)}

    def activations(self, batch=B, seed=5):
        keys = jax.random.split(jax.random.key(seed), len(SITES))
        return {
            site: jax.random.normal(key, (batch, D)) + 0.5 for key, (site, D) in zip(keys, SITES.items(), strict=True)
        }

    def inputs(self, activations):
        several = isinstance(self.config.d_in, tuple)
        return tuple(activations[site] for site in self.sites) if several else activations[self.sites[0]]

    def outputs(self, activations):
        several = isinstance(getattr(self.config, "d_out", self.config.d_in), tuple)
        return tuple(activations[site] for site in self.targets) if several else activations[self.targets[0]]

    def reconstruct(self, params, inputs):
        f = self.architecture.encode(params, inputs, self.config)
        x_hats = contract.with_skip(self.architecture, params, inputs, self.architecture.decode(params, f))
        return jax.tree.leaves(x_hats)

    def loss(self, params, activations, l1_coefficient=0.07):
        gradients, state = parameters.split(self.architecture, params)
        batch = contract.Batch(
            self.inputs(activations),
            self.outputs(activations),
            lambda: jnp.arange(self.config.width) % 3 == 1,  # which are dead
            jnp.int32(0),
        )
        coefficients = {"l1_coefficient": l1_coefficient}
        return lambda trained: self.architecture.loss(trained, state, batch, coefficients, self.config), gradients

    def stack(self, **changes):
        target = () if "d_out" not in vars(self.config) else self.targets
        stack = {
            "architecture": self.name,
            "site": self.sites if len(self.sites) > 1 else self.sites[0],
            "width": self.config.width,
            **(
                {"learning_rates": (1e-2, 2e-2)}
                if contract.sparsity(self.architecture)
                else {"l1_coefficients": (0.01, 0.03), "learning_rates": (1e-2,)}
            ),
            "seeds": (0,),
            "options": contract.options(self.config),
        }
        return stack | ({"target": target[0] if len(target) == 1 else target} if target else {}) | changes


def another(kind, value):
    """Another value of an option."""
    match value:
        case bool():
            return not value
        case str():
            return next(choice for choice in typing.get_args(kind) if choice != value)
        case tuple():
            return (0.5, 1.0)
    return (24 if value == 16 else 16) if isinstance(value, int) else value / 2 or 0.5


def changes(config):
    """The config with each option changed, as far as that is allowed."""
    types = typing.get_type_hints(type(config))
    for option, value in contract.options(config).items():
        with contextlib.suppress(UserError):
            yield option, dataclasses.replace(config, **{option: another(types[option], value)})


def functions_of(case, activations):
    """As text, how a Config makes the first parameters, and how it encodes and trains."""
    frozen = contract.frozen(case.architecture, case.config)

    def gradients(params):
        loss, trained = case.loss(params, activations)
        fixed = {name: value for name, value in trained.items() if name in frozen}
        rest = {name: value for name, value in trained.items() if name not in frozen}
        return jax.grad(lambda rest: loss(rest | fixed), has_aux=True)(rest)

    params = jax.eval_shape(lambda: case.architecture.init(jax.random.key(0), case.config))
    inputs = case.inputs(activations)
    init = jax.make_jaxpr(lambda: case.architecture.init(jax.random.key(0), case.config))()
    encode = jax.make_jaxpr(lambda params: case.architecture.encode(params, inputs, case.config))(params)
    return str(init), f"{encode} {jax.make_jaxpr(gradients)(params)}"


@pytest.mark.parametrize("name", TRAINABLE)
def test_an_option_does_something_or_is_called_idle(name):
    """Of the basic ones also beside each other option. Only `init` reads what `start_from` makes idle."""
    case = Case.make(name)
    architecture, activations = case.architecture, case.activations()

    @functools.cache
    def functions(config):
        return functions_of(dataclasses.replace(case, config=config), activations)

    beside = [config for _, config in changes(case.config)] if name in ("gated", "topk") else []
    for base in (case.config, *beside):
        for option, config in changes(base):
            before, after = functions(base), functions(config)
            idle, starts = (contract.idle(architecture, config, starts) for starts in (False, True))
            assert option in idle or before != after, (option, config)
            assert (option in starts) == (before[1] == after[1]) or option in idle, (option, config)


@every
def test_the_table_is_of_the_arrays_that_there_are(name, options):
    case = Case.make(name, options)
    params = case.architecture.init(jax.random.key(0), case.config)
    assert set(params) <= set(case.architecture.PARAMETERS)
    for key, value in params.items():
        assert value.shape == case.architecture.PARAMETERS[key].sizes(case.config), key
    assert parameters.decoder(case.architecture) in params
    for key, parameter in case.architecture.PARAMETERS.items():
        if parameter.unit_rows:
            np.testing.assert_allclose(jnp.linalg.norm(params[key], axis=-1), 1, rtol=1e-5)


@every
@pytest.mark.parametrize(
    ("scale", "mean"),
    [
        (1e-2, 20.0),
        (1e2, 0.0),
        *(
            pytest.param(*each, marks=pytest.mark.variants)
            for each in ((1e-2, 0.0), (1e2, 20.0), (1.0, 0.0), (1.0, 20.0))
        ),
    ],
)
def test_folding_units_is_the_same_function(name, options, scale, mean):
    """Each site has a scale of its own; features have the units of the first target."""
    case = Case.make(name, options)
    params, activations = case.params(), case.activations()
    of_site = {
        site: parameters.Units(scale * (1 + number), mean * np.linspace(-1, 1, D, dtype=np.float32))
        for number, (site, D) in enumerate(SITES.items())
    }
    units = [of_site[site] for site in case.sites], [of_site[site] for site in case.targets]
    in_training = {site: (x - of_site[site].mean[None]) * of_site[site].scale for site, x in activations.items()}
    f = case.architecture.encode(params, case.inputs(in_training), case.config)
    x_hat = case.reconstruct(params, case.inputs(in_training))
    folded = parameters.fold(case.architecture, params, *units)
    same = case.architecture.encode(folded, case.inputs(activations), case.config)
    tolerance = 3e-5 * (1 + mean)
    assert 0.05 < (f > 0).mean() < 0.95
    np.testing.assert_allclose(same * units[1][0].scale, f, rtol=1e-4, atol=tolerance * max(1, scale))
    for ours, theirs, unit in zip(case.reconstruct(folded, case.inputs(activations)), x_hat, units[1], strict=True):
        np.testing.assert_allclose((ours - unit.mean[None]) * unit.scale, theirs, rtol=1e-3, atol=1e-3 * max(1, scale))
    back = parameters.unfold(case.architecture, folded, *units)
    for key, value in params.items():
        np.testing.assert_allclose(back[key], value, rtol=1e-4, atol=1e-4 * max(1, scale * mean), err_msg=key)


@every
def test_unit_rows_are_the_same_reconstructions(name, options):
    case = Case.make(name, options)
    params, inputs = case.params(), case.inputs(case.activations())
    decoder = parameters.decoder(case.architecture)
    if not case.architecture.PARAMETERS[decoder].unit_rows:
        assert parameters.with_unit_rows(case.architecture, params) is params
        return
    scaled = params | {decoder: params[decoder] * jnp.linspace(0.5, 2, F)[:, None]}
    if contract.compares_features(case.architecture):
        with refused("", "not unit"):
            parameters.with_unit_rows(case.architecture, scaled)
        scaled = params | {decoder: linalg.unit(params[decoder])}
    unit = parameters.with_unit_rows(case.architecture, scaled)
    np.testing.assert_allclose(jnp.linalg.norm(unit[decoder], axis=-1), 1, rtol=1e-5)
    (before,), (after,) = (case.reconstruct(p, inputs) for p in (scaled, unit))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@every_trainable
def test_gradients_are_those_of_finite_differences(name, options, monkeypatch):
    """In float64. What `stop_gradient` holds back keeps its value while a parameter moves."""
    with jax.enable_x64(True):
        case = Case.make(name, options, dtype="float64")
        loss, params = case.loss(case.params(), case.activations())
        grads, _ = jax.grad(loss, has_aux=True)(params)
        held, replayed = [], None

        def stop_gradient(x):
            if replayed is None:
                held.append(x)
                return x
            return next(replayed)

        monkeypatch.setattr(jax.lax, "stop_gradient", stop_gradient)
        loss(params)
        for number, (key, value) in enumerate(params.items()):
            direction = jax.random.normal(jax.random.key(number), value.shape)
            values = []
            for sign in (1, -1):
                replayed = iter(held)
                values.append(loss(params | {key: value + sign * 1e-7 * direction})[0])
            difference = (values[0] - values[1]) / 2e-7
            np.testing.assert_allclose((grads[key] * direction).sum(), difference, rtol=1e-5, atol=1e-8, err_msg=key)


@every
@pytest.mark.parametrize(
    ("width", "batch"),
    [pytest.param(1, B, marks=pytest.mark.variants), pytest.param(F, 1, marks=pytest.mark.variants), (1, 1)],
)
def test_one_feature_and_one_token(name, options, width, batch):
    case = Case.make(name, options, width=width)
    params, activations = case.params(), case.activations(batch)
    f = case.architecture.encode(params, case.inputs(activations), case.config)
    assert f.shape == (batch, width)
    for x_hat, target in zip(
        jax.tree.leaves(case.architecture.decode(params, f)), jax.tree.leaves(case.outputs(activations)), strict=True
    ):
        assert x_hat.shape == target.shape
    if name in trainable_names():
        loss, trained = case.loss(params, activations)
        grads, statistics = jax.grad(loss, has_aux=True)(trained)
        assert all(np.isfinite(value).all() for value in jax.tree.leaves((grads, statistics.means)))
        assert statistics.fired.shape == (width,)


@every
def test_no_feature_active(name, options):
    """The reconstruction is the bias alone; training goes on with finite numbers."""
    case = Case.make(name, options)
    table = case.architecture.PARAMETERS
    low = {key for key, p in table.items() if p.role is contract.Role.FEATURE and p.trained and key != "threshold"}
    params = {key: value - 1e3 if key in low else value for key, value in case.params().items()}
    activations = case.activations()
    f = case.architecture.encode(params, case.inputs(activations), case.config)
    assert not f.any()
    assert not contract.gate(case.architecture, params, case.inputs(activations), case.config).any()
    bias = params[parameters.output_bias(case.architecture)]
    x_hat = jax.tree.leaves(case.architecture.decode(params, f))[0]
    np.testing.assert_array_equal(x_hat, jnp.broadcast_to(bias, x_hat.shape))
    if name in trainable_names():
        loss, trained = case.loss(params, activations)
        grads, statistics = jax.grad(loss, has_aux=True)(trained)
        assert all(np.isfinite(value).all() for value in jax.tree.leaves((grads, statistics)))
        assert statistics.means["l0"] == 0
        assert not statistics.fired.any()


@few_trainable
@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants)])
def test_a_mesh_trains_as_one_device(name, options, shape):
    case = Case.make(name, options)
    activations = case.activations()
    stack_config = config_trees.convert(config_lib.Stack, case.stack(start_from="a:b"))
    stack = Stack.build("a", stack_config, SITES, "float32")
    states = []
    for data, latent, devices in ((1, 1, jax.devices()[:1]), (*shape, None)):
        mesh = mesh_lib.make_mesh(config_lib.Mesh(data, latent), devices)
        specs = stack.specs()
        placed = jax.device_put(activations, mesh_lib.sharding(mesh, "data"))
        shardings = jax.tree.map(partial(jax.sharding.NamedSharding, mesh), specs)
        state = jax.jit(stack.init, out_shardings=shardings)()

        def update(state, x):
            return stack.update(state, x, jnp.int32(3), jnp.float32(1))

        step = jax.jit(
            jax.shard_map(
                update, mesh=mesh, in_specs=(specs, PartitionSpec("data")), out_specs=(specs, PartitionSpec())
            )
        )
        for _ in range(3):
            state, statistics = step(state, placed)
        states.append(jax.device_get((state, statistics)))
    (alone, means), (spread, other_means) = states
    for key, value in alone.params.items():
        np.testing.assert_allclose(spread.params[key], value, rtol=1e-3, atol=2e-4, err_msg=key)
    np.testing.assert_array_equal(spread.steps_since_fired, alone.steps_since_fired)
    for key, value in means.items():
        np.testing.assert_allclose(other_means[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
    first = stack.init().params
    frozen = contract.frozen(stack.architecture, stack.sae)
    for key, value in alone.params.items():
        assert np.allclose(value, first[key], atol=1e-6) == (key in frozen or (key == "r_mag" and not np.any(value)))


@pytest.mark.parametrize(
    "name",
    [name if name == "gated" else pytest.param(name, marks=pytest.mark.variants) for name in TRAINABLE],
)
def test_a_run_resumes_bit_identical_and_is_measured_and_exported(name, text_dir, lm_dir, config_dict, tmp_path):
    """On a mesh of 2 x 4; the format either gives the same SAE back or is refused before anything is written."""
    case = Case.make(name)
    config_dict.stacks = {"a": case.stack()}
    config_dict.mesh.data, config_dict.mesh.latent = 2, 4
    config_dict.train.steps, config_dict.checkpoint.every, config_dict.loggers = 8, 4, ()
    config_dict.evaluation.tokens = 512
    run = tmp_path / "run"
    config = config_trees.from_dict(Experiment, config_dict)
    assert loop.train(config, run)
    saes = gsae_jax.load(run)
    state = any(not parameter.trained for parameter in case.architecture.PARAMETERS.values())
    assert any(np.any(value) for value in parameters.split(case.architecture, saes["a_0"].params)[1].values()) == state
    shutil.rmtree(run / "checkpoints" / "8")
    assert loop.train(config, run)
    for key, sae in gsae_jax.load(run).items():
        for array, value in sae.params.items():
            np.testing.assert_array_equal(value, saes[key].params[array], err_msg=f"{key} {array}")
    measuring.evaluate(run)
    records = json.loads((run / "report" / "report.json").read_text())["saes"]
    several = len(case.targets) > 1
    expected = [(f"a_{n}@{site}" if several else f"a_{n}", site) for n in (0, 1) for site in case.targets]
    assert [(record["name"], record["site"]) for record in records] == expected
    assert all(0 < record["fvu"] < 2 for record in records)
    x = case.inputs({site: np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32) for site in SITES})
    for format in plugins.known("formats", having="write"):
        if format == "dictionary_learning":
            continue  # wants torch; tests/test_exchange.py
        if holds(format, name):
            saes["a_0"].save(tmp_path / format, format)
            (same,) = gsae_jax.load(tmp_path / format).values()
            np.testing.assert_allclose(same(x), saes["a_0"](x), rtol=1e-4, atol=1e-5)
        else:
            with refused("a_0", f"'{name}"):
                saes["a_0"].save(tmp_path / format, format)
            assert not (tmp_path / format).exists()
    recorded = json.loads((run / "config.json").read_text())
    recipe = dict(contract.RECIPE) | getattr(case.architecture, "RECIPE", {})
    assert {key: recorded["stacks"]["a"][key] for key in recipe} == recipe
    recorded["stacks"]["a"]["options"] = {"none_such": 1}
    (run / "config.json").write_text(json.dumps(recorded))
    with refused("stacks.a.options.none_such"):
        gsae_jax.load(run)


def test_options_have_types_and_checks():
    for name, options, field in (
        ("two_sites", {"share": "much"}, "options.share"),
        ("two_sites", {"share": 1.5}, "options.share"),
        ("two_sites", {"shares": 0.5}, "options.shares"),
        ("gated", {"tie_encoder": 1}, "options.tie_encoder"),
    ):
        with refused(field):
            Case.make(name, options)


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("gated", {"site": tuple(SITES)}, "stacks.a.site"),
        ("gated", {"target": "blocks.0.hook_resid_post"}, "stacks.a.target"),
        ("two_sites", {"target": tuple(SITES)}, "stacks.a.target"),
        ("gated", {"options": {"only_magnitude": True}}, "stacks.a.start_from"),
    ],
)
def test_sites_that_an_architecture_does_not_take(name, changes, field):
    stack = config_trees.convert(config_lib.Stack, Case.make(name).stack(**changes))
    with refused(field):
        Stack.build("a", stack, SITES, "float32")


def test_an_sae_of_several_sites_takes_a_tuple():
    case = Case.make("two_sites")
    sae = trained.SAE("a_0", case.name, case.config, case.sites, case.params(), target=case.targets)
    first, second = case.activations(6).values()
    f = sae.encode((first.reshape(2, 3, -1), second.reshape(2, 3, -1)))
    assert f.shape == (2, 3, F)
    np.testing.assert_array_equal(f.reshape(6, F), case.architecture.encode(sae.params, (first, second), case.config))
    assert sae((first, second)).shape == first.shape
    for wrong, field in ((first, "x"), ((first,), "x"), ((second, first), "x[0]"), ((first, second[:3]), "x")):
        with refused(field):
            sae.encode(wrong)


@pytest.mark.quickstart  # after the linters, whose cache it finds
def test_architectures_keep_the_contract(tmp_path):
    """By mypy: the types of every file of `saes/` are those of the protocol."""
    api = pytest.importorskip("mypy.api")
    known = {name for name in plugins.known("saes", having="PARAMETERS") if not (OWN / f"{name}.py").exists()}
    lines = ["from gsae_jax.saes import contract"]
    for name in sorted(known):
        protocols = ["Trainable" if name in trainable_names() else "Architecture"]
        protocols += ["SparselyTrainable"] if hasattr(contract.module_of(name), "encoder") else []
        lines += [f"from gsae_jax.saes import {name}"]
        lines += [f"{name}_{protocol}: contract.{protocol} = {name}" for protocol in protocols]
    (tmp_path / "check.py").write_text("\n".join(lines) + "\n")
    root = Path(gsae_jax.__file__).parents[1]
    output, errors, code = api.run([f"--config-file={root / 'pyproject.toml'}", str(tmp_path / "check.py")])
    assert code == 0, output + errors


SATURATING = (OWN.parent.parent / "docs" / "guides" / "architecture.md").read_text("utf-8")


WITH_A_TYPO = """from gsae_jax.saes.contract import Parameter
PARAMETERS = {k: Parameter(("witdh", *v.shape[1:]), v.role) for k, v in relu.PARAMETERS.items()}"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """The guide's architecture as a file of the user's, topk.py in the working directory, which is a package too."""
    (tmp_path / "here" / "my_package").mkdir(parents=True)
    (source,) = (part for part in SATURATING.split("```") if part.startswith("python\n") and "def loss(" in part)
    for folder in ("here", "here/my_package"):
        (tmp_path / folder / "topk.py").write_text(source.removeprefix("python\n"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    yield tmp_path / "here" / "topk.py"
    sys.modules.pop("my_package.topk", None)
    sys.modules.pop("my_package", None)


@pytest.mark.parametrize("given", ["topk.py", "my_package.topk"])
def test_an_architecture_of_ones_own_is_a_file_or_a_dotted_path(
    given, own_file, config_dict, tmp_path, monkeypatch, capsys
):
    del config_dict.stacks.baseline
    config_dict.stacks.gated.architecture = given
    saes = gsae_jax.fit(config_dict, "run")
    recorded = str(own_file) if given.endswith(".py") else given
    config = json.loads(Path("run/config.json").read_text())
    assert config["stacks"]["gated"]["architecture"] == saes["gated_0"].architecture == recorded
    (shown,) = {record["architecture"] for record in json.loads(Path("run/report/report.json").read_text())["saes"]}
    assert shown == given
    with refused("gated_0", given):
        saes["gated_0"].save("exported")
    assert not Path("exported").exists()
    shutil.rmtree("run/checkpoints/16")
    resumed = gsae_jax.fit(config_dict, "run")
    assert "has changed" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for name, sae in gsae_jax.load(own_file.parent / "run").items():
        np.testing.assert_array_equal(sae.params["W_dec"], saes[name].params["W_dec"])
        np.testing.assert_array_equal(sae.params["W_dec"], resumed[name].params["W_dec"])
    if given.endswith(".py"):
        monkeypatch.chdir(own_file.parent)
        shutil.rmtree("run/checkpoints/16")
        own_file.write_text(own_file.read_text() + "\n# another version\n")
        gsae_jax.fit(config_dict, "run")
        assert f"{own_file} has changed since step 8" in capsys.readouterr().err
        monkeypatch.chdir(tmp_path)
    for file in own_file.parent.rglob("topk.py"):
        file.unlink()
    plugins.reread()
    sys.modules.pop("my_package.topk", None)
    importlib.invalidate_caches()
    run = own_file.parent / "run"
    with refused("stacks.gated.architecture", recorded, "config.json"):
        gsae_jax.load(run)
    if given.endswith(".py"):  # relative: it may be code that came with the run
        config["stacks"]["gated"]["architecture"] = given
        (run / "config.json").write_text(json.dumps(config))
        with refused("", "relative path", given):
            gsae_jax.load(run)


@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        ("PARAMETERS = relu", "TABLE = relu", ["does not define PARAMETERS"]),
        ("Config, init, encode, decode = relu.Config, relu.init,", "Config, encode, decode = relu.Config,", ["init"]),
        ("relu.Config, ", "dict, ", ["Config", "frozen dataclass"]),
        ("def loss(", "def lost(", ["does not define loss"]),
        ("PARAMETERS = relu.PARAMETERS", WITH_A_TYPO, ["PARAMETERS", "witdh"]),
        ("import jax.numpy as jnp", "import jax.numppy", ["line 3", "ModuleNotFoundError"]),
        ("    B = len(f)", "    B = = len(f)", ["line 15", "SyntaxError"]),
        ("relu.encode, relu.decode", "relu.decode, relu.decode", ["encode", "TypeError"]),
        ("relu.decode\n", "lambda params, f: f\n", ["decode", "[16, 64]", "[16, 32]"]),
        ("f = encode(params, batch.inputs, config)", "f = encode(params, batch, config)", ["loss", "line 14"]),
        ("return total, Statistics", "return total[None], Statistics", ["the value of loss", "[1]"]),
        ("return total, Statistics", "return Statistics", ["loss", "(value, contract.Statistics)"]),
        ('"loss": total, ', "", ["means", "loss"]),
        ('"l0": l0}', '"l0": f}', ["means['l0']", "[16, 64]"]),
        ("(f > 0).any(0)", "(f > 0)", ["fired", "[16, 64]", "[64]"]),
        ("any(0), {})", 'any(0), {"b": l0})', ["state", "b"]),
    ],
)
def test_an_architecture_that_breaks_the_contract(old, new, facts, own_file):
    text = own_file.read_text()
    assert old in text
    own_file.write_text(text.replace(old, new))
    plugins.reread()
    stack = config_trees.convert(config_lib.Stack, Case.make("relu").stack(architecture="topk.py"))
    with refused("stacks.a.architecture", str(own_file), *facts):
        Stack.build("a", stack, {"blocks.0.hook_mlp_out": 32}, "float32")


@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        pytest.param(
            "f = encode(params, batch.inputs, config)",
            "f = encode(params, batch.inputs, config); f = jnp.where(f >= jnp.sort(f, 1)[:, -4:-3], f, 0)",
            ("l0 is", "instead of 4"),
            id="top-k",
        ),
        pytest.param("shards.sum(", "(", ("l0 is",), id="no sum"),
        pytest.param("", "", (), id="right"),
    ],
)
def test_a_loss_that_is_another_one_on_shards(old, new, facts, own_file):
    own_file.write_text(own_file.read_text().replace(old, new))
    plugins.reread()
    stack = config_trees.convert(config_lib.Stack, Case.make("relu").stack(architecture="topk.py"))
    sites = {"blocks.0.hook_mlp_out": 32}
    Stack.build("a", stack, sites, "float32", latent=1)
    with refused("mesh.latent", str(own_file), *facts) if facts else contextlib.nullcontext():
        Stack.build("a", stack, sites, "float32", latent=4)


def test_modules_that_are_not_there():
    for name, facts in {"tanh": ["tanh.py", "known"], "no.such": ["'no.such'"], "nothing.py": ["nothing.py"]}.items():
        with refused("", *facts):
            contract.module_of(name)


def test_an_option_without_a_default_has_to_be_given(own_file):
    own_file.write_text(
        "import dataclasses\nfrom gsae_jax.saes.relu import PARAMETERS, init, loss\n"
        "from gsae_jax.saes.relu import decode, encode\n\n\n@dataclasses.dataclass(frozen=True)\nclass Config:\n"
        "    d_in: int\n    width: int\n    k: float\n    dtype: str = 'float32'\n"
    )
    plugins.reread()
    architecture = contract.trainable("topk.py")
    with refused("options.k", "missing"):
        contract.build_config(architecture, "topk.py", (8,), None, 16, "float32", {})
    assert contract.build_config(architecture, "topk.py", (8,), None, 16, "float32", {"k": 3}).k == 3.0
