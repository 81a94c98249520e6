"""``--peer ssh://``, by a real sshd on this machine: a login of whoever runs this, keys and host key made here."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmove.cli import call
from kvreal import lend
from kvreal.borrow import Away
from kvreal.pool import HostError
from kvreal.ports import free_ports
from tests.real.http.processes import ROOT, until

pytestmark = pytest.mark.real

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin:/sbin")
SCENARIO = """
name: twelve
instances: {a: {locations: {cpu: 64 MiB}}, b: {locations: {cpu: 64 MiB}}}
steps:
  - store: {at: a/cpu, prompt: p, tokens: 12}
  - move: {from: a/cpu, to: b/cpu, prompt: p, as: m}
"""


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def _said(process: subprocess.Popen[bytes], port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0 or process.poll() is not None


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Its folder and its port; ``config`` there is for ssh, ``kvmove`` what may be started."""
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("ssh: there is no sshd here (apt-get install openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    host, mine, _ = (_key(folder / name) for name in ("host", "mine", "strange"))
    (folder / "authorized").write_text(mine.with_suffix(".pub").read_text())
    (folder / "authorized").chmod(0o600)
    (port,) = free_ports(1)
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host}\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\n"
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host.with_suffix('.pub').read_text()}")
    (folder / "other").write_text(f"[127.0.0.1]:{port} {(folder / 'strange.pub').read_text()}")
    (folder / "empty").write_text("")
    (folder / "kvmove").write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m kvmove \"$@\"\n")
    (folder / "kvmove").chmod(0o755)
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdout=out, stderr=out)
    try:
        until(lambda: _said(process, port), log.read_text)
        if process.poll() is not None:
            pytest.skip(f"ssh: sshd does not start here: {log.read_text().strip()}")
        yield folder, port
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def url(sshd: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> str:
    """Of that sshd; ssh uses nothing of whoever runs this."""
    _ssh(sshd[0], monkeypatch)
    return f"ssh://{getpass.getuser()}@127.0.0.1:{sshd[1]}"


def _ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str = "mine", known: str = "known") -> None:
    keys = f"-F none -i {folder}/{key} -o IdentitiesOnly=yes -o IdentityAgent=none"
    hosts = f"-o UserKnownHostsFile={folder}/{known} -o GlobalKnownHostsFile=none"
    monkeypatch.setenv("KVMOVE_SSH", f"ssh {keys} {hosts}")


def test_a_move_to_there(url: str, sshd: tuple[Path, int], tmp_path: Path) -> None:
    file, out = tmp_path / "twelve.yaml", tmp_path / "out.json"
    file.write_text(SCENARIO)
    argv = ["run", str(file), "--on", "both", "--transport", "tcp", "--json", str(out)]
    assert call([*argv, "--peer", f"b={url}{sshd[0]}/kvmove"]) == 0
    body = json.loads(out.read_text())
    assert body["good"] and body["worlds"]["real"]["placement"] == {"b/cpu": {"p": 12}}


@pytest.mark.parametrize(
    ("path", "key", "known", "said"),
    [
        ("/nowhere/kvmove", "mine", "known", "PATH/TO/kvmove, or to the python of its environment"),
        ("/usr", "mine", "known", "PATH/TO/kvmove, or to the python of its environment"),
        ("/kvmove", "strange", "known", "Expected a key that it lets in without asking"),
        ("/kvmove", "mine", "empty", "Its key is not known here, or has changed"),
        ("/kvmove", "mine", "other", "Its key is not known here, or has changed"),
    ],
)
def test_what_fails_says_why(
    path: str, key: str, known: str, said: str, url: str, sshd: tuple[Path, int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _ssh(sshd[0], monkeypatch, key, known)
    assert call(["run", "scenarios/smoke/move.yaml", "--on", "real", "--peer", url + path]) == 2
    err = capsys.readouterr().err
    assert "no peer was started there: " in err and said in err and len(err.strip().splitlines()) == 1


def test_nobody_listens(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    peer = f"{url.rpartition(':')[0]}:{port}"
    assert call(["run", "scenarios/smoke/move.yaml", "--on", "real", "--peer", peer]) == 2
    assert "Connection refused" in capsys.readouterr().err


def test_an_ssh_that_dies_takes_all_along(url: str, sshd: tuple[Path, int]) -> None:
    with Away(f"{url}{sshd[0]}/kvmove") as away, away.borrow("tcp") as there:
        host = there.take(1)[0]
        folder = Path(there.loan.folder)
        assert folder.is_dir() and away.process is not None
        away.process.kill()
        until(lambda: not host.alive(), lambda: "its node lives")
        with pytest.raises(HostError, match="gives no answer: it has hung up"):
            there.ask(lend.Clock())
        until(lambda: not folder.exists(), lambda: "its folder is left")
