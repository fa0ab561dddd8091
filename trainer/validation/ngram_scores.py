"""BLEU and ROUGE of longer answers. The home of torchmetrics, imported where it is used."""

from collections.abc import Sequence
from importlib.util import find_spec

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
NGRAM_SCORES = ("bleu", *_ROUGE)


def check_installed() -> None:
    """Raise ValueError where the package is missing."""
    if find_spec("torchmetrics") is None:
        raise ValueError(
            f"validation.metrics has some of {', '.join(NGRAM_SCORES)}, which need the package "
            "torchmetrics, and it is not installed; run pip install 'tessera-train[metrics]', or "
            "leave them out"
        )


def ngram_scores(
    names: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Return BLEU of all answers together (0 where no four words in a row are right), and ROUGE as
    the mean of F1 over answers.

    Case counts in BLEU, whose words are sacrebleu's (13a); in ROUGE letters and digits count alone,
    in lower case. Sources: Papineni et al. 2002; Post 2018; Lin 2004.
    """
    from torchmetrics.functional.text import sacre_bleu_score
    from torchmetrics.functional.text.rouge import rouge_score

    found = {}
    if "bleu" in names:
        found["bleu"] = float(sacre_bleu_score(list(answers), [[each] for each in references]))
    keys = tuple(_ROUGE[name] for name in names if name in _ROUGE)
    if keys:
        rouge = rouge_score(list(answers), list(references), rouge_keys=keys)
        found |= {
            name: float(rouge[f"{_ROUGE[name]}_fmeasure"]) for name in names if name in _ROUGE
        }
    return {name: found[name] for name in names}
