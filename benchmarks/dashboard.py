"""Draws the Grafana dashboard's panels from a real run: `vllm serve` under rising load, scraped by a real Prometheus.

Not a screenshot of Grafana: the same queries, as Prometheus answers them over time, drawn by matplotlib.
"""

import concurrent.futures
import random
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import openai
import report
from benchmark import Benchmark
from prometheus import Prometheus, panels
from server import Server
from tqdm import tqdm

sys.path.append(str(Path(__file__).parent.parent / "tests/support"))
from tiny_models import make_llama

PHASES = ((1, 300), (4, 2500), (10, 4000), (2, 120))
"""Clients at a time and prompt tokens at most: short prompts, long ones, more than the pool could hold in stock, quiet again."""

PHASE_SECONDS = 30
WINDOW = "10s"
POOL = ["--num-gpu-blocks-override", "161", "--max-num-batched-tokens", "512", "--max-model-len", "6000"]


def client(url: str, until: float, longest: int, seed: int) -> int:
    """Ask one prompt after the other; number of answers."""
    ask, rng, answers = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), random.Random(seed), 0
    while time.monotonic() < until:
        prompt = " ".join(f"w{rng.randrange(120)}" for _ in range(rng.randint(longest // 4, longest)))
        ask.completions.create(model="tiny", prompt=prompt, max_tokens=64, extra_body={"ignore_eos": True})
        answers += 1
    return answers


def load(url: str) -> int:
    answers = 0
    for clients, longest in tqdm(PHASES, desc="phases"):
        until = time.monotonic() + PHASE_SECONDS
        with concurrent.futures.ThreadPoolExecutor(clients) as threads:
            answers += sum(threads.map(lambda seed: client(url, until, longest, seed), range(clients)))  # noqa: B023
    return answers


def draw(prometheus: Prometheus, begin: float, end: float, path: Path) -> int:
    """All panels as one picture; how many of their queries had data."""
    shown = list(panels(WINDOW))
    figure, axes = plt.subplots(len(shown) // 3, 3, figsize=(15, 2.6 * len(shown) // 3), constrained_layout=True)
    drawn = 0
    for axis, (panel, queries) in zip(axes.flat, shown, strict=True):
        settings = panel["fieldConfig"]["defaults"]
        for legend, query in queries:
            series = prometheus.get("query_range", query=query, start=begin, end=end, step="1")["result"]
            drawn += bool(series)
            for one in series:
                label = legend
                for key, value in one["metric"].items():
                    label = label.replace(f"{{{{{key}}}}}", value)
                points = [(float(t) - begin, float(v)) for t, v in one["values"]]
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axis.set_title(f"{panel['title']}  [{settings['unit']}]", fontsize=9, loc="left")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, loc="upper left")
    figure.supxlabel("seconds; load changes every 30 s", fontsize=8)
    figure.savefig(path, dpi=80)
    return drawn


def measure(_: Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        model = make_llama(Path(folder) / "model")
        server = Server(model, "--kv-eviction", "momentkv", "--kv-budget", "256", *POOL, folder=Path(folder))
        prometheus = Prometheus(server.url.removeprefix("http://"), Path(folder))
        try:
            server.wait_ready()
            prometheus.wait_scrapes(2)
            begin = time.time()
            answers = load(server.url)
            prometheus.wait_scrapes(2)
            drawn = draw(prometheus, begin, time.time(), report.RESULTS / "dashboard.png")
            peaks = (
                "max_over_time((momentkv:stock_pages / momentkv:pool_pages)[10m:1s])",
                "max_over_time(vllm:kv_cache_usage_perc[10m])",
            )
            need, used = (float(prometheus.query(peak)[0]["value"][1]) for peak in peaks)
        finally:
            prometheus.stop()
            server.stop()
    wanted = sum(len(queries) for _, queries in panels(WINDOW))
    figures = {"answers": answers, "stock_need_to_pool_peak": need, "pool_in_use_peak": used}
    return figures | {"queries_with_data": drawn / wanted}


def targets(found: dict[str, float]) -> list[dict]:
    return [report.target("panel queries with data", found["queries_with_data"], 1.0)]


BENCHMARK = Benchmark("dashboard", measure, lambda found: [report.rows_of([found])], targets)

if __name__ == "__main__":
    BENCHMARK.run()
