"""The doors by which an error of the user gets the name that the user knows."""

import pytest

from gsae_jax import errors
from gsae_jax.errors import UserError


def raised(problem, field, *doors):
    with pytest.raises(UserError) as caught:
        nested(problem, field, list(doors))
    return caught.value.field, caught.value.problem


def nested(problem, field, doors):
    if not doors:
        raise UserError(problem, field)
    with doors.pop(0):  # the first is the outermost
        nested(problem, field, doors)


def test_a_door_names_what_has_no_name():
    assert raised("is 3", "", errors.about("--steps")) == ("--steps", "is 3")
    assert raised("is 3", "lm.path", errors.about("--steps")) == ("lm.path", "is 3")
    assert raised("is 3", "", errors.about("outer"), errors.about("inner")) == ("inner", "is 3")
    assert raised("is 3", "step", errors.about("path", step="--step")) == ("--step", "is 3")


def test_a_group_comes_before_the_field():
    assert raised("is 3", "width", errors.within("stacks"), errors.within("gated")) == ("stacks.gated.width", "is 3")
    assert raised("is 3", "", errors.within("train")) == ("train", "is 3")


def test_a_cause_keeps_what_the_error_named():
    door = errors.caused_by("start_from")
    assert raised("is not JSON", "a/cfg.json", door) == ("start_from", "a/cfg.json: is not JSON")
    assert raised("x is not here", "", errors.caused_by("start_from")) == ("start_from", "x is not here")


def test_an_error_is_one_line_without_what_a_terminal_would_act_on():
    assert str(UserError("has\n  \x1b[2J in it", "lm.path")) == r"lm.path: has \x1b[2J in it"
    assert str(UserError("x is not here")) == "x is not here"
