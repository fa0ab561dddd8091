"""Is a real pretrained model the same model here as in transformers?

    python -m benchmarks.pretrained model=DIR text=FILE.jsonl [documents=20] [row_tokens=512]

Compares logits on a prompt, the greedy continuation, and the perplexity of the documents (column
`text`, each cut to `row_tokens`), in fp32 on the CPU. Exit code 1: they differ by more than 1e-4.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.parity.oracle import relative
from trainer.data.tokenizers import FileTokenizer
from trainer.pretrained import load_causal_lm

PROMPT = "The capital of France is"
LIMIT = 1e-4


def main(arguments: list[str]) -> int:
    """Print one line per comparison."""
    from transformers import AutoModelForCausalLM

    options = dict(word.split("=", 1) for word in arguments)
    folder, tokens = Path(options["model"]), int(options.get("row_tokens", 512))
    tokenizer = FileTokenizer(folder)
    ours = load_causal_lm(folder, dtype=torch.float32, device=torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def our_logits(ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])[None]
        return ours(ids, positions, torch.ones_like(ids))

    lines = Path(options["text"]).read_text().splitlines()[: int(options.get("documents", 20))]
    sums, count, worst = [0.0, 0.0], 0, 0.0
    with torch.no_grad():
        print(f"{PROMPT!r} continues {_continue(our_logits, tokenizer)!r}")
        for line in lines:
            ids = torch.tensor([tokenizer.encode(json.loads(line)["text"])[:tokens]])
            pair = our_logits(ids), theirs(ids).logits
            worst = max(worst, relative(*pair))
            for side, logits in enumerate(pair):
                sums[side] += F.cross_entropy(
                    logits[0, :-1].double(), ids[0, 1:], reduction="sum"
                ).item()
            count += ids.shape[1] - 1
    mine, other = (math.exp(total / count) for total in sums)
    print(f"{len(lines)} documents, {count} targets: logits differ by {worst:.1e} of the largest")
    print(f"perplexity {mine:.6f} here, {other:.6f} in transformers")
    return int(worst > LIMIT or abs(mine / other - 1) > LIMIT)


def _continue(logits: object, tokenizer: FileTokenizer, length: int = 12) -> str:
    assert callable(logits)
    ids = tokenizer.encode(PROMPT)
    for _ in range(length):
        ids.append(int(logits(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids[-length:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
