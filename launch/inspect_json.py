"""A step in numbers, for scripts."""

from typing import Any

from launch.inspect_report import MAX_LONGEST, Report


def numbers(report: Report) -> dict[str, Any]:
    """Return what `tessera inspect json=true` prints."""
    counts, store = report.counts, report.loader.rows.store
    return {
        "step": report.step,
        "micro_batches": counts.num_micro_batches,
        "rows": counts.num_rows,
        "row_tokens": counts.row_tokens,
        "documents": len(counts.documents),
        "tokens": counts.num_tokens,
        "targets": counts.num_targets,
        "targets_share": counts.num_targets / max(1, counts.num_tokens),
        "targets_behind_rows": counts.num_behind,
        "targets_astray": counts.num_astray,
        "padding": counts.num_padding,
        "padding_share": counts.num_padding / (counts.num_rows * counts.row_tokens),
        "tokens_per_byte": counts.tokens_per_byte,
        "images": counts.num_images,
        "image_places": report.image_places,
        "tokens_that_look": counts.num_lookers,
        "looks_astray": counts.num_looks_astray,
        "classes": dict(counts.classes),
        "sources": {
            name: {
                "documents": one.num_documents,
                "tokens": one.num_tokens,
                "targets": one.num_targets,
            }
            for name, one in counts.sources.items()
        },
        "longest": [
            {"provenance": piece.provenance, "tokens": piece.num_tokens}
            for piece in counts.longest[:MAX_LONGEST]
        ],
        "lengths": [
            {"from": first, "to": last, "documents": number}
            for first, last, number in counts.lengths
        ],
        "data": {
            "tokens": store.num_tokens,
            "documents": store.num_documents,
            "held_out_documents": report.num_held_out,
        },
        "tokenizer": {
            "setting": report.run.tokenizer_setting,
            "vocab_size": report.tokenizer.vocab_size,
        },
    }
