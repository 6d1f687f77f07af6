"""Tables of README.md and docs/ that follow from code and committed results. `make docs` writes them, one test compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import load.run
import report
from evaluation.judge import show
from family_settings import FAMILIES, PUBLISHED
from named_files import DOCUMENTS, ROOT
from serving import drafts as drafting

from momentkv_vllm import config
from momentkv_vllm.calibrate.curve import Point
from momentkv_vllm.calibrate.curve import table as calibration
from momentkv_vllm.config import AUTO, EvictionConfig
from momentkv_vllm.metrics import METRICS
from momentkv_vllm.policies import OFF, builtins
from momentkv_vllm.versions import TESTED_VLLM, UNTESTED_VLLM

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:.*?\n)??(<!-- end -->)", re.S)
CHOICES = {
    "prefill": config.PREFILL_MODES,
    "correction": config.CORRECTIONS,
    "moment_dtype": config.MOMENT_DTYPES,
    "store_dtype": config.STORE_DTYPES,
    "run_tokens": (AUTO, *config.RUN_TOKENS),
    "head_budgets": config.HEAD_BUDGETS,
    "key_rounding": config.KEY_ROUNDINGS,
    "kernels": config.KERNELS,
}
"""Legal values of the settings that are no counts."""
CHOSEN_CELLS = (
    ("full cache", None),
    ("fp8 KV", None),
    ("momentkv", 512),
    ("momentkv", 256),
    ("momentkv", 128),
    ("streamingllm", 256),
)
"""Method and budget of the README's rows; codes are asked in 1,024 tokens, the rest in 2,048."""


def results(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["results"]


def rows(guide: str, heading: str) -> list[list[str]]:
    """Cells of the table with the heading row `heading`."""
    body = (ROOT / "docs" / guide).read_text().split(heading)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]


def markdown(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return report.compact([[_cell(c) for c in line] for line in (heading, *rows)])


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _span(figures: Iterable[float]) -> str:
    figures = list(figures)
    low, high = f"{min(figures):.2f}", f"{max(figures):.2f}"
    return low if low == high else f"{low}-{high}"


def policies() -> str:
    def defaults(policy) -> str:
        return ", ".join(f"`{key}` {value}" for key, value in policy.defaults.items())

    rows = [(f"`{name}`", p.summary, p.source, defaults(p)) for name, p in builtins().items()]
    return markdown(("policy", "a token's score (higher stays)", "source", "its own defaults"), rows)


def policy_names() -> str:
    return markdown(("policy", "which tokens stay"), [(f"`{name}`", p.summary) for name, p in builtins().items()])


def flags() -> str:
    rows = [
        (f"`--kv-eviction {{{','.join([OFF, *builtins()])}}}`", "the policy; `off` is stock vLLM"),
        (
            "`--kv-budget TOKENS`",
            "KV tokens per sequence, moment state included; the key `budget_tokens`. Several, as `1024,4096,off` or "
            "`small=1024,exact=off`: [classes that a request chooses from](#a-budget-per-request), the key `budgets`",
        ),
        ("`--kv-eviction-config JSON`", "the keys below, as JSON or dotted: `--kv-eviction-config.window_tokens 64`"),
    ]
    return markdown(("flag", "meaning"), rows)


def settings() -> str:
    """From the attributes in the docstring of EvictionConfig."""
    described = (EvictionConfig.__doc__ or "").split("Attributes:\n")[1]
    meanings = dict(re.findall(r"^\s{8}(\w+): ((?:.|\n\s{12})+)", described, re.M))
    rows = []
    for f in fields(EvictionConfig):
        meaning = re.sub(r"\s+", " ", meanings[f.name]).strip().replace('"', "`").rstrip(".")
        meaning = meaning.replace(f"None (`{AUTO}`)", f"`{AUTO}`")
        values = ", ".join(f"`{v}`" for v in CHOICES.get(f.name, ()))
        unset = f"`{AUTO}`" if f"`{AUTO}`" in meaning else "-"
        rows.append((f"`{f.name}`", unset if f.default is None else f"`{f.default}`", values, meaning))
    return markdown(("key", "default", "values", "meaning"), rows)


def metrics() -> str:
    return markdown(("metric", "type", "meaning"), [(f"`{m.shown}`", m.kind, m.help) for m in METRICS])


def gains() -> str:
    """What the README promises first, each from its benchmark's results."""
    heading, stock, ours, *_ = results("demo")["table"]
    wanted = ("while it answers", "pool tokens", "right, over documents", "same words as stock")
    held, pool, right, same = map(heading.index, wanted)
    serving_found, again = results("serving"), results("resume")
    decode = next(
        r["speedup"] for r in serving_found["decode"] if (r["head_dim"], r["context"], r["batch"]) == (128, 8192, 8)
    )
    full, quarter = (show.summary([_judged(*cell)])[1] for cell in (("full cache", None), ("momentkv", 256)))
    long = {c["method"]: c["figures"]["text_8k"]["KL"][0] for c in results("judge_text_8k")["cells"]}
    share = {e: f"{100 * again[f'conversations, small pool, {e}']['share']:.0f} %" for e in ("stock", "momentkv")}
    rows = [
        ("KV memory of an answering sequence, in tokens", stock[held], ours[held], "`make demo`, budget 512"),
        ("KV pool, in tokens, for four users at a time", stock[pool], ours[pool], "`make demo`"),
        ("facts it then finds in documents", stock[right], ours[right], f"`make demo`, {float(ours[same]):.0%} of the words the same"),
        ("codes found with a quarter of the memory", full, quarter, "`make bench NAME=quality`, SmolLM2-135M"),
        (
            "KL to the full cache, texts of 8,192 tokens",
            f"fp8 KV, half of the memory: {long['fp8 KV']:.3f}",
            f"an eighth of the memory: {long['momentkv']:.3f}",
            "`evaluation.judge.run --kinds text_8k`, budget 1,024",
        ),
        ("sequences at a time in one pool", "1x", f"{serving_found['pool']['ratio']:.1f}x", "`make bench NAME=serving`, prompts of 2,048, budget 512"),
        ("decode tokens/s, 8K context, batch 8", "1x", f"{decode:.1f}x", "`make bench NAME=serving`, budget 1,024, 2 CPU cores"),
        ("prompt tokens computed in chats that outgrow the pool", share["stock"], share["momentkv"], "`make bench NAME=resume`, 20 turns"),
    ]  # fmt: skip
    return markdown(("", "stock vLLM", "with momentkv", "measured by"), rows)


def _judged(method: str, budget: int | None) -> dict[str, Any]:
    """The cell of the real model; in `chunked` prefill."""
    (cell,) = (
        c
        for c in results("judge_engine_report")["cells"]
        if c["method"] == method and c["prefill"] in ("", None, "chunked") and budget in (None, c["budget_tokens"])
    )
    return cell


def models() -> str:
    def verdict(family) -> str:
        return f"refused: {family.refused}" if family.refused else "served"

    def also(family: str) -> str:
        named = [(name.split(" ")[0], p.given) for name, p in PUBLISHED.items() if p.family == family]
        return ", ".join(name if given == "text" else f"{name} ({given})" for name, given in named)

    rows = [(name, f.model_class, also(name), f.special, verdict(f)) for name, f in FAMILIES.items()]
    return markdown(("family", "class", "classes that also see or hear", "special", "with `--kv-eviction`"), rows)


def judged_short() -> str:
    """The README's rows of the real model."""
    rows = []
    for method, budget in CHOSEN_CELLS:
        kl, codes, _, answers = show.summary([_judged(method, budget)])
        rows.append((f"`{method}`, budget {budget}" if budget else method, kl, codes, answers))
    return markdown(("", "KL", "codes found", "answers, nats per token over the full cache"), rows)


def judged_long() -> str:
    """Texts of two lengths; not every method read both."""
    found = {}
    for place, kind in enumerate(("text_4k", "text_8k")):
        for cell in results(f"judge_{kind}")["cells"]:
            pairs = (cell["figures"][kind][column] for column in ("KL", "x full"))
            row = found.setdefault(cell["method"], ["-"] * 4)
            row[2 * place : 2 * place + 2] = ["{:.3f} +-{:.3f}".format(*pair) for pair in pairs]
    columns = [f"{figure}, {length}" for length in ("4,096", "8,192") for figure in ("KL", "perplexity over full")]
    return markdown(("", *columns), [(method, *row) for method, row in found.items()])


def speed_short() -> str:
    by = {(r["context"], r["batch"]): r["speedup"] for r in results("serving")["decode"]
          if r["head_dim"] == 128 and "speedup" in r}  # fmt: skip
    batches = (1, 8, 32)
    rows = [(f"{c:,}", *(by.get((c, b), "-") for b in batches)) for c in sorted({c for c, _ in by})]
    return markdown(("context", *(f"batch {b}" for b in batches)), rows)


def serving() -> str:
    columns = ("head_dim", "context", "batch", "speedup", "bytes_bound")
    rows = [[r[c] for c in columns] for r in results("serving")["decode"] if "speedup" in r]
    return markdown(("d", "context", "batch", "decode tokens/s over stock", "bytes bound"), rows)


def serving_rest() -> str:
    found = results("serving")
    pool, overhead = found["pool"], found["overhead"]
    rows = [
        (f"sequences at a time in a pool of {pool['pool_tokens']:,} tokens, over stock's (budget 512)", pool["ratio"]),
        ("what the pages allow", pool["arithmetic"]),
        ("decode speed with eviction off, over vLLM without this package", f"{overhead['off_to_stock']:.3f}"),
        ("decode speed below the budget, over the same", f"{overhead['under_budget_to_stock']:.3f}"),
        ("spread of stock's own repeats", f"{100 * overhead['spread_of_stock']:.1f} %"),
    ]
    return markdown(("figure", "measured"), rows)


def first_token() -> str:
    found: dict[str, list[str]] = {}
    for r in results("first_token"):
        found.setdefault(r["model"], []).append(f"{r['context']:,}: {r['momentkv']:.2f} ({r['coarse']:.2f})")
    heading = "model", "tokens of the prompt: time over stock's (with `prefill_retire_tokens` 512)"
    return markdown(heading, [(name, ", ".join(ratios)) for name, ratios in found.items()])


def kernels() -> str:
    rows = [(a["shape"], a["attend_to_vllm"], a["corrected_to_attend"]) for a in results("kernels")["attend"]]
    return markdown(("attend over the same tokens", "time / vLLM's kernel", "with correction / without"), rows)


def store() -> str:
    found = results("store")

    def spans(to: str) -> str:
        by = {d: [r[to] for r in found["attend"] if r["store_dtype"] == d] for d in ("int8", "int4")}
        return " / ".join(_span(by[d]) for d in ("int8", "int4"))

    int4 = [r for r in found["events"] if r["store_dtype"] == "int4"]
    rows = [
        (
            "attention over an int8 / int4 store, time over that of a 16-bit store of the same bytes",
            spans("to_same_bytes"),
        ),
        ("... of a 16-bit store of the same tokens", spans("to_same_tokens")),
        ("retiring tokens, share of decode attention at budget 1,024", _span(r["retiring_share"] for r in int4)),
        ("observing a query, share of its attention", _span(r["observing_share"] for r in int4)),
    ]
    return markdown(("figure", "measured"), rows)


def resume() -> str:
    found = results("resume")
    rows = []
    for load_name in ("conversations", "documents"):
        for pool in ("ample", "small"):
            engines = (
                found.get(f"{load_name}, {pool} pool, {e}") for e in ("stock", "momentkv", "momentkv, no states")
            )
            rows.append((f"{load_name}, {pool} pool", *(f"{100 * e['share']:.1f} %" if e else "-" for e in engines)))
    return markdown(("prompt tokens computed", "stock", "momentkv", "momentkv, no states"), rows)


def turns() -> str:
    found, shown = results("resume")["time"]["turns"], (2, 5, 10, 15, 20)
    rows = [(name, *(row[turn - 1] / row[1] for turn in shown)) for name, row in found.items()]
    return markdown(("time to first token, over that of turn 2", *(f"turn {turn}" for turn in shown)), rows)


def prefix() -> str:
    rows = [(f"{r['system_tokens']:,}", r["saving_to_stock"]) for r in results("prefix")]
    return markdown(("tokens of the system prompt", "prompt tokens saved, over stock's saving"), rows)


def drafts() -> str:
    (table,) = drafting.tables(results("drafts"))
    return markdown(table[0], table[1:])


def demo() -> str:
    heading, *rows = results("demo")["table"]
    return markdown(heading, [[f"{c:.3f}" if isinstance(c, float) else c for c in row] for row in rows])


def calibrated() -> str:
    found = json.loads((ROOT / "benchmarks/results/calibrate.json").read_text())
    curve = calibration([Point(**p) for p in found["points"]], found["pool_gib"])
    best = f"The smallest budget within {found['tolerance']:g} nats per token:\n  {found['command']}"
    return f"```text\n{curve}\n\n{best}\n```"


def memory() -> str:
    rows = []
    for cell in results("memory"):
        resident = cell["samples"]["resident"]
        kept = {"default": "1,024 (default)"}.get(cell["primitives"], cell["primitives"])
        growth = f"{100 * cell['growth_of_second_half']:.1f} %"
        rows.append((cell["engine"], kept, f"{resident[0]:.0f} to {resident[-1]:.0f}", growth))
    return markdown(("engine", "products kept", "resident MiB", "growth of the second half"), rows)


def states() -> str:
    rows = [(name, f"{c['mean']:.3f}", f"{c['kl']:.4f}") for name, c in results("states")["cells"].items() if "kl" in c]
    return markdown(("score / state / window / budget / prefill", "mean accuracy", "KL"), rows)


def vllm_releases() -> str:
    known = [(version, f"tested: {how}") for version, how in TESTED_VLLM.items()]
    known += [(version, f"not tested: {why}") for version, why in UNTESTED_VLLM.items()]
    return markdown(["vLLM", "what was run"], known)


def toys() -> str:
    """The small test models, by budget of 1,024 tokens: accuracy by the tasks model, KL by the code model."""
    found = {n: {(c["method"], c["budget_tokens"]): c for c in results(n)["cells"]} for n in ("toy_tasks", "toy_code")}
    tasks, code = found["toy_tasks"], found["toy_code"]
    rows = [("full cache", "-", "{mean:.3f} +-{error:.3f}".format(**tasks["full cache", 0]), "0")]
    for method, budget in tasks:
        if budget and (method, budget) in code:
            accuracy = "{mean:.3f} +-{error:.3f}".format(**tasks[method, budget])
            rows.append((method, budget, accuracy, f"{code[method, budget]['kl']:.3f}"))
    return markdown(("", "budget", "mean accuracy", "KL"), rows)


def unseen() -> str:
    """Models that no setting was chosen on: needles, the mean of one and of many, and copies of each, by budget and method."""
    rows = results("unseen")
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["budget"], row["method"], row["model"]): row for row in rows}
    made = []
    for budget, method in dict.fromkeys((row["budget"], row["method"]) for row in rows):
        cells = [found[budget, method, model] for model in models]
        scores = [(sum(c[t][0] for t in ("single", "multikey")) / 2, c["copy"][0], c["kl"]) for c in cells]
        made.append((budget or "-", method, *("{:.2f} / {:.2f} / {:.2f}".format(*s) for s in scores)))
    return markdown(("budget", "", *models), made)


TABLES: dict[str, Callable[[], str]] = {
    "calibration": calibrated,
    "demo": demo,
    "drafts": drafts,
    "flags": flags,
    "gains": gains,
    "judge": lambda: show.overview(results("judge_engine_report")["cells"]),
    "judge-correction": lambda: show.overview(results("judge_correction")["cells"]),
    "judge-full": lambda: show.overview(results("judge_full_prefill")["cells"]),
    "judge-short": judged_short,
    "judge-long": judged_long,
    "kernels": kernels,
    "load": lambda: report.compact(load.run.table(results("load")["rows"])),
    "memory": memory,
    "metrics": metrics,
    "models": models,
    "policies": policies,
    "policy-names": policy_names,
    "prefix": prefix,
    "resume": resume,
    "serving": serving,
    "serving-rest": serving_rest,
    "first-token": first_token,
    "settings": settings,
    "speed-short": speed_short,
    "states": states,
    "store": store,
    "toys": toys,
    "unseen": unseen,
    "turns": turns,
    "vllm-releases": vllm_releases,
}
"""By the name in a document."""


def updated(text: str) -> str:
    """`text` with every table as it should be. Raises KeyError for a name that is not in TABLES."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + "\n" + m[3], text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        before = document.read_text()
        if (after := updated(before)) != before:
            document.write_text(after)
            print(f"written {document.relative_to(ROOT)}")
