"""The fuzzing campaign in short: an evicting server under random requests, aborts and disconnects (whole: make bench NAME=fuzz)."""

import pytest
from fuzz import campaign
from fuzz.client import BROKEN
from fuzz.servers import PROFILES, start

REQUESTS = 400
SCHEMA_EXAMPLES = 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_that_a_client_sends_ends_the_server(tmp_path):
    server = start(tmp_path, PROFILES["embeds"], evicting=True).wait_ready()
    try:
        outcome = campaign.random_bursts(server, REQUESTS, PROFILES["embeds"].without)
        assert not outcome.problems
        assert outcome.statuses[200] > REQUESTS / 4 and outcome.statuses[400] > REQUESTS / 10, "too tame"
        assert not outcome.statuses[BROKEN] and server.metrics()["momentkv:evicted_tokens_total"] > 100
        schema = campaign.of_the_schema(server, tmp_path, SCHEMA_EXAMPLES)
        assert not schema.problems and schema.requests > 50
    finally:
        server.stop()
