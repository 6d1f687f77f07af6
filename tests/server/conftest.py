"""What two files share: xdist gives both to one worker (tests/support/units_of_work.py)."""

import pytest


@pytest.fixture(scope="session")
def hidden_model(tmp_path_factory):
    from tiny_models import make_llama

    return make_llama(tmp_path_factory.mktemp("model") / "hidden-folder")


@pytest.fixture(scope="session")
def evicting_server(hidden_model, tmp_path_factory):
    from evicting_server import start

    running = start(hidden_model, tmp_path_factory.mktemp("server"))
    try:
        yield running.wait_ready()
    finally:
        running.stop()
