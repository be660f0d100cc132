"""Collected features, and a study of them."""

import shutil

import pytest

import gsae_jax
from gsae_jax import studying
from gsae_jax.rating.study import Study
from tests.study.common import wanted


@pytest.fixture(scope="module")
def collected(collected_run):
    return gsae_jax.features.load(collected_run)


@pytest.fixture
def folder(collected_run, tmp_path):
    """A copy of the collected files, which a test may change."""
    shutil.copytree(collected_run / "features", tmp_path / "features")
    return tmp_path / "features"


@pytest.fixture
def made(collected_run, tmp_path):
    """A study of two people with three pairs each."""
    study = Study(studying.new(wanted(collected_run), str(tmp_path / "study")))
    yield study
    study.close()
