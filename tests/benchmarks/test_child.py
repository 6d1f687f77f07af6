"""Measurements in processes of their own."""

import os

import child

CARRIED = "import child\nchild.tell(child.task() | {'carried': True})\n"


def test_a_child_finds_what_was_carried_to_the_machine(tmp_path, monkeypatch):
    """On PYTHONPATH, as gpu/pack.py has it; not what lies under relative paths, which mean something else there."""
    (tmp_path / "carried_here.py").write_text(CARRIED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", "", str(tmp_path)]))
    assert list(child.results("carried_here", {"a": 1})) == [{"a": 1, "carried": True}]
