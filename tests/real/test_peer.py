"""``kvmove peer``: an instance of a run lives behind another process's socket, and on another network."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from kvcore.scenario.history import check_replay, read
from kvmove.cli import call
from kvreal import keys, lend
from kvreal.borrow import Away, Borrowed, PeerError, place, prove, read_token, secret_of
from kvreal.pool import LOOPBACK, HostError, Pool, is_stopped
from kvreal.run import RunError, run
from tests.real.http.processes import Command, commands, until
from tests.real.scenarios import scenario

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    with commands(tmp_path) as found:
        yield found


@pytest.fixture
def waiting(tmp_path: Path, start: Callable[..., Command]) -> Iterator[tuple[Command, tuple[str, int], bytes]]:
    """A waiting peer, where it waits, and its secret."""
    token = tmp_path / "token"
    command = start("peer", ["peer", "--listen", "127.0.0.1:0", "--token", str(token)])
    until(lambda: "\n" in command.text() or command.process.poll() is not None, command.text)
    port = int(command.text().splitlines()[0].rpartition(":")[2])
    yield command, (LOOPBACK, port), read_token(token)
    if command.process.poll() is None:
        assert command.stop() == 0


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def test_a_move_between_here_and_there(tmp_path: Path, waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    """Byte for byte, and the merged history replays: the other side's part of it was brought."""
    command, address, secret = waiting
    with Borrowed(address, secret, "tcp") as there, Pool("tcp", secret=secret) as here:
        log = tmp_path / "history.jsonl"
        result = run(scenario(order="strict"), pool=here, elsewhere={"b": there}, history=log)
        assert result.clean and result.placement == {"b/LocalCPUBackend": {"p": 200}}
        assert result.metrics["bytes_checked"] == 200 * 1024
        lent = children(command.process.pid)
        assert len(lent) == 1  # b/0, and nobody else
        report = check_replay(*read(log))
        assert report.equal and report.nodes == 4
        again = run(scenario(), pool=here, elsewhere={"a": there})  # the same process, another node
        assert again.clean and children(command.process.pid) == lent
    until(lambda: not children(command.process.pid), lambda: "nodes are left there")
    until(lambda: not Path(there.loan.folder).exists(), lambda: "what they wrote is left there")


FAULTS = {
    "killed by its own hand": """
  - when: {sent: Committed, by: b/0, nth: 1}
    drop: all
    crash: {node: b/0, restart_after: 2 beats}
""",
    "killed by the runner": """
  - when: {sent: Fetch, by: ctl, nth: 1}
    crash: {node: b/0, restart_after: 2 beats}
""",
    "frozen": """
  - when: {sent: Fetch, by: ctl, nth: 1}
    pause: {node: b/0, for: 1 s}
""",
    "in the middle of a copy": """
  - copy: {stuck: true, fraction: 0.5}
    when: {started: StartCopy}
    crash: {node: b/0, restart_after: 2 beats}
""",
}


@pytest.mark.parametrize("what", list(FAULTS))
def test_faults_reach_it(what: str, tmp_path: Path, waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    """Killed, frozen and started again by the runner's word; what the dead life wrote is brought as well."""
    command, address, secret = waiting
    with Borrowed(address, secret, "tcp") as there, Pool("tcp", secret=secret) as here:
        log = tmp_path / "history.jsonl"
        built = scenario(faults=FAULTS[what].strip("\n"))
        result = run(built, pool=here, elsewhere={"b": there}, history=log)
        assert result.clean, (result.violations, result.hung)
        assert result.fired and check_replay(*read(log)).equal
        boots = [line for line in read(log)[1] if type(line.input).__name__ == "Boot" and line.node == "b/0"]
        assert len(boots) == (1 if what == "frozen" else 2)


def test_all_is_taken_back(tmp_path: Path, waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    """A borrower that is killed leaves nothing: the connection's end is what ends a loan."""
    command, address, secret = waiting
    there = Borrowed(address, secret, "tcp")
    host = there.take(1)[0]
    (pid,) = children(command.process.pid)
    assert host.alive() and not host.stopped()
    host.send_signal(signal.SIGSTOP)
    until(host.stopped, lambda: "never stopped")
    assert is_stopped(pid) and Path(there.loan.folder).is_dir()
    there.sock.close()  # as the kernel does for a process that is killed
    until(lambda: not Path(f"/proc/{pid}").exists(), lambda: "the node is left")
    until(lambda: not Path(there.loan.folder).exists(), lambda: "its folder is left")
    with pytest.raises(HostError, match="gives no answer"):
        there.ask(lend.Clock())
    there.close()


def test_a_peer_that_ends_takes_its_nodes_along(waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    command, address, secret = waiting
    with Borrowed(address, secret, "tcp") as there:
        host = there.take(1)[0]
        (pid,) = children(command.process.pid)
        folder = Path(there.loan.folder)
        assert command.stop() == 0
        assert not Path(f"/proc/{pid}").exists() and not folder.exists()
        assert not host.alive() and "gives no answer" in host.status()


def test_a_peer_that_is_killed_takes_its_nodes_along_too(
    tmp_path: Path, waiting: tuple[Command, tuple[str, int], bytes]
) -> None:
    """The kernel kills them; a run that was going on says who has gone."""
    command, address, secret = waiting
    with Borrowed(address, secret, "tcp") as there, Pool("tcp", secret=secret) as here:
        host = there.take(1)[0]
        (pid,) = children(command.process.pid)
        command.process.kill()
        command.process.wait()
        until(lambda: not Path(f"/proc/{pid}").exists(), lambda: "the node is left")
        there.give_back(host, True)
        with pytest.raises(RunError, match="gives no answer|cannot be reached"):
            run(scenario(), pool=here, elsewhere={"b": there})
    folder = Path(there.loan.folder)
    assert folder.is_dir()  # nobody was left to remove it
    lend.Peer(LOOPBACK, 0, b"a secret").close()
    assert not folder.exists()  # the next one does


def test_a_connection_to_nowhere_ends() -> None:
    """The other machine, or the way to it, may go without a word: no connection of a loan waits for it for ever."""
    with socket.socket() as sock:
        lend.watch_over(sock)
        silent = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sum(sock.getsockopt(socket.IPPROTO_TCP, one) for one in silent) <= lend.SILENCE_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == lend.SILENCE_S * 1000


def test_strangers_are_hung_up_on(tmp_path: Path, waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    command, address, secret = waiting
    with pytest.raises(PeerError, match="it does not know our secret"):
        Borrowed(address, secret_of(b"some other token entirely", "here"))
    with socket.create_connection(address) as sock:
        sock.settimeout(20)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):  # a challenge, then the end
                pass
    assert not children(command.process.pid)
    with Borrowed(address, secret, "tcp") as there:  # who has it is heard none the less
        assert there.take(1)[0].alive()


def test_a_loan_is_not_to_be_guessed_nor_its_folder_left(waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    command, address, secret = waiting
    with Borrowed(address, secret, "tcp") as there:
        for name in ("../../etc/passwd", "/etc/passwd", "..", ".", ""):
            with pytest.raises(HostError, match="is no file's name"):
                there.ask(lend.Bring(name, 0))
        there.loan = lend.Lent("guessed", there.loan.folder, LOOPBACK, ("tcp",), ())
        with pytest.raises(HostError, match="that loan is over"):
            there.start()
    with Borrowed(address, secret, "tcp", env={"LD_PRELOAD": "x.so"}) as there:
        with pytest.raises(HostError, match="LD_PRELOAD may not be set here"):
            there.take(1)


def test_another_version_is_declined(waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    _, address, secret = waiting
    with socket.create_connection(address) as sock:
        answer = prove(sock, lend.encode(lend.Borrow(lend.PROTOCOL, "0.0.0-else")), secret, "it")
    assert b"Declined" in answer and b"0.0.0-else" in answer


def test_its_nodes_hear_only_those_who_have_the_secret(waiting: tuple[Command, tuple[str, int], bytes]) -> None:
    """A run whose other half has another secret never gets its nodes registered."""
    _, address, secret = waiting
    with Borrowed(address, secret, "tcp") as there, Pool("tcp") as here:  # here: none at all
        result = run(scenario(), pool=here, elsewhere={"b": there}, timeout_s=3)
        assert result.hung


def test_the_clusters_keys_will_do(tmp_path: Path, start: Callable[..., Command]) -> None:
    """Instead of a token; those of another cluster will not."""
    folders = [tmp_path / name for name in ("ours", "theirs")]
    for folder in folders:
        keys.new(folder, "node")
    command = start("peer", ["peer", "--listen", "127.0.0.1:0", "--keys", str(folders[0])])
    until(lambda: "\n" in command.text() or command.process.poll() is not None, command.text)
    peer = f"tcp://{command.text().splitlines()[0]}"
    argv = ["run", "scenarios/smoke/move.yaml", "--on", "real", "--transport", "tcp", "--peer", peer, "--peer-keys"]
    assert call([*argv, str(folders[0])]) == 0
    assert call([*argv, str(folders[1])]) == 2
    assert command.stop() == 0


SSH = """#!{python}
import os, shlex, subprocess, sys
words = sys.argv[1:]
assert words[:3] == ["-4", "-o", "BatchMode=yes"], words
command = shlex.split(words[-1])
if words[-2] == "nobody@127.0.0.1":
    sys.exit("nobody@127.0.0.1: Permission denied (publickey).")
os.environ["SSH_CONNECTION"] = "127.0.0.1 1 127.0.0.1 22"
print("Welcome to the other machine: 12:30", flush=True)
sys.exit(subprocess.call([sys.executable, "-m", *command]))
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for ssh: runs the command here, and says how it came in."""
    script = tmp_path / "ssh"
    script.write_text(SSH.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("KVMOVE_SSH", str(script))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_by_ssh_from_the_command_line(ssh: None, tmp_path: Path) -> None:
    file = tmp_path / "twelve.yaml"
    file.write_text(
        "name: twelve\ninstances:\n  a: {locations: {cpu: 64 MiB}}\n  b: {locations: {cpu: 64 MiB}}\n"
        "steps:\n  - store: {at: a/cpu, prompt: p, tokens: 12}\n  - move: {from: a/cpu, to: b/cpu, prompt: p, as: m}\n"
    )
    out = tmp_path / "out.json"
    argv = ["run", str(file), "--on", "both", "--peer", "b=ssh://127.0.0.1", "--json", str(out), "--transport", "tcp"]
    assert call(argv) == 0
    body = json.loads(out.read_text())
    assert body["good"] and body["worlds"]["real"]["placement"] == {"b/cpu": {"p": 12}}


def test_ssh_that_fails_says_why(ssh: None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "scenarios/smoke/move.yaml", "--on", "real", "--peer", "ssh://nobody@127.0.0.1"]
    assert call(argv) == 2
    assert "no peer was started there: nobody@127.0.0.1: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--on", "real", "--peer", "http://x:1"], "expected [INSTANCE=]tcp://HOST:PORT or"),
        (["--on", "real", "--peer", "tcp://x"], "expected [INSTANCE=]tcp://HOST:PORT or"),
        (["--on", "real", "--peer", "tcp://x:99999"], "expected [INSTANCE=]tcp://HOST:PORT or"),
        (["--on", "real", "--peer", "tcp://127.0.0.1:1"], "expected --peer-token FILE"),
        (["--on", "real", "--peer", "tcp://h:1", "--transport", "arena"], "a peer's are on another host"),
        (["--peer", "tcp://127.0.0.1:1"], "nothing runs there in simulation"),
        (["--on", "real", "--peer", "tcp://127.0.0.1:1", "--peer-token", "TOKEN"], "cannot be reached"),
        (["--on", "real", "--peer", "tcp://127.0.0.1:1", "--peer-token", "SHORT"], "a token of 5 characters"),
        (["--on", "real", "--peer", "tcp://127.0.0.1:1", "--peer-token", "nowhere"], "cannot read the token"),
        (["--on", "real", "--peer", "tcp://127.0.0.1:1", "--peer-token", "OPEN"], "chmod 600"),
    ],
)
def test_bad_input(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (("TOKEN", "0123456789abcdef", 0o600), ("SHORT", "short", 0o600), ("OPEN", "x" * 32, 0o644))
    for name, text, mode in files:
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    given = [str(tmp_path / word) if word in ("TOKEN", "SHORT", "OPEN") else word for word in argv]
    assert call(["run", "scenarios/smoke/move.yaml", *given]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--listen", "127.0.0.1:0"], "expected --token FILE or --keys DIR"),
        (["--listen", "nonsense", "--token", "T"], "expected HOST:PORT"),
        (["--listen", "ssh", "--token", "T"], "there is no SSH_CONNECTION"),
        (["--listen", "ssh:", "--token", "T"], "expected HOST:PORT"),
        (["--listen", "192.0.2.1:0", "--token", "T"], "cannot listen at 192.0.2.1:0"),
        (["--listen", "127.0.0.1:0", "--keys", "/nowhere"], "cannot read the key"),
    ],
)
def test_bad_input_of_a_peer(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert call(["peer", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
    assert "expected HOST:PORT" not in said or not (tmp_path / "T").exists(), "a wrong address makes no token"


def test_which_instance_goes_where() -> None:
    def placed(*texts: str) -> Any:
        return place([Away(text) for text in texts], ["a", "b", "c"])

    assert placed("tcp://h:1") == ["c"]
    assert placed("a=tcp://h:1", "ssh://h") == ["a", "c"]
    assert placed("tcp://h:1", "tcp://h:2") == ["b", "c"]
    assert placed("tcp://h:1", "c=ssh://u@h:22/opt/kvmove") == ["b", "c"]
    for wrong, said in (
        (["d=tcp://h:1"], "no instance d, expected one of a, b, c"),
        (["a=tcp://h:1", "a=tcp://h:2"], "a has a peer already"),
        (["tcp://h:1"] * 4, "4 peers for 3 instances"),
    ):
        with pytest.raises(PeerError, match=said):
            placed(*wrong)


# ---- another network -------------------------------------------------------------------------------------------------
def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire between them: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces: there is no ip (apt-get install iproute2)")
    names = (f"kvm{os.getpid()}a", f"kvm{os.getpid()}b")
    made: list[str] = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            _ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire0", "netns", names[1])
            for number, name in enumerate(names, 1):
                _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "wire0")
                for link in ("lo", "wire0"):
                    _ip("-n", name, "link", "set", link, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _crossed(name: str) -> int:
    """Bytes that the wire's end in a namespace has received."""
    said = subprocess.run(
        ["ip", "netns", "exec", name, "cat", "/proc/net/dev"], check=True, capture_output=True, text=True
    ).stdout
    (line,) = [line for line in said.splitlines() if line.strip().startswith("wire0:")]
    return int(line.split(":")[1].split()[0])


def test_over_a_wire(two_networks: tuple[str, str], tmp_path: Path) -> None:
    """The two sides have nothing in common but the wire, and the bytes of the move cross it."""
    near, far = two_networks
    file = tmp_path / "wire.yaml"
    file.write_text(
        "name: wire\nkv: {bytes_per_token: 64 KiB}\n"
        "instances:\n  a: {locations: {cpu: 64 MiB}}\n  b: {ranks: 1, locations: {cpu: 64 MiB}}\n"
        "steps:\n  - store: {at: a/cpu, prompt: p, tokens: 300}\n  - move: {from: a/cpu, to: b/cpu, prompt: p, as: m}\n"
        "  - use: {at: b/cpu, prompt: p}\n"
    )
    token, log, out = tmp_path / "token", tmp_path / "peer.log", tmp_path / "out.json"
    kvmove = [sys.executable, "-m", "kvmove"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as said:
        peer = subprocess.Popen(
            ["ip", "netns", "exec", far, *kvmove, "peer", "--listen", "10.77.0.2:7000", "--token", str(token)],
            stdout=said, stderr=subprocess.STDOUT, env=env,
        )  # fmt: skip
    try:
        until(lambda: "10.77.0.2:7000" in log.read_text() or peer.poll() is not None, log.read_text)
        before = _crossed(far)
        argv = ["run", str(file), "--on", "both", "--transport", "tcp", "--json", str(out)]
        argv += ["--peer", "tcp://10.77.0.2:7000", "--peer-token", str(token)]
        done = subprocess.run(
            ["ip", "netns", "exec", near, *kvmove, *argv], env=env, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
        real = json.loads(out.read_text())["worlds"]["real"]
        assert real["placement"] == {"b/cpu": {"p": 300}} and real["metrics"]["bytes_checked"] == 300 * 65536
        assert _crossed(far) - before > 300 * 65536
    finally:
        peer.send_signal(signal.SIGTERM)
        assert peer.wait(20) == 0
