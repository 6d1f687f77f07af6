"""A real Prometheus server with the committed configuration, and the queries of the committed dashboard and alerts."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml
from server import free_port

DOCKER = Path(__file__).parent.parent / "docker"
CONFIGURATION = DOCKER / "prometheus/prometheus.yml"
ALERTS = DOCKER / "prometheus/alerts.yml"
DASHBOARD = DOCKER / "grafana/dashboards/momentkv.json"


class Prometheus:
    """Scrapes `target` ("host:port") as docker/prometheus/prometheus.yml says, but every second; started in the constructor."""

    def __init__(self, target: str, folder: Path) -> None:
        program = shutil.which("prometheus")
        if program is None:
            raise FileNotFoundError("there is no program `prometheus`; install it (Debian: apt-get install prometheus)")
        settings = yaml.safe_load(CONFIGURATION.read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["rule_files"] = [str(ALERTS)]
        (job,) = settings["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self.url = f"http://127.0.0.1:{free_port()}"
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus-data",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=self._log, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip

    def get(self, path: str, **parameters: str | float) -> dict:
        """`data` of an answer of its HTTP API. Raises RuntimeError with its message on a bad query."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path} {parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict]:
        return self.get("query", query=expression)["result"]

    def wait_scrapes(self, number: int, seconds: float = 180) -> "Prometheus":
        """Until `number` more scrapes succeeded. Raises TimeoutError."""
        end, begin = time.monotonic() + seconds, time.time()
        while time.monotonic() < end:
            try:
                result = self.query(f'sum_over_time(up{{job="momentkv"}}[{max(1, int(time.time() - begin))}s])')
            except OSError:
                result = []
            if result and float(result[0]["value"][1]) >= number:
                return self
            time.sleep(0.5)
        raise TimeoutError(f"Prometheus had not {number} successful scrapes in {seconds} s")

    def wait_value(self, expression: str, at_least: float, seconds: float = 240) -> None:
        """Until the one series of `expression` is `at_least`. Raises TimeoutError with what it was."""
        end, found = time.monotonic() + seconds, []
        while time.monotonic() < end:
            found = self.query(expression)
            if found and float(found[0]["value"][1]) >= at_least:
                return
            time.sleep(0.5)
        raise TimeoutError(f"{expression} was not {at_least} within {seconds} s: {found}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


def panels(window: str) -> Iterator[tuple[dict, list[tuple[str, str]]]]:
    """Panels of the dashboard with their (legend, query); Grafana's variables replaced, `window` for its rate interval."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        yield (
            panel,
            [
                (t["legendFormat"], t["expr"].replace("$__rate_interval", window).replace("$model", ".*"))
                for t in panel["targets"]
            ],
        )


def alerts() -> dict[str, str]:
    """Expression by alert."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:momentkv|vllm):\w+|\bup\b", expression))
