"""The reference's documented sequence, with its own files, environment and curl lines; ports and the model differ.

Its second file names the first one's id, which is refused here: ours says ``lmcache_instance_2``, as the move does.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from examples.vllm.stage import CPU, Engine, Stage
from kvreal.ports import free_ports

PROMPT = "Explain the significance of KV cache in language models."

FILE = """\
chunk_size: 256
local_cpu: True
max_local_cpu_size: {size}

# cache controller configurations
enable_controller: True
lmcache_instance_id: "lmcache_instance_{number}"
controller_pull_url: "localhost:{pull}"
controller_reply_url: "localhost:{reply}"
lmcache_worker_ports: {worker}

# P2P configurations
enable_p2p: True
p2p_host: "localhost"
p2p_init_ports: {init}
p2p_lookup_ports: {lookup}
transfer_channel: "nixl"
"""


def curl(url: str, body: dict[str, Any]) -> dict[str, Any]:
    command = ["curl", "-sS", "-X", "POST", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    out = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_reference_s_walkthrough(stage: Stage) -> None:
    engines: list[Engine] = []
    for number in (1, 2):
        worker, init, lookup = free_ports(3)
        path = stage.folder / f"instance{number}.yaml"
        path.write_text(FILE.format(number=number, pull=stage.pull, reply=stage.reply, worker=worker, init=init,
                                    lookup=lookup, size=0.25))  # fmt: skip
        environ = {"PYTHONHASHSEED": "123", "UCX_TLS": "rc", "KVMOVE_CONFIG_FILE": "", "LMCACHE_CONFIG_FILE": str(path)}
        engines.append(stage.engine(f"instance{number}", core=str(number - 1), config=path, environ=environ))
    for number, engine in enumerate(engines, 1):
        engine.ready(f"{engine.url}/health")
        stage.registered(f"lmcache_instance_{number}")
    one, two = engines

    first = curl(f"{one.url}/v1/completions", {"model": "m", "prompt": PROMPT, "max_tokens": 10, "temperature": 0})
    tokens = curl(f"{one.url}/tokenize", {"model": "m", "prompt": PROMPT})["tokens"]
    stage.stored("lmcache_instance_1", tokens)
    answer = curl(
        f"http://localhost:{stage.http}/move",
        {
            "old_position": ["lmcache_instance_1", "LocalCPUBackend"],
            "new_position": ["lmcache_instance_2", "LocalCPUBackend"],
            "tokens": tokens,
        },
    )
    assert set(answer) == {"num_tokens", "event_id"}
    assert answer["num_tokens"] == len(tokens) == len(PROMPT)
    ended = stage.api.get(f"/events/{answer['event_id']}/wait", params={"timeout": 30}).json()
    assert ended["state"] == "done"
    assert stage.held(tokens) == {"lmcache_instance_2": len(tokens)}
    second = curl(f"{two.url}/v1/completions", {"model": "m", "prompt": PROMPT, "max_tokens": 10, "temperature": 0})
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(tokens) - 1
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert CPU == "LocalCPUBackend"
