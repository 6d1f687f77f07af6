"""Load: stock vLLM against momentkv in the same KV pool, at rising request rates, by two clients.

Both servers are up all the time and asked in turn, so every ratio is of neighbours in time. Servers and clients share the cores.
"""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import report
from benchmark import Benchmark
from load import clients, model
from server import Server
from tqdm import tqdm

POOL_TOKENS, BUDGET_TOKENS = 4096, 256
COMMON = [
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "32",
    "--max-num-batched-tokens",
    "512",
    "--no-enable-prefix-caching",
]
# One page of the pool is vLLM's own. Stock's smallest page on a CPU is 32 tokens.
SERVERS = {
    "stock": ["--block-size", "32", "--num-gpu-blocks-override", str(POOL_TOKENS // 32 + 1)],
    "momentkv": ["--kv-eviction", "momentkv", "--kv-budget", str(BUDGET_TOKENS), "--num-gpu-blocks-override",
                 str(POOL_TOKENS // 16 + 1)],
}  # fmt: skip
PANELS = {
    "output_tokens_per_second": "output tokens/s",
    "ttft_median": "time to first token, median (ms)",
    "ttft_p99": "time to first token, p99 (ms)",
    "tpot_median": "time per output token, median (ms)",
    "tpot_p99": "time per output token, p99 (ms)",
}
PREEMPTIONS = "vllm:num_preemptions_total"
Ask = Callable[[str, float], dict[str, Any]]


def measure(servers: dict[str, Server], asks: dict[str, Ask], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Every client at every rate at both servers in turn; the first one alternates."""
    rows = []
    with tqdm(total=2 * sum(map(len, rates.values())), desc="load") as bar:
        for client, ask in asks.items():
            for number, rate in enumerate(rates[client]):
                for name in list(servers)[:: 1 if number % 2 else -1]:
                    before = servers[name].metrics("vllm:")[PREEMPTIONS]
                    row = ask(servers[name].url, rate)
                    row["preemptions"] = servers[name].metrics("vllm:")[PREEMPTIONS] - before
                    rows.append({"client": client, "server": name, **row})
                    bar.update()
    return rows


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """momentkv over stock for each client and rate."""
    found = []
    for stock in (r for r in rows if r["server"] == "stock"):
        (ours,) = (
            r
            for r in rows
            if r["server"] == "momentkv" and (r["client"], r["rate"]) == (stock["client"], stock["rate"])
        )
        ratios = {key: ours[key] / stock[key] for key in PANELS}
        found.append({"client": stock["client"], "rate": stock["rate"], **ratios})
    return found


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What each server did, the first row its heading."""
    heading = ["client", "requests/s", "server", "output tokens/s", "TTFT median / p99, ms", "TPOT median / p99, ms"]
    heading.append("preemptions")
    lines = []
    for r in sorted(rows, key=lambda r: (r["client"] != "vllm bench serve", r["rate"], r["server"] != "stock")):
        first, later = f"{r['ttft_median']:.0f} / {r['ttft_p99']:.0f}", f"{r['tpot_median']:.1f} / {r['tpot_p99']:.1f}"
        speed = f"{r['output_tokens_per_second']:.0f}"
        lines.append([r["client"], f"{r['rate']:g}", r["server"], speed, first, later, f"{r['preemptions']:.0f}"])
    return [heading, *lines]


def draw(results: dict[str, Any], axes: Any) -> None:
    rows = results["rows"]
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for client, style in (("vllm bench serve", "-"), ("GuideLLM", "--")):
            for server, colour in (("stock", "tab:gray"), ("momentkv", "tab:blue")):
                mine = sorted(
                    (r for r in rows if (r["client"], r["server"]) == (client, server)), key=lambda r: r["rate"]
                )
                axis.plot([r["rate"] for r in mine], [r[key] for r in mine], style, marker="o", color=colour,
                          label=f"{server}, {client}")  # fmt: skip
        axis.set(title=title, xlabel="requests/s asked for", xscale="log", yscale="log" if "ttft" in key else "linear")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)


def options(parser) -> None:
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--seconds", type=float, default=20.0, help="requests asked for = rate x seconds")


def measure_servers(args: Namespace) -> dict[str, Any]:
    servers: dict[str, Server] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = model.make(folder)
        prompts = model.prompts(folder, 1000)
        try:
            for key, options in SERVERS.items():
                servers[key] = Server(path, *options, *COMMON, folder=folder, name="load").wait_ready()
            rest = {"seconds": args.seconds, "folder": folder}
            asks = {
                "vllm bench serve": lambda url, rate: clients.vllm_bench(url, path, rate, **rest),
                "GuideLLM": lambda url, rate: clients.guidellm(url, path, prompts, rate, **rest),
            }
            # The second client at every other rate: it confirms, the first one measures.
            rates = {"vllm bench serve": args.rates, "GuideLLM": args.rates[1::2]}
            # Warm-up (GuideLLM cannot sum up a run of a request).
            for server in servers.values():
                asks["vllm bench serve"](server.url, 2.0 / args.seconds)
            rows = measure(servers, asks, rates)
        finally:
            for server in servers.values():
                server.stop()
    return {"pool_tokens": POOL_TOKENS, "budget_tokens": BUDGET_TOKENS, "rows": rows, "ratios": pairs(rows)}


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    limits = [report.target("requests without an answer", sum(r["failed"] for r in results["rows"]), 0, at_least=False)]
    busiest = max(r["rate"] for r in results["ratios"])
    for r in (r for r in results["ratios"] if r["rate"] == busiest):
        what = f"{r['client']}, {busiest:g} requests/s: output tokens/s over stock"
        limits.append(report.target(what, r["output_tokens_per_second"], 1.0))
    return limits


BENCHMARK = Benchmark(
    "load", measure_servers, lambda results: [table(results["rows"])], targets, draw, panels=len(PANELS), size=(20, 3.6),
    gate=lambda: environments.programs("guidellm"), options=options,
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
