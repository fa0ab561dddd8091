"""`tessera evaluate`: what a run, a checkpoint or a Hugging Face folder does on held-out data."""

import json
from pathlib import Path
from typing import Any

from launch.menu import groups
from launch.model_folders import model_folder
from launch.truth import truth
from launch.words import refuse_idle, split_off

USAGE = """usage: tessera evaluate checkpoint=DIR [data.eval_path=FILE] [key=value] ...

Evaluates every document once, in this process: loss and the task's metrics do not depend on how
rows are packed or dealt.

  checkpoint=runs/NAME                       the newest step of a run, with its own settings;
  checkpoint=runs/NAME/checkpoints/best      or the best one
  data.eval_path=FILE                        other data than what the run held out
  key=value                                  another setting; with experiment=NAME or group=choice
                                             none is the run's own
  checkpoint=FOLDER experiment=NAME data.eval_path=FILE
                                             a Hugging Face model or peft adapter, and its task
  validation.every=1                         write answers, too, and judge them (chat, images):
                                             validation.metrics=[exact_match,anls,bleu,rouge_l],
                                             validation.max_new_tokens=32 and max_documents=null
  html=FILE                                  a page of questions, images and answers
  json=true                                  one JSON object instead of a table
"""
_ALONE = {  # one process has no use for the rest
    "mesh": {"_target_": "trainer.mesh.MeshSpec"},
    "engine": {"_target_": "trainer.engines.native.NativeEngine"},
    "best": {"_target_": "trainer.best.BestSpec"},
    "callbacks": {},
    "eval_every": 1,
    "max_steps": 1,
    "max_epochs": None,
    "resume": "never",
    "resume_step": None,
    "tracker": {},
}
_NO_ANSWERS = {"_target_": "trainer.validation.spec.ValidationSpec"}  # of a run before there were
_OWN = ("checkpoint", "json", "html")
_LABELLED = (
    "trainer.data.classification.SequenceEncoder",
    "trainer.data.tagging.TokenEncoder",
)


def main(arguments: list[str]) -> int:
    """Run `tessera evaluate` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0
    own, words = split_off("evaluate", arguments, _OWN)
    if not own.get("checkpoint"):
        raise ValueError("checkpoint is missing; set checkpoint=DIR")
    is_json = truth("json", own.get("json", "false"))
    given = Path(own["checkpoint"]).expanduser()
    folder = model_folder(given)
    tree = _tree(folder, words)
    page = Path(own["html"]).expanduser() if "html" in own else None
    _print(_evaluated(tree, page, words), is_json=is_json)
    return 0


def _tree(folder: Path, words: list[str]) -> dict[str, Any]:
    """Return the config that evaluates the weights in `folder`."""
    is_adapter = (folder / "adapter_config.json").is_file()
    keys = {word.partition("=")[0].lstrip("+~") for word in words}
    is_named = not keys.isdisjoint(groups())  # experiment=, data=, ..
    in_run = folder.resolve().parent.parent.name == "checkpoints"
    config = folder.resolve().parents[2] / "config.yaml" if in_run else folder
    if config.is_file() and not is_named:
        tree = _of_run(config, words)
    else:
        tree = _composed(folder, words, is_adapter)
    tree |= _ALONE
    if is_adapter:
        target = "trainer.adapters.pretrained.PretrainedAdapter"
        tree["adapter"] = {"_target_": target, "path": str(folder)}
    else:
        tree["weights"] = str(folder)
        tree["adapter"] = {"_target_": "trainer.adapters.protocol.NoAdapter"}
    if tree["tokenizer"] in ("auto", "bpe") and (folder / "tokenizer.json").is_file():
        tree["tokenizer"] = str(folder)  # other data would train another bpe
    data = tree["data"]
    if data.get("path") is None and not data.get("sources"):
        data["path"] = data.get("eval_path")
    encoder = data.get("encoder", {})
    if encoder.get("_target_") in _LABELLED and encoder.get("labels") is None:
        encoder["labels"] = _labels(folder)
    return tree


def _labels(folder: Path) -> list[str] | None:
    """Return the names of the model's outputs, in their order: other data may lack some."""
    path = folder / "config.json"
    names = json.loads(path.read_text("utf-8")).get("id2label") if path.is_file() else None
    return [names[str(number)] for number in range(len(names))] if names else None


def _of_run(config: Path, words: list[str]) -> dict[str, Any]:
    """Return a run's own settings with changes."""
    from launch.compose import parsed
    from trainer.stored_config import read_stored

    tree: dict[str, Any] = {"validation": _NO_ANSWERS, **read_stored(config)}
    if tree["precision"] == "fp8":  # which few machines have; its weights are those of bf16
        tree["precision"] = "bf16"
    for word in words:
        key, value = parsed(word)
        *parts, name = key.split(".")
        place: Any = tree
        for part in parts:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(
                    f"{word} sets a key of {part}, which is {place!r} and has none; leave it out, "
                    f"or set {part}=.. itself"
                )
        place[name] = value
    return tree


def _composed(folder: Path, words: list[str], is_adapter: bool) -> dict[str, Any]:
    """Return the settings of the command line for a folder that belongs to no run of ours."""
    from launch.compose import compose

    base = folder
    if is_adapter or (folder / "base.json").is_file():
        from trainer.adapters.merged import base_folder, config_folder

        if config_folder(folder) == folder:
            raise ValueError(
                f"{folder} belongs to a base of several folders (base.json), which only its run "
                "puts together; evaluate it where its run is, or what tessera export writes"
            )
        base = base_folder(folder)
    chosen = [] if any(word.startswith("model=") for word in words) else ["model=pretrained"]
    tree = compose([*chosen, *words, f"model.path={base}"], command="evaluate").tree
    return tree | {"name": tree["name"] or "evaluate"}  # the title of the page of answers


def _evaluated(tree: dict[str, Any], page: Path | None, words: list[str]) -> dict[str, Any]:
    from launch.binding import bind_run
    from launch.terminal import configure_logging
    from trainer.evaluate_run import evaluate_run

    configure_logging(rank=0)
    run = bind_run(tree)
    refuse_idle(words, tree)
    run.check(1)
    if page is not None and run.validation.every is None:
        raise ValueError(
            f"html={page} shows answers, and the run asks for none; set validation.every=1"
        )
    if page is not None and not page.parent.is_dir():
        raise ValueError(f"html={page} is in no folder; make {page.parent}, or give another path")
    return evaluate_run(run, page)


def _print(found: dict[str, Any], *, is_json: bool) -> None:
    from trainer.callbacks.confusion import lines_of

    if is_json:
        from trainer.record import plain

        print(json.dumps({name: plain(value) for name, value in found.items()}))
        return
    for name, value in found.items():
        if not isinstance(value, dict):
            text = f"{value:.6f}" if isinstance(value, float) else f"{value:,}"
            print(f"  {name.replace('_', ' '):<26} {text:>14}")
    if "confusion" in found:
        print("\n".join(lines_of(found["confusion"])))
