"""`tessera convert`: a Gemma between Hugging Face, Flax and DeepMind files."""

from pathlib import Path

from launch.words import options_of

USAGE = """usage: tessera convert source=DIR output=DIR to=FORMAT

  source=DIR   a Gemma: config.json with safetensors, flax_model.msgpack or deepmind_params.npz
  output=DIR   a new folder: config.json, the weights, the tokenizer
  to=FORMAT    hf        safetensors, for Tessera and transformers
               flax      Hugging Face's Flax tree, in msgpack
               deepmind  the tree of DeepMind's gemma library, in npz
"""


def main(arguments: list[str]) -> int:
    """Run `tessera convert` and return the exit code."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, end="")
        return 0
    needed = {"source": "DIR", "output": "DIR", "to": "FORMAT"}
    options = options_of("convert", arguments, needed=needed)

    from trainer.convert import convert_folder

    source, output = (Path(options[key]).expanduser() for key in ("source", "output"))
    count = convert_folder(source, output, options["to"])
    print(f"{output}: {count} tensors as {options['to']}, read back and equal bit for bit")
    return 0
