"""What a host does for a GPU, seen without one: `bash tests/null_gpu/run.sh`.

Kernels are compiled and launched, and none runs: no number means anything, and none is looked at.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.exit_codes import FINISHED

LIBRARIES = os.environ.get("TESSERA_NULL_GPU")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARIES, reason="bash tests/null_gpu/run.sh makes a GPU to pretend"),
]

TRAIN = "train experiment=demo max_steps=3 eval_every=3 name=gpu runs={tmp} data.cache={tmp}/cache"
QUIET = "callbacks.ngrams=null callbacks.closing.sample_tokens=0"
LEVERS = {
    "flex": "model.attn_implementation=flex",
    "sdpa": "model.attn_implementation=sdpa",
    "eager": "model.attn_implementation=eager",
    "bf16": "precision=bf16",
    "fp32": "precision=fp32",
    "float8, compiled": "precision=fp8 engine.compile=true",
    "compiled": "engine.compile=true",
    "pure_bf16, 8-bit state": "precision=pure_bf16 optim=adamw8bit",
    "bf16 state": "optim=adamw_bf16",
    "Muon": "optim=muon",
    "offloaded state": "engine.offload_optimizer=true",
    "recomputing": "engine.activation_checkpointing.mode=full",
    "a budget": "engine.activation_checkpointing={mode:budget,budget:0.5} engine.compile=true",
    "deterministic": "deterministic=run",
    "LoRA": "adapter=lora",
    "DoRA": "adapter=dora",
    "Gemma": "model=gemma_tiny",
    "GPT-BigCode": "model=gpt_bigcode_tiny",
    "accelerate": "engine=accelerate",
    "ZeRO": "engine=deepspeed",
}
LAYOUTS = {  # without PP and several ranks of ZeRO, which read what nobody sent
    "DDP": "launch.processes=2",
    "FSDP2": "launch.processes=2 mesh=fsdp",
    "FSDP2, compiled": "launch.processes=2 mesh=fsdp engine.compile=true",
    "HSDP": "launch.processes=4 mesh.dp_replicate=2 mesh.dp_shard=2",
    "TP": "launch.processes=2 mesh.tp=2",
    "CP": "launch.processes=2 mesh.cp=2 precision=bf16",  # fp32: minutes of ptxas
}


def ask(words: str, *, limit_seconds: float = 360) -> str:
    """Run a command of Python on the GPU that computes nothing; return what it printed."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(LIBRARIES),
        "LD_PRELOAD": f"{LIBRARIES}/libnullgpu.so",
        # Memory that is used again would hold numbers of any kind.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    del environment["CUDA_VISIBLE_DEVICES"]  # other tests see no GPU
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(words)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_seconds,
    )  # fmt: skip
    assert done.returncode == FINISHED, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", [*LEVERS, *LAYOUTS])
def test_a_run_comes_to_its_end(name: str, tmp_path: Path) -> None:
    words = f"launch {TRAIN.format(tmp=tmp_path)} {QUIET} {(LEVERS | LAYOUTS)[name]}"
    assert "on cuda" in ask(words)


def test_a_run_is_evaluated_asked_and_gone_on_with(tmp_path: Path) -> None:
    train = f"launch {TRAIN.format(tmp=tmp_path)} precision=bf16"
    ask(train)
    ask(f"launch evaluate checkpoint={tmp_path}/gpu")
    ask(f"launch generate checkpoint={tmp_path}/gpu prompt=def max_new_tokens=3")
    assert "5 of 5 steps" in ask(f"{train} resume={tmp_path}/gpu max_steps=5")


@pytest.mark.parametrize(
    "words",
    [
        "verify experiment=demo steps=5 layouts=[ddp,fsdp]",
        "plan experiment=demo mesh=auto processes=2",
        "plan experiment=demo device=h100 engine.offload_optimizer=true",
    ],
)
def test_a_command_that_forks_does_not_wake_the_gpu(words: str) -> None:
    ask(f"launch {words}")


def test_a_step_waits_for_nothing_and_compiles_once() -> None:
    """Under torch's sync debug mode: CUDA's calls that wait are torch's own."""
    said = ask("benchmarks.gpu.train size=tiny only='1b 4096'")
    for name in ("recompiles after warm-up", "cases with a host sync in a step"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"| {name} ")]
        assert line.endswith("| yes |"), said
