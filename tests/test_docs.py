"""The guides against the code and the committed results."""

import json
import re

import pytest
from named_files import ROOT, missing_files

GUIDES = sorted((ROOT / "docs").glob("*.md"))


def results(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["results"]


def rows(guide: str, heading: str) -> list[list[str]]:
    """Cells of the table with the heading row `heading`."""
    body = (ROOT / "docs" / guide).read_text().split(heading)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.name)
def test_files_links_and_targets_that_a_guide_names_exist(guide):
    text = guide.read_text()
    assert text.count("\n") < 150
    assert missing_files(guide) == []
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (guide.parent / link).exists(), link
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert f"\n{target}:" in targets, target
    for page, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", (guide.parent / page if page else guide).read_text(), re.M)
        assert anchor in [h.lower().replace(" ", "-") for h in headings], anchor


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.name)
def test_metrics_that_a_guide_names_exist(guide):
    from momentkv_vllm.metrics import METRICS

    shown = {m.shown for m in METRICS} | {f"{m.name}_{end}" for m in METRICS if m.bounds for end in ("sum", "count")}
    for name in re.findall(r"momentkv:\w+", guide.read_text()):
        assert name in shown, name


def test_messages_of_the_troubleshooting_guide_are_in_the_code():
    """Each row's first quoted piece, and every option we refuse has a row."""
    source = "".join(p.read_text() for p in (ROOT / "momentkv_vllm").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings continued on the next line
    theirs = ("unrecognized arguments", "Found endpoint plugin(s)", "Using custom scheduler class")
    theirs += ("operator torchvision::nms", "No module named 'torchvision'")
    for heading in ("| message contains | why | do |", "| line | means |"):
        for first, *_ in rows("troubleshooting.md", heading):
            for quoted in re.findall(r"`([^`]+)`", first):
                piece = quoted.removeprefix("does not support ").split(" ...")[0].strip()
                known = piece in source or piece.startswith(theirs) or "VLLM_PLUGINS" in piece
                assert known, f"{quoted!r} is no message of ours"


def test_speed_figures_are_those_of_the_committed_results():
    decode = {(r["context"], r["batch"]): r for r in results("serving")["decode"] if r["head_dim"] == 128}
    for context, *figures in rows("tuning.md", "| context | batch 1 | batch 8 | batch 32 |"):
        found = [decode.get((int(context), batch), {}).get("speedup") for batch in (1, 8, 32)]
        assert figures == [f"{x:.2f}" if x else "-" for x in found]


def test_the_calibration_is_that_of_the_committed_results():
    from momentkv_vllm.calibrate.curve import Point, smallest, table

    found = json.loads((ROOT / "benchmarks/results/calibrate.json").read_text())
    points, text = [Point(**p) for p in found["points"]], (ROOT / "docs/tuning.md").read_text()
    best = smallest(points, found["tolerance"])
    assert table(points, found["pool_gib"]) in text and f"\n  {found['command']}\n" in text
    assert found["budget_tokens"] == best.budget_tokens
    lost = best.findable - best.found
    assert ("It loses " in text) == (lost > 0) and (not lost or f"It loses {lost} of {best.findable} codes" in text)


def test_memory_figures_are_those_of_the_committed_results():
    want = []
    for cell in results("memory"):
        resident = cell["samples"]["resident"]
        kept = {"default": "1,024 (default)"}.get(cell["primitives"], str(cell["primitives"]))
        growth = f"{100 * cell['growth_of_second_half']:.1f} %"
        want.append([cell["engine"], kept, f"{resident[0]:.0f} to {resident[-1]:.0f}", growth])
    assert rows("operations.md", "| engine | products kept | resident MiB | growth of the second half |") == want


def test_the_cost_of_metrics_is_that_of_the_committed_results():
    from momentkv_vllm.attention.monitor import SAMPLE_EVERY, SAMPLE_ROWS

    found, text = results("metrics_cost"), (ROOT / "docs/operations.md").read_text()
    cost = found["microseconds"]
    for figure in (
        f"{cost['pages_changed']:.1f} us for a change", f"{cost['consolidation_timed']:.1f} us for a consolidation",
        f"{cost['sample'] / 1000:.1f} ms for a sample", f"{found['visit_microseconds']:.0f} us a layer visit",
        f"{100 * found['share_of_attention']:.1f} % of", f"every {SAMPLE_EVERY}th", f"up to {SAMPLE_ROWS} sequences",
    ):  # fmt: skip
        assert figure in text, figure
