"""README and guides against the code and the committed results."""

import json
import re

import documents
import pytest
from documents import results, rows
from named_files import DOCUMENTS, ROOT, missing_files

GUIDES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_follow_from_code_and_results(document):
    text = document.read_text()
    assert documents.updated(text) == text, "run `make docs`"


def test_every_table_stands_in_a_document():
    stated = {name for d in DOCUMENTS for name in re.findall(r"^<!-- table: ([\w-]+) -->$", d.read_text(), re.M)}
    assert stated == documents.TABLES.keys()


def test_a_table_that_is_out_of_date_is_seen():
    text = "<!-- table: metrics -->\n<!-- end -->\nbetween\n<!-- table: flags -->\n| stale |\n<!-- end -->\n"
    made = documents.updated(text)
    assert (
        "`momentkv:live_pages`" in made and "`--kv-budget TOKENS`" in made and "between" in made and "stale" not in made
    )
    assert documents.updated(made) == made
    with pytest.raises(KeyError):
        documents.updated("<!-- table: gone -->\n<!-- end -->")


def test_the_readme_invites():
    """At most 160 lines, and no sentence above 30 words outside of tables and code."""
    text = README.read_text()
    assert text.count("\n") <= 160
    prose = re.sub(r"```.*?```|^\|.*?$|^<!--.*?$|^#.*?$", "\n\n", text, flags=re.S | re.M)
    prose = re.sub(r"\]\([^)]*\)|[*`\[]", "", prose)
    for sentence in re.split(r"[.:;?!](?:\s|$)|\n\s*\n|\n\* |\n\d\. ", prose):
        assert len(sentence.split()) <= 30, sentence


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


def test_the_calibration_of_the_guide_says_what_was_lost():
    from momentkv_vllm.calibrate.curve import Point, smallest

    found = json.loads((ROOT / "benchmarks/results/calibrate.json").read_text())
    best, text = (
        smallest([Point(**p) for p in found["points"]], found["tolerance"]),
        (ROOT / "docs/tuning.md").read_text(),
    )
    assert found["budget_tokens"] == best.budget_tokens
    lost = best.findable - best.found
    assert ("It loses " in text) == (lost > 0) and (not lost or f"It loses {lost} of {best.findable} codes" in text)


def anchors(text: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("guide", [README, *GUIDES], ids=lambda p: p.name)
def test_links_and_targets_that_a_guide_names_exist(guide):
    text = guide.read_text()
    assert guide == README or text.count("\n") < 150
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (guide.parent / link).exists(), link
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert f"\n{target}:" in targets, target
    for page, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        if not page.startswith("http"):
            assert anchor in anchors((guide.parent / page if page else guide).read_text()), anchor


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


def test_the_cost_of_metrics_is_that_of_the_committed_results():
    from momentkv_vllm.attention.monitor import SAMPLE_EVERY, SAMPLE_ROWS

    found, text = results("metrics_cost"), (ROOT / "docs/metrics.md").read_text()
    cost = found["microseconds"]
    for figure in (
        f"{cost['pages_changed']:.1f} us for a change", f"{cost['consolidation_timed']:.1f} us for a consolidation",
        f"{cost['sample'] / 1000:.1f} ms for a sample", f"{found['visit_microseconds']:.0f} us a layer visit",
        f"{100 * found['share_of_attention']:.1f} % of", f"every {SAMPLE_EVERY}th", f"up to {SAMPLE_ROWS} sequences",
    ):  # fmt: skip
        assert figure in text, figure


def test_clients_are_pinned_to_the_versions_that_their_page_names():
    table = rows("clients.md", "| client | script | environment | tested with |")
    pinned = 0
    for _, script, environment, version in table:
        assert (ROOT / script.strip("`")).exists()
        for file in re.findall(r"-r (\S+txt)", environment):
            name, number = version.lower().split()
            assert re.search(rf"^{name}(\[\w+\])?=={re.escape(number)}$", (ROOT / file).read_text(), re.M), version
            pinned += 1
    assert pinned == 3
