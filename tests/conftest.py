"""Shared fixtures: kernel families for kernel tests, real in-process vLLM engines for engine tests.

vLLM and transformers are imported where they are used: they take ten seconds, and neither xdist's first process nor the tests
that run kernel tests in a process of their own need them."""

import os

# One process, so that tests can look into the scheduler; must be set before vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Several pytest workers share the cores: one thread each, bound to none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# numba, which vLLM's n-gram drafter loads, otherwise sets OpenMP's threads to the number of cores: every kernel that runs later in
# the process then waits for two threads, 5 ms each time.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import pytest
from kernel_cases import FAMILIES

from momentkv_vllm.kernels import select

LONGEST_FIRST = ("test_interpreter.py", "server", "engine")


def pytest_collection_modifyitems(items):
    """The tests of engine/ and server/ start one. What takes longest starts first, so that no worker waits long for the other."""
    for item in items:
        if item.path.parent.name in ("engine", "server"):
            item.add_marker(item.path.parent.name)
    items.sort(key=lambda item: [name not in (item.path.name, item.path.parent.name) for name in LONGEST_FIRST])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") == "loadfile":
        from units_of_work import UnitsOfWork

        return UnitsOfWork(config, log)


@pytest.fixture(params=FAMILIES)
def kernels(request):
    return select(request.param)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`models(**options)` returns the folder of a tiny random Llama, made once a session."""
    from tiny_models import make_llama

    root = tmp_path_factory.mktemp("models")

    def make(**options):
        name = "-".join(f"{k}{v}" for k, v in sorted(options.items())) or "default"
        return make_llama(root / name, **options)

    return make


@pytest.fixture
def inspected_here(monkeypatch):
    """vLLM asks another process what a model class can do, lest CUDA be initialised; here that is only slow."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda ask: ask())


@pytest.fixture(scope="module")
def family_model(tmp_path_factory):
    """`family_model(name)` returns the folder of a tiny member of a model family."""
    from model_families import make_model

    root = tmp_path_factory.mktemp("families")
    return lambda name: make_model(name, root / name.replace(" ", "-"))


@pytest.fixture
def engine(models):
    """`engine(policy=..., budget_tokens=..., vllm options)` starts a real engine and checks its books at the end."""
    from engine import Engine

    running = []

    def start(model=None, **options):
        running.append(Engine(model or models(), **options))
        return running[-1]

    yield start
    for each in running:
        each.close()
