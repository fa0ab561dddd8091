"""`tessera export`: a run or checkpoint as a Hugging Face folder that transformers agrees with."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.model_folders import model_folder
from launch.words import options_of

if TYPE_CHECKING:
    from trainer.export.export import Report
    from trainer.export.source import History

USAGE = """usage: tessera export checkpoint=DIR output=DIR [key=value] ...

Writes one model folder: weights (an adapter merged into them), config, tokenizer and chat template,
generation config, model card. Then opens it with transformers and compares its tokens and logits
with those of the checkpoint. Exit code 1, and no folder, where they differ.

  checkpoint=DIR     a run, a step of it (.../checkpoints/best), a Hugging Face folder, or the
                     folder of an adapter, which names its base
  output=DIR         a new folder
  dtype=auto         as the weights are stored: of a run its masters (fp32), of an adapter its base;
                     or fp32, bf16, fp16
  prompts=[A,B]      texts to compare on, instead of five of our own
  max_shard_gb=5     size of a weight file at most
  new_tokens=apart   rows of model.additional_tokens beside the base's vocabulary, to train on,
                     instead of merged into it
  json=true          one JSON object instead of text

Needs memory for one copy of the model in fp32, and disk for the folder.
"""
DEFAULTS = {
    "dtype": "auto", "prompts": "[]", "max_shard_gb": "5", "new_tokens": "merged", "json": "false",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run `tessera export` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0
    options = _parse(arguments)
    output = Path(options["output"]).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={output} exists and is not empty; give a new folder")
    folder = model_folder(Path(options["checkpoint"]).expanduser())

    from trainer.export.export import export
    from trainer.export.source import Source

    # What transformers says of a folder is checked by its own report, and said once.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = Source(folder=folder, history=_history(folder))
    report = export(
        source, output, dtype=options["dtype"], prompts=options["prompts"],
        max_shard_gb=options["max_shard_gb"], has_rows_apart=options["new_tokens"] == "apart",
    )  # fmt: skip
    print(_json(report) if options["json"] else _text(report, folder, source))
    return 0


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Return every option, converted; ValueError in one line for what is wrong."""
    from launch.binding import convert
    from launch.compose import parsed

    needed = {"checkpoint": "DIR", "output": "DIR"}
    options: dict[str, Any] = {**options_of("export", arguments, needed=needed, defaults=DEFAULTS)}
    kinds = {"prompts": tuple[str, ...], "max_shard_gb": float, "json": bool}
    for key, kind in kinds.items():
        options[key] = convert(parsed(f"{key}={options[key]}")[1], kind, key)
    if options["dtype"] not in (known := ("auto", "fp32", "bf16", "fp16")):
        raise ValueError(
            f"dtype={options['dtype']!r} is unknown; set it to one of {', '.join(known)}"
        )
    if options["new_tokens"] not in ("merged", "apart"):
        raise ValueError(f"new_tokens={options['new_tokens']!r}: set it to merged or apart")
    if not options["max_shard_gb"] > 0:
        raise ValueError(f"max_shard_gb={options['max_shard_gb']} is not positive; set it to 5")
    return options


def _history(folder: Path) -> "History | None":
    """Return what the run says of the checkpoint in `folder`; None where no run is around it."""
    step = folder.resolve().parent
    run = step.parent.parent
    if step.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return None

    from trainer.export.source import History
    from trainer.files import read_json, read_lines
    from trainer.stored_config import read_stored

    facts = run / "environment.json"
    return History(
        name=run.name,
        step=int(step.name.rpartition("_")[2]),
        config=read_stored(run / "config.yaml"),
        metrics=read_lines(run / "metrics.jsonl"),
        environment=read_json(facts) if facts.is_file() else {},
    )


def _text(report: "Report", folder: Path, source: Any) -> str:
    """Return what a person wants to know, the largest difference last."""
    size = f"{report.num_parameters / 1e6:.2f} M parameters in {report.dtype}"
    lines = [f"{folder}: {size}, {report.num_bytes / 1e9:.3g} GB"]
    if source.is_adapter:
        lines.append(f"  adapter of {source.base}")
    if report.moved:
        what = "merged and written" if source.is_adapter else "written"
        moved = f"{report.moved:.1e} of the largest logit"
        lines.append(f"  {what} in {report.dtype}, which moved logits by up to {moved}")
    where = f"{report.num_tokens} tokens of {report.num_prompts} texts"
    lines.append(f"  transformers reads every weight, and the same tokens; logits over {where}:")
    lines += [
        f"    in {check.dtype:<9} largest difference {check.largest:.1e}, allowed "
        f"{check.limit * check.scale:.1e}"
        for check in report.checks
    ]
    return "\n".join([*lines, f"done: {report.output}"])


def _json(report: "Report") -> str:
    from dataclasses import asdict

    return json.dumps(asdict(report) | {"output": str(report.output)})
