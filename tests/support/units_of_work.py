"""What xdist gives to one worker: the tests of a file, and of files that share a server."""

from xdist.scheduler import LoadFileScheduling

TOGETHER = {"tests/server/test_server.py": "tests/server/test_prometheus.py"}


class UnitsOfWork(LoadFileScheduling):
    """`--dist loadfile`, with the files of `TOGETHER` as one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return TOGETHER.get(file, file)
