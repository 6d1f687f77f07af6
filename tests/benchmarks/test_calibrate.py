"""`momentkv calibrate`: from texts to items, from results to the smallest budget, and the command as a user runs it."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation.quality.wording import Compact
from real_model import folder
from transformers import AutoTokenizer

from momentkv_vllm.calibrate import curve, run, texts
from momentkv_vllm.calibrate.curve import Point
from momentkv_vllm.calibrate.items import Reader, hidden_code
from momentkv_vllm.cli import main

MOMENTKV = str(Path(sys.executable).parent / "momentkv")
CHECKPOINT = Path(__file__).parents[2] / "benchmarks/test_model/checkpoint"
MODEL = folder.find()


def point(budget, kl, found=2, findable=4):
    return Point(budget, kl, 0.0, math.exp(kl), found, findable, budget or 2048, 10.0)


@pytest.mark.parametrize(
    ("kls", "best"),
    [
        ({512: 0.01, 256: 0.04, 128: 0.3}, 256),
        # By chance a smaller budget is within the tolerance and a larger one is not.
        ({512: 0.01, 256: 0.06, 128: 0.04}, 512),
        ({512: 0.05, 256: 0.05}, 256),
        ({512: 0.06, 256: 0.01}, None),
    ],
)
def test_the_smallest_budget_has_only_good_ones_above_it(kls, best):
    points = [point(0, 0.0), *(point(budget, kl) for budget, kl in kls.items())]
    for order in (points, points[::-1]):
        found = curve.smallest(order, 0.05)
        assert (found and found.budget_tokens) == best


def test_a_point_compares_with_the_full_cache_item_by_item():
    def items(*values):
        return [{"loss": loss, "kl": kl, "found": found} for loss, kl, found in values]

    full = items((1.0, 0, False), (3.0, 0, False)), items((0, 0, True), (0, 0, True), (0, 0, False))
    mine = items((1.2, 0.1, False), (3.4, 0.3, False)), items((0, 0, True), (0, 0, False), (0, 0, True))
    found = Point.of(256, mine, full, {"held_tokens": 240, "sequences": 7.5})
    assert (found.kl, found.kl_error) == (pytest.approx(0.2), pytest.approx(0.1))
    assert found.perplexity == pytest.approx(math.exp(0.3))
    assert (found.found, found.findable) == (1, 2), "of the two codes that the full cache finds"
    none = Point.of(256, (mine[0][:1], []), (full[0][:1], []), {"held_tokens": 240, "sequences": 7.5})
    assert none.findable == 0 and none.kl_error == 0
    assert "| 256    | 0.2000 +-0.1000 | x 1.350    | 1 of 2      | 240         | 7.5                |" in curve.table(
        [found], 4
    )


def test_bars_on_a_terminal():
    lines = curve.bars([point(0, 0.0), point(512, 0.05), point(128, 0.2)], 0.1, width=8).splitlines()
    assert lines == ["  full     |     0.0000", "   512 ##  |     0.0500", "   128 ####|#### 0.2000"]


@pytest.mark.parametrize("codes", [4, 0])
def test_plot(tmp_path, codes):
    pytest.importorskip("matplotlib")
    curve.plot([point(b, kl, 0, codes) for b, kl in ((0, 0.0), (256, 0.1), (128, 0.2))], 0.05, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.startswith("<?xml") and drawn.count('<g id="axes_') == (2 if codes else 1)


def test_texts_of_every_form(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    rows = [{"text": "one", "input": "x"}, {"input": "two"}, {"id": 3, "document": "three"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert texts.read(tmp_path) == ["first", "second"]
    assert texts.read(tmp_path / "b.txt") == ["second"]
    assert texts.read(tmp_path / "rows.jsonl") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "is no .txt file, .jsonl file or folder of .txt files; name one that exists"),
        ("a.csv", "x", "a.csv is no .txt file"),
        ("a.txt", " ", "holds 0 texts, legal are 1 and more; give"),
        ("a.jsonl", '{"text": "x"}\nno', "line 2 is not JSON: .*; write one object per line"),
        ("a.jsonl", '{"prompt": "x"}', "line 1 has no text under any of text, input, document"),
        ("a.jsonl", '{"text": 3}', "line 1 has no text"),
        ("a.jsonl", "[1]", "line 1 has no text"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"--texts .*{message}"):
        texts.read(tmp_path / name)


def test_stretches_take_turns_and_share_no_token():
    long, short, tiny = list(range(1000)), list(range(2000, 2300)), list(range(3000, 3010))
    found = texts.stretches([long, short, tiny], 301, 4, before=1)
    assert found == [long[:300], short, long[300:600], long[600:900]]
    assert texts.stretches([long, short, tiny], None, 2) == [long[:300], short], "as long as two texts are"
    assert len(texts.stretches([list(range(5000))], None, 8)) == 2, "of 2,048 tokens"
    with pytest.raises(
        ValueError, match=r"--context 10 is too short, legal is 256 tokens .* longest text has 1000; .*"
    ):
        texts.stretches([long, short, tiny], None, 8)
    with pytest.raises(ValueError, match="--context 1002 is too long, legal is 256 to 1001 tokens"):
        texts.stretches([long, tiny], 1002, 8, before=1)


@pytest.mark.parametrize("model", [CHECKPOINT, MODEL], ids=["no digits", "real"])
def test_a_hidden_code_takes_the_place_of_text(model):
    if model is None:
        pytest.skip(folder.WHY_NOT)
    reader = Reader(AutoTokenizer.from_pretrained(model))
    ids = (reader.ids("The hills are wide and the river is slow today. ") * 60)[:500]
    item = hidden_code(reader, random.Random(0), ids, 0.5)
    assert len(item.prompt) + len(item.answer) == 500
    if model == CHECKPOINT:
        assert item.counted == (), "a tokenizer without digits cannot be asked"
        return
    prompt, code = reader.tokenizer.decode(item.prompt), reader.tokenizer.decode(item.answer).strip()
    assert len(code) == 7 == len(item.counted) and prompt.count(code) == 1 and prompt.endswith(" is")
    assert 0.4 < prompt.index(code) / len(prompt) < 0.6


@pytest.fixture
def words(tmp_path):
    """Two texts of the test model's words, 600 of them each."""
    chance = random.Random(0)
    rows = [{"text": " ".join(Compact().text(chance, 600))} for _ in range(2)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "words.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budgets", "512"], "--budgets 512: legal is 1 to 511, below the context; raise --context"),
        (["--budgets", "32"], "kv_eviction.budget_tokens=32 is too small"),
        (["--kv-eviction", "off"], "--kv-eviction off evicts nothing; name a policy"),
        (["--kv-eviction-config.store_dtype", "int5"], "kv_eviction.store_dtype='int5' is not one of"),
        (["--kv_budget=64"], "--kv-budget is what calibrate looks for"),
        (["--items", "0"], "--items 0: legal is above 0"),
        (["--tolerance", "nan"], "--tolerance nan: legal is above 0"),
        (["--plot", "curve.pdf"], "legal endings are .png and .svg"),
        (["--json", "/none/curve.json"], "--json /none/curve.json: there is no such folder; make it"),
        (["--context", "4000"], "--context 4000 is too long"),
        (["--model", "/none"], "--model /none .*; name a checkpoint that `vllm serve` loads"),
        (["--tensor-parallel-size", "2"], "2 devices, legal is 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_an_engine_starts(options, message, words, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure_all", lambda *_: pytest.fail("an engine would start"))
    given = ["--model", str(CHECKPOINT), "--texts", str(words), "--context", "512", *options]
    monkeypatch.setattr(sys, "argv", ["momentkv", "calibrate", *given])
    assert main() == 2
    said = capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


def test_items_are_as_long_as_the_context_and_begin_once(words, monkeypatch):
    """The test model's tokenizer puts <s> before every text."""
    found = []
    monkeypatch.setattr(
        run, "measure_all", lambda job, budgets, _: found.append((job, budgets)) or ([point(0, 0.0)], 1.0)
    )
    monkeypatch.setattr(sys, "argv", ["momentkv", "calibrate", "--model", str(CHECKPOINT), "--texts", str(words)])
    assert main() == 0
    ((job, budgets),) = found
    assert (job.context, job.texts, budgets) == (min(len(t.split()) for t in texts.read(words)) + 1, 2, [128, 288])
    for item in job.items:
        assert len(item.prompt + item.answer) == job.context and len(item.answer) == job.context // 4
        assert (item.prompt[0], (item.prompt + item.answer).count(1)) == (1, 1)


def test_unknown_options_are_refused(words, monkeypatch, capsys):
    for given in (
        ["calibrate", "--model", str(CHECKPOINT), "--texts", str(words), "--tolerence", "1"],
        ["doctor", "--tolerence", "1"],
    ):
        monkeypatch.setattr(sys, "argv", ["momentkv", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and "unrecognized arguments: --tolerence" in capsys.readouterr().err


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, momentkv_vllm.cli; assert not {'torch', 'vllm', 'transformers', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


class Deadly:
    """Ends the process that reads it, as the system does when memory is short."""

    def __reduce__(self):
        return os._exit, (9,)


def test_an_engine_that_the_system_ends_is_said():
    with pytest.raises(
        ValueError, match="process was ended, for want of memory most likely; lower --kv-cache-memory-b"
    ):
        run.measure_all(run.Job("m", (), 512, (Deadly(),), 1), [128], None)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_model_without_weights_is_refused(words, tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    command = [MOMENTKV, "calibrate", "--model", "model", "--texts", str(words), "--context", "512"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback (most" not in done.stderr.split("momentkv calibrate:")[-1]
    assert "momentkv calibrate: --model model does not load here: " in done.stderr
    assert "; name a checkpoint that `vllm serve` loads" in done.stderr


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_calibrate_as_a_user_runs_it(words, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in CHECKPOINT.iterdir()}
    out, settings = tmp_path / "curve.json", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # Both engines would compile the model; what is measured is not what that changes.
    policy = ["--kv-eviction", "keydiff", "--kv-eviction-config.window_tokens", "32", "--enforce-eager"]
    done = subprocess.run(
        [MOMENTKV, "calibrate", "--model", str(CHECKPOINT), "--texts", str(words), "--context", "512", "--budgets", "128",
         "--tolerance", "9", "--pool-gib", "2", "--json", str(out), *policy],
        capture_output=True, text=True, cwd=tmp_path, env=settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"words.jsonl", "curve.json"}
    assert {p: p.stat().st_mtime_ns for p in CHECKPOINT.iterdir()} == before
    found = json.loads(out.read_text())
    assert (found["context"], found["texts"], found["codes"], found["budget_tokens"]) == (512, 2, 0, 128)
    full, small = (Point(**p) for p in found["points"])
    assert (full.kl, full.perplexity, full.held_tokens) == (0, 1, 512)
    # 4 layers, 2 heads of 32 numbers, key and value in bfloat16: 1 KiB per token.
    assert full.sequences == pytest.approx(2**31 / 512 / 1024, rel=1e-3)
    assert small.held_tokens == 128 and small.sequences == pytest.approx(4 * full.sequences, rel=1e-3)
    assert 1e-3 < small.kl < 5
    command = f"vllm serve {CHECKPOINT} --kv-eviction keydiff --kv-eviction-config.window_tokens 32 --enforce-eager --kv-budget 128"
    assert found["command"] == command and command in done.stdout
    assert curve.table([full, small], 2) in done.stdout
    assert "full cache and budgets: 100%" in done.stderr
