"""A server with a judge, its client, and planted features."""

import pytest

from gsae_jax import features as features_lib
from tests import planted
from tests.judge.common import SECRET, made, serving


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return planted.write(tmp_path_factory.mktemp("planted") / "planted.sqlite")


@pytest.fixture
def features(path):
    features = features_lib.Features(path)
    yield features
    features.close()


@pytest.fixture
def client(server, tmp_path):
    client = made(server, tmp_path / "replies.sqlite")
    yield client
    client.close()
