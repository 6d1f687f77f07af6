"""README tables against the code."""

import json
import re
from dataclasses import fields

import policy_table
import pytest
from judge.show import overview as judge_overview
from load.run import table as load_table
from model_families import table
from named_files import DOCUMENTS, ROOT, missing_files

from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.metrics import METRICS

README = (ROOT / "README.md").read_text()


def rows(first: str) -> dict[str, list[str]]:
    """Table rows whose first cell is in backquotes, after the heading cell `first`."""
    body = README.split(f"| {first} |")[1].split("\n\n")[0]
    found = re.findall(r"^\| `(.+?)` \|(.+)\|$", body, re.M)
    return {name: [c.strip() for c in rest.split(" | ")] for name, rest in found}


def test_config_keys_and_defaults():
    table = rows("key")
    assert list(table) == [f.name for f in fields(EvictionConfig)]
    for f in fields(EvictionConfig):
        assert table[f.name][0] == f"`{AUTO if f.default is None else f.default}`"


def test_flags_and_table_name_every_policy():
    assert policy_table.table() in README and policy_table.flag() in README, "run `make policies-table`"
    assert policy_table.updated(README) == README


def test_metrics():
    table = rows("metric")
    assert table == {m.shown: [m.kind, m.help] for m in METRICS}


def test_model_families():
    assert table() in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document):
    assert missing_files(document) == []


def test_wrong_names_are_seen_in_every_folder(tmp_path):
    """Paths of the package without its name, of sources, images and tests; no model names, no URLs' paths."""
    (tmp_path / "a.md").write_text(
        "`attention/eviction.py` `csrc/cpu/gone.h` `docker/gone.yaml` `tests/gone.py:3` `momentkv_vllm/gone/` "
        "`attention/layer.py` `tests/` `Qwen/Qwen3-4B` `/metrics`"
    )
    gone = ["attention/eviction.py", "csrc/cpu/gone.h", "docker/gone.yaml", "tests/gone.py", "momentkv_vllm/gone/"]
    assert missing_files(tmp_path / "a.md") == gone


def test_figures_of_quantised_stores_are_those_of_the_committed_results():
    found = json.loads((ROOT / "benchmarks/results/store.json").read_text())["results"]

    def span(rows, key, dtype):
        figures = [row[key] for row in rows if row["store_dtype"] == dtype]
        return f"{min(figures):.2f}-{max(figures):.2f}"

    by_bytes, by_tokens = (
        " / ".join(span(found["attend"], f"to_same_{what}", dtype) for dtype in ("int8", "int4"))
        for what in ("bytes", "tokens")
    )
    assert f"| 1.3 / 1.8 | {by_bytes} |" in README and f"| 0.8 / 0.7 | {by_tokens} |" in README
    retiring = {row["store_dtype"]: f"{row['retiring_share']:.2f}" for row in found["events"]}
    assert f"| 0.04 | {retiring['int4']} (16 bit: {retiring['model']}) |" in README
    assert f"| 0.1 | {span(found['events'], 'observing_share', 'int4')} |" in README


def test_measured_figures_are_those_of_the_committed_results():
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text())["results"]["table"]
    for row in demo[1:]:
        text = [f"{c:.3f}" if isinstance(c, float) else str(c) for c in row]
        assert "| " + " | ".join(text) + " |" in README, row
    judged = json.loads((ROOT / "benchmarks/results/judge_engine_report.json").read_text())["results"]["cells"]
    assert judge_overview(judged) in README
    states = json.loads((ROOT / "benchmarks/results/states.json").read_text())["results"]["cells"]
    table = (ROOT / "benchmarks/quality/README.md").read_text()
    for name, cell in states.items():
        if "kl" in cell:
            assert f"| {name} | {cell['mean']:.3f} | {cell['kl']:.4f} |" in table, name


def test_speed_figures_are_those_of_the_committed_results():
    kernels = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())["results"]
    serving = json.loads((ROOT / "benchmarks/results/serving.json").read_text())["results"]
    want = [[a["shape"], a["attend_to_vllm"], a["corrected_to_attend"]] for a in kernels["attend"]]
    columns = ("head_dim", "context", "batch", "speedup", "bytes_bound")
    want += [[r[c] for c in columns] for r in serving["decode"] if "speedup" in r]
    for row in want:
        text = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in row]
        assert "| " + " | ".join(text) + " |" in README, row
    pool, overhead = serving["pool"], serving["overhead"]
    assert f"{pool['ratio']:.2f}x as many sequences" in README and f"{overhead['off_to_stock']:.3f} with" in README
    load = json.loads((ROOT / "benchmarks/results/load.json").read_text())["results"]
    for row in load_table(load["rows"]).splitlines()[2:]:
        assert row in README
    busiest = [r["output_tokens_per_second"] for r in load["ratios"] if r["rate"] == 4]
    assert "{:.2f}x and {:.2f}x of stock's output".format(*busiest) in README
    prefix = json.loads((ROOT / "benchmarks/results/prefix_cache.json").read_text())["results"]
    assert f"prompt tokens saved {prefix[0]['saving_to_stock']:.2f} of" in README
    assert f"{prefix[1]['saving_to_stock']:.2f} with 1,536" in README
