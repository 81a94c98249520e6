"""A controller that cannot start leaves one line, status 2, and no file. And: whose constants do not fit."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvreal.ports import free_ports
from tests.real.http.processes import commands

pytestmark = pytest.mark.real


@pytest.mark.parametrize("taken", ["http", "pull", "reply"])
def test_a_taken_port_leaves_no_journal(tmp_path: Path, taken: str) -> None:
    ports = dict(zip(("http", "pull", "reply"), free_ports(3)))
    with socket.socket() as other, commands(tmp_path) as start:
        other.bind(("127.0.0.1", ports[taken]))
        other.listen()
        monitor = f'{{"pull": {ports["pull"]}, "reply": {ports["reply"]}}}'
        argv = ["controller", "--port", str(ports["http"]), "--monitor-ports", monitor, "--journal", "j.db"]
        one = start("controller", argv)
        assert one.until_ends() == 2
        assert f"cannot listen at {'localhost' if taken == 'http' else '127.0.0.1'}:{ports[taken]}" in one.text()
        assert len(one.text().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("j.db")] == []


INSTANCE = """\
enable_controller: true
lmcache_instance_id: {name}
controller_pull_url: localhost:{pull}
kvmove: {{bytes_per_token: 512 B, locations: {{LocalCPUBackend: 1 MiB}}, transport: tcp, constants: {{{constants}}}}}
"""


def test_constants_that_do_not_fit_are_refused_and_others_are_told(tmp_path: Path) -> None:
    """The controller was given constants of its own. One instance was not: two of its beats do not fit into ``dead``.
    Another beats often enough, and has another lease: it is taken, and both values are logged."""
    http, pull, reply, a, b = free_ports(5)
    with commands(tmp_path) as start:
        monitor = f'{{"pull": {pull}, "reply": {reply}}}'
        argv = ["controller", "--port", str(http), "--monitor-ports", monitor, "--set", "beat=100 ms"]
        controller = start("controller", [*argv, "--set", "dead=900 ms"])
        controller.until_says("controller: http://")
        for name, constants in (("a", ""), ("b", "beat: 100 ms, lease: 9500 ms")):
            (tmp_path / f"{name}.yaml").write_text(INSTANCE.format(name=name, pull=pull, constants=constants))
        refused = start("a", ["instance", "--config", "a.yaml", "--port", str(a)])
        assert refused.until_ends() == 2
        said = refused.text().splitlines()[-1]
        assert "refuses a: its dead=0.9 s, and this one's beat=1 s, of which two must fit into it" in said
        controller.until_says("a rank 0 at")
        start("b", ["instance", "--config", "b.yaml", "--port", str(b)]).until_says(": registered")
        text = controller.until_says("constants differ: b rank 0")
        assert "lease is 10 s here, 9.5 s there" in text
        assert "beat is" not in text
