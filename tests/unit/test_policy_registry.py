"""Where policies come from: a file of the folder, or another installed package; and what happens when one is no good."""

import argparse
import importlib.util
import sys

import pytest
from policy_packages import MODULE, install

from momentkv_vllm import doctor, policies
from momentkv_vllm.config import EvictionConfig
from momentkv_vllm.vllm_seams.engine_args import _add_options


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`installed(package, **what)`: another package in this process, until the test ends."""

    def add(*args, **what):
        folder = tmp_path / f"site{len(list(tmp_path.iterdir()))}"
        install(folder, *args, **what)
        monkeypatch.syspath_prepend(folder)
        # What was imported under this name by another test is another file.
        monkeypatch.delitem(sys.modules, what["module"], raising=False)
        forget()

    yield add
    monkeypatch.undo()
    forget()


def forget():
    policies._claims.cache_clear()
    policies.find.cache_clear()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Help breaks lines at hyphens otherwise."""
    monkeypatch.setenv("COLUMNS", "9999")


def parser():
    return _add_options(argparse.ArgumentParser())


def test_a_policy_of_another_package_is_one_like_any_other(installed):
    installed("their-policy", version="1.2", module="their_module", name="theirs")
    assert policies.names()[-1] == "theirs" and policies.origin("theirs") == "their-policy 1.2"
    config = EvictionConfig.from_dict({"policy": "theirs", "sink_tokens": 2})
    assert config.policy_class.__module__ == "their_module"
    assert (config.window_tokens, config.sink_tokens) == (48, 2)
    assert parser().parse_args(["--kv-eviction", "theirs"]).kv_eviction == "theirs"
    assert "theirs: of their-policy 1.2" in parser().format_help()
    assert doctor.examine()["policies"]["theirs"] == {"from": "their-policy 1.2", "objection": ""}
    assert "theirs             their-policy 1.2\n" in doctor.as_text(doctor.examine())


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"source": "import a_module_that_is_not_there"}, "ModuleNotFoundError: No module named 'a_module_that_is"),
        ({"source": "raise SystemError('bad day')"}, "SystemError: bad day"),
        ({"source": "1 +"}, "SyntaxError"),
        ({"source": "Theirs = 3"}, "3 is not a subclass of momentkv_vllm.policies.Policy"),
        ({"source": MODULE.replace("theirs", "ours")}, "its class calls itself 'ours'"),
        ({"source": MODULE.replace("def score", "def rate")}, "it has no method score(tokens)"),
        ({"source": MODULE.replace("summary", "abstract")}, "it declares no summary"),
        (
            {"source": MODULE.replace("window_tokens", "window")},
            "has defaults for ['window']; legal keys are policy, budget",
        ),
    ],
)
def test_a_broken_one_is_refused_when_it_is_asked_for_and_harms_nobody_else(installed, what, reason):
    installed("their-policy", module="broken_module", name="theirs", **what)
    assert EvictionConfig.from_dict({"policy": "momentkv"}).policy_class.name == "momentkv"
    assert parser().parse_args(["--kv-eviction", "theirs"])
    with pytest.raises(ValueError) as error:
        EvictionConfig.from_dict({"policy": "theirs"})
    for word in ("'theirs' of their-policy 0.1", reason, "serve without --kv-eviction"):
        assert word in str(error.value)
    report = doctor.examine()
    assert report["problems"] == [] and report["policies"]["momentkv"]["objection"] == ""
    if "defaults" not in reason:
        assert reason in report["policies"]["theirs"]["objection"]


def test_a_name_taken_twice_is_refused_with_both(installed):
    installed("their-policy", module="one_module", name="theirs")
    installed("another-policy", version="3", module="other_module", name="theirs")
    with pytest.raises(
        ValueError, match="'theirs' is claimed by their-policy 0.1 and by another-policy 3; uninstall one, or"
    ):
        EvictionConfig.from_dict({"policy": "theirs"})
    assert EvictionConfig.from_dict({"policy": "h2o"}).policy_class.name == "h2o"


def test_nobody_takes_the_name_of_a_built_in_one_or_off(installed):
    installed("their-policy", module="one_module", name="momentkv")
    installed("another-policy", module="other_module", name="off")
    with pytest.raises(ValueError, match="'momentkv' is claimed by momentkv-vllm .* and by their-policy 0.1"):
        EvictionConfig.from_dict({"policy": "momentkv"})
    assert not EvictionConfig.from_dict({"policy": "off"}).active
    assert policies.names().count("momentkv") == 1 and "off" not in policies.names()


@pytest.fixture
def one_more_file(tmp_path, monkeypatch):
    """The folder of built-in policies with one file more."""
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def test_adding_a_policy_touches_one_file(one_more_file, monkeypatch):
    """Validation, options, help, doctor, the benchmarks' methods and the README's table all know it."""
    import documents
    from evaluation.quality import cells

    config = EvictionConfig.from_dict({"policy": "theirs"})
    assert config.window_tokens == 48 and config.policy_class().score is not None
    assert parser().parse_args(["--kv-eviction", "theirs"]).kv_eviction == "theirs"
    assert "theirs: a newer token scores higher." in parser().format_help()
    assert doctor.examine()["policies"]["theirs"]["from"].startswith("momentkv-vllm")
    # A second copy: a reload would give every later test other classes than its imports.
    spec = importlib.util.spec_from_file_location("cells_again", cells.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again.METHODS["theirs"] == {"policy": "theirs"}
    assert "| `theirs` | a newer token scores higher | a paper | `window_tokens` 48 |" in documents.policies()
    assert ",theirs," in documents.flags()


def test_two_files_of_one_name_are_refused(one_more_file):
    (one_more_file / "again.py").write_text(MODULE)
    with pytest.raises(ValueError, match="'theirs' is both momentkv_vllm.policies.again and .*policies.theirs"):
        policies.builtins()
