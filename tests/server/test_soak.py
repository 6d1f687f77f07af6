"""The soak of `make bench NAME=soak`, a minute long: mixed traffic in a tight pool, then the worker is killed and a new server goes on."""

import pytest
from soak.catalog import NEAR_TIE, Request
from soak.run import MOMENTKV, Soak, judge, soak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mixed_traffic_and_a_killed_worker(tmp_path):
    with Soak(tmp_path, 16, MOMENTKV) as running:
        found = soak(running, [(12, "kill worker"), (6, "stop")])
    missed = [t for t in judge(found) if not t["ok"]]
    assert not missed, found
    traffic = found["traffic"]
    assert found["replay"]["right"] == 16 and traffic["right"] > 10 and traffic["bursts"] >= 2
    assert all(traffic.get(kind) for kind in ("plain", "stream", "malformed")), traffic
    # The worker's death ends the server: a supervisor sees it, clients get an error.
    assert found["lives"][0]["exit_seconds"] < 60 and traffic["failed in a fault"]


def test_what_counts_as_wrong():
    known = Request("", 3, tokens=[5, 6, 7], margins=[2.0, NEAR_TIE / 2, 2.0])
    assert known.compare([5, 6, 7]) == known.compare([5, 6], complete=False) == "right"
    assert known.compare([5, 6]) == known.compare([4, 6, 7]) == known.compare([5, 6, 8]) == "wrong"
    assert known.compare([5, 9, 9]) == "near tie"
