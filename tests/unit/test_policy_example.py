"""The guide's policy (docs/policies.md): its code keeps the contract. As an installed package it is served in test_wheel.py."""

import re
import tomllib

from vatp_guide import GUIDE, PACKAGE, blocks, run_the_guide

from momentkv_vllm.policies import Policy


def test_the_guide_is_the_example_and_keeps_the_contract():
    code = blocks("python")[0]
    assert code == (PACKAGE / "momentkv_policy_vatp.py").read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    assert "check_policy(VATP)" in blocks("python")[-1]
    assert run_the_guide()["VATP"].name == "vatp"
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    (entry,) = blocks("toml")
    assert tomllib.loads(entry)["project"]["entry-points"] == project["entry-points"]
    assert f"{project['name']} {project['version']}" in GUIDE
    assert len([p for p in PACKAGE.iterdir() if p.is_file()]) == 3


def test_the_guide_has_every_declaration_with_its_default():
    body = GUIDE.split("| attribute | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
    said = {}
    for line in body.splitlines():
        attributes, default, _ = line.strip("| ").split(" | ", 2)
        said |= {name: default for name in re.findall(r"`(\w+)`", attributes)}
    absent = object()
    real = {name: getattr(Policy, name, absent) for name in Policy.__annotations__}
    shown = {"-": absent, '`""`': "", "`()`": (), "`{}`": {}, "`None`": None, "`False`": False}
    assert {name: shown[default] for name, default in said.items()} == real
