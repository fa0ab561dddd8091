"""The runs that are measured: families, layouts, precisions, what trains, what is recomputed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from launch.compose import compose
from launch.train import bind_with_launch
from trainer.run import Run

LAYERS = {1: 10, 2: 18, 4: 18}  # by ranks: what one holds of weights and state is above 100 MB
COMMON = (
    "experiment=demo", "max_steps=2", "log_every=1", "eval_every=null", "save_every=null",
    "data.max_documents=10", "data.row_tokens=256", "data.micro_rows=1",
)  # fmt: skip
IMAGES = (
    "experiment=idefics_caption", "max_steps=2", "log_every=1", "eval_every=null",
    "save_every=null", "data.row_tokens=128", "data.row_images=4", "data.micro_rows=1",
    "data.global_documents=8", "tokenizer=byte", "model.hidden_size=256",
    "model.intermediate_size=704", "model.num_hidden_layers=8",
)  # fmt: skip
SMALL_BUCKETS = (
    "engine.config.zero_optimization.reduce_bucket_size=1000000",
    "engine.config.zero_optimization.allgather_bucket_size=1000000",
)
"""DeepSpeed's own of 500 million elements would be most of what is measured."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    name: str
    words: tuple[str, ...]
    processes: int = 1
    layers: int | None = None
    """In place of LAYERS."""

    def run(self, folder: Path) -> Run:
        """Return the run; images and caches lie in `folder`."""
        if self.name.startswith("idefics"):
            words = [*IMAGES, f"data.path={pictures(folder)}"]
        else:
            key = "n_layer" if "model=gpt_bigcode_tiny" in self.words else "num_hidden_layers"
            words = [*COMMON, f"data.global_rows={self._rows}"]
            if not any(word.startswith("mesh") for word in self.words):
                words += ["mesh=single"]
            words += [f"model.{key}={self.layers or LAYERS[self.processes]}"]
        tree = compose([*words, *self.words, f"data.cache={folder}"]).tree
        run, _ = bind_with_launch(tree | {"name": self.name.replace(" ", "_")})
        return replace(run, callbacks={})

    @property
    def _rows(self) -> int:
        """Return the rows of a step: two micro-batches for a data rank, of four ranks one."""
        is_data_parallel = any(word in ("mesh=ddp", "mesh=fsdp") for word in self.words)
        return 4 if is_data_parallel or self.processes == 4 else 2


def pictures(folder: Path) -> Path:
    """Write eight captioned pictures, once; return the file of rows."""
    path = folder / "captions.jsonl"
    if not path.exists():
        rows: list[dict[str, Any]] = []
        for number in range(64):
            Image.new("RGB", (64, 64), (number, 2 * number, 255 - number)).save(
                folder / f"{number}.png"
            )
            rows.append({"image": f"{number}.png", "caption": f"picture {number:02} of one colour"})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _case(name: str, *words: str, processes: int = 1, layers: int | None = None) -> Case:
    return Case(name=name, words=words, processes=processes, layers=layers)


SINGLE = "mesh=single"
FULL = "engine.activation_checkpointing.mode=full"
SELECTIVE = "engine.activation_checkpointing.mode=selective"
SHARE = "engine.activation_checkpointing.budget"
BUDGET = "engine.activation_checkpointing.mode=budget"
CASES = {
    case.name: case
    for case in (
        _case("llama"),
        _case("llama two rows", "data.micro_rows=2"),
        _case("llama full", FULL, "data.micro_rows=2"),
        _case("llama selective", SELECTIVE, "data.micro_rows=2"),
        *(
            _case(f"llama budget {share}", BUDGET, f"{SHARE}={share}", "data.micro_rows=2")
            for share in (0.3, 0.8)
        ),
        _case("llama bf16", "precision=bf16"),
        _case("llama bf16 full", "precision=bf16", FULL),
        _case("llama bf16 budget 0.5", "precision=bf16", BUDGET, f"{SHARE}=0.5"),
        _case("llama pure_bf16", "precision=pure_bf16", layers=16),
        _case("llama sgd", "optim=sgd", "optim.lr=0.01", layers=14),
        _case("llama offload", "engine.offload_optimizer=true"),
        _case("llama lora", "adapter=lora", layers=30),
        _case("llama lora full", "adapter=lora", FULL, layers=30),
        _case("llama ddp", "mesh=ddp", processes=2, layers=10),
        _case("llama ddp bf16", "mesh=ddp", "precision=bf16", processes=2, layers=10),
        _case("llama fsdp", "mesh=fsdp", processes=2),
        _case("llama fsdp bf16 full", "mesh=fsdp", "precision=bf16", FULL, processes=2),
        _case("llama hsdp", SINGLE, "mesh.dp_replicate=2", "mesh.dp_shard=2", processes=4),
        _case("llama tp", SINGLE, "mesh.tp=2", processes=2),
        _case("llama cp", SINGLE, "mesh.cp=2", processes=2, layers=10),
        _case("llama pp", SINGLE, "mesh.pp=2", processes=2),
        _case("llama accelerate", "mesh=ddp", "engine=accelerate", processes=2, layers=10),
        *(
            _case(
                f"llama zero{stage}", "mesh=ddp", "engine=deepspeed", f"engine.stage={stage}",
                *(SMALL_BUCKETS if stage else ()), processes=2, layers=10,
            )
            for stage in range(4)
        ),
        _case("gemma", "model=gemma_tiny"),
        _case("gemma lora", "model=gemma_tiny", "adapter=lora", layers=30),
        _case("gemma fsdp", "model=gemma_tiny", "mesh=fsdp", processes=2),
        _case("gpt_bigcode", "model=gpt_bigcode_tiny"),
        _case("gpt_bigcode fsdp", "model=gpt_bigcode_tiny", "mesh=fsdp", processes=2),
        _case("gpt_bigcode tp", "model=gpt_bigcode_tiny", SINGLE, "mesh.tp=2", processes=2),
        _case("idefics", "freeze=none"),
        _case("idefics frozen", "freeze=idefics_frozen"),
        _case("idefics ddp", "freeze=none", "mesh=ddp", processes=2),
        _case("idefics fsdp", "freeze=none", "mesh=fsdp", processes=2),
    )
}  # fmt: skip
