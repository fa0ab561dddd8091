"""A step on a device that is no CPU asks it for no value, and leaves nothing behind on the host.

The device is torch's `meta`: it has no values, so that whatever waits for one raises, and what is
computed beside it on the CPU would have to be copied. A GPU's own branches run, without a GPU.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import adam, sgd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.binding import bind_run
from launch.compose import compose
from trainer.engines.padding import skip_padding
from trainer.planning.rows import full_batches, with_images
from trainer.preview import lay_out
from trainer.run import Run

META = torch.device("meta")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
TEXT = "experiment=demo model=llama_tiny data.row_tokens=64 data.global_rows=4 data.micro_rows=2"
DOCUMENTS = (
    "model=llama_tiny tokenizer=byte data.path=none data.row_tokens=64 data.global_documents=8 "
    "data.micro_rows=2 max_steps=2 max_epochs=null"
)
IMAGES = "model=idefics_tiny tokenizer=byte data.path=none max_steps=2 max_epochs=null"
RUNS = {
    "llama": TEXT,
    "gemma": f"{TEXT} model=gemma_tiny precision=bf16",
    "bigcode": f"{TEXT} model=gpt_bigcode_tiny precision=bf16",
    "pure bf16": f"{TEXT} precision=pure_bf16",
    "8 bits": f"{TEXT} optim=adamw8bit spike=clip",
    "muon": f"{TEXT} optim=muon precision=bf16 spike=skip",
    "muon in pure bf16": f"{TEXT} optim=muon optim.states=8bit precision=pure_bf16",
    "recomputed": f"{TEXT} engine.activation_checkpointing.mode=full deterministic=run",
    "selective": f"{TEXT} engine.activation_checkpointing.mode=selective precision=bf16",
    "lora": f"{TEXT} adapter=lora adapter.dropout=0.1 precision=bf16",
    "dora": f"{TEXT} adapter=dora",
    "prompt": f"{TEXT} adapter=prompt",
    "sft": f"experiment=sft {DOCUMENTS}",
    "sequences": f"experiment=sequence_classification {DOCUMENTS} data.encoder.labels=[a,b,c]",
    "words": f"experiment=token_classification {DOCUMENTS} data.encoder.labels=[a,b,c]",
    "dpo": f"experiment=dpo {DOCUMENTS}",
    "rewards": f"experiment=reward_modelling {DOCUMENTS}",
    "images": f"experiment=idefics_vqa {IMAGES} precision=bf16",
    "images by lora": f"experiment=idefics_lora {IMAGES}",
}


class OneDevice(TorchDispatchMode):
    """Refuses operations over both devices, which torch lets pass where only shapes are asked for.

    A 0-dim tensor of the CPU may meet any device: it goes along as a number.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.ndim or x.device == META}
        assert len(devices) < 2 or func in COPIES, f"{func} of {[x.device for x in tensors]}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _meta_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch do on meta what it does on a GPU: pinned copies, fused updates, autocast."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    for module, name in ((adam, "_fused_adamw_"), (sgd, "_fused_sgd_")):
        monkeypatch.setattr(module, "_device_dtype_check_for_fused", lambda *_, **__: None)
        monkeypatch.setattr(torch, name, lambda *_, **__: None)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", RUNS)
def test_steps_evaluations_and_answers_stay_on_their_device(name: str) -> None:
    words = ["name=x", "model.attn_implementation=sdpa", *RUNS[name].split()]
    run: Run = bind_run(compose(words).tree)
    laid_out, mesh = lay_out(run, 1, 0, step=run.freeze.last_phase)
    around = run.surroundings(laid_out.parts[0], mesh, META)
    skip_padding(laid_out.parts[0], around, is_compiled=False)
    batches = [with_images(each, run) for each in full_batches(run, 1, is_pipeline=False)]
    with OneDevice():
        laid_out.fill(META, lambda _, start, stop: torch.empty(stop - start))
        engine: Any = run.engine.build(laid_out, around)
        for step in (1, 2):
            result = engine.train_step(step, batches, 256)
        assert engine.eval_step(batches[0]).sum.device == result.loss_sum.device == META
        assert engine.logits(batches[0]).device == META
        cache = engine.new_cache()
        if run.task.head == "causal_lm" and cache is not None:
            assert engine.next_logits(batches[0], cache).device == META
        with pytest.raises(RuntimeError):  # what waiting for a value would have raised
            result.loss_sum.item()
