"""What simple, old methods reach on data with answers: printed beside what was trained.

    python -m benchmarks.baselines split data=FILE.jsonl output=DIR
    python -m benchmarks.baselines texts train=TRAIN.jsonl test=TEST.jsonl
    python -m benchmarks.baselines tags train=TRAIN.jsonl test=TEST.jsonl
    python -m benchmarks.baselines questions train=TRAIN.jsonl test=TEST.jsonl

`split` writes DIR/train.jsonl and DIR/test.jsonl by the rows' column `split`. A text that begins
with "From " is a mail of the mbox format: its body is kept.
`texts` (rows {"text", "label"}): TF-IDF of words and logistic regression, by scikit-learn's
defaults and with less regularisation.
`tags` (rows {"tokens", "tags"}): each word's most frequent tag in training, and for unknown words
the most frequent tag of words that were seen once.
`questions` (rows {"question", "answer"}): each question's most frequent answer in training, and for
unknown questions the most frequent answer of all: what can be said without a look at the image.
A run with `validation.every` prints it by itself.

Public data: the mails of the SpamAssassin corpus (https://spamassassin.apache.org/old/publiccorpus)
and the sentences of the Brown corpus (nltk), with every tenth file of each folder as test.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.files import read_lines
from trainer.validation.question_only import most_frequent
from trainer.validation.scores import exact_match

WEAK, DEFAULT = 100.0, 1.0  # inverse strengths of the regularisation


def split(data: str, output: str) -> list[str]:
    """Write one file per value of the column `split`; return what was written, in words."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_lines(Path(data)):
        part = row.pop("split")
        if row.get("text", "").startswith("From "):
            row["text"] = row["text"].partition("\n\n")[2]
        rows[part].append(row)
    for part, chosen in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return [f"{folder / part}.jsonl: {len(chosen)} rows" for part, chosen in rows.items()]


def texts(train: str, test: str) -> list[str]:
    """Return the test accuracies of TF-IDF and logistic regression, in words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows, held_out = list(read_lines(Path(train))), list(read_lines(Path(test)))
    vectors = TfidfVectorizer()
    known = vectors.fit_transform([row["text"] for row in rows])
    new = vectors.transform([row["text"] for row in held_out])
    lines = []
    for strength in (DEFAULT, WEAK):
        model = LogisticRegression(C=strength, max_iter=2000)
        model.fit(known, [row["label"] for row in rows])
        accuracy = model.score(new, [row["label"] for row in held_out])
        lines.append(f"TF-IDF + logistic regression, C={strength:g}: accuracy {accuracy:.4f}")
    return lines


def tags(train: str, test: str) -> list[str]:
    """Return the test accuracy of each word's most frequent tag, in words."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in read_lines(Path(train)):
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            counts[token][tag] += 1
    rare: Counter[str] = sum((c for c in counts.values() if c.total() == 1), Counter())
    best = {token: count.most_common(1)[0][0] for token, count in counts.items()}
    unknown = rare.most_common(1)[0][0]
    right = total = 0
    for row in read_lines(Path(test)):
        right += sum(
            best.get(token, unknown) == tag
            for token, tag in zip(row["tokens"], row["tags"], strict=True)
        )
        total += len(row["tags"])
    return [f"most frequent tag of each word: accuracy {right / total:.4f} of {total} words"]


def questions(train: str, test: str) -> list[str]:
    """Return the test accuracy of each question's most frequent answer, in words."""
    pairs = ((row["question"], row["answer"]) for row in read_lines(Path(train)))
    best, usual = most_frequent(pairs)
    rows = read_lines(Path(test))
    right = sum(exact_match(best.get(row["question"], usual), row["answer"]) for row in rows)
    guessed = sum(exact_match(usual, row["answer"]) for row in rows)
    known = sum(row["question"] in best for row in rows)
    return [
        f"most frequent answer ({usual}): accuracy {guessed / len(rows):.4f}",
        f"most frequent answer of each question: accuracy {right / len(rows):.4f} of {len(rows)} "
        f"questions, {known} of them known",
    ]


def main(words: list[str]) -> int:
    """Print what the named function found."""
    functions: dict[str, Callable[..., list[str]]]
    functions = {"split": split, "texts": texts, "tags": tags, "questions": questions}
    if not words or words[0] not in functions:
        print(f"say which of {', '.join(functions)} to run", file=sys.stderr)
        return 64
    options = dict(word.split("=", 1) for word in words[1:])
    print("\n".join(functions[words[0]](**options)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
