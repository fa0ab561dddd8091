"""What a config may take from the environment, and that it may hold no secret.

A config is stored with the run, logged and sent to trackers, and workers read it from there: it is
kept whole, so a secret in it is refused instead of masked.
"""

import os
from collections.abc import Mapping
from typing import Any

# Names of places and jobs. A name of one's own begins with TESSERA_.
_NAMED = ("HOME", "USER", "TMPDIR", "SCRATCH", "WORK", "PROJECT", "HOSTNAME", "SLURM_JOB_ID")
_OWN = "TESSERA_"


def named_variable(name: str, *default: Any) -> Any:
    """Return what stands for `${oc.env:NAME}` or `${oc.env:NAME,default}` in a config."""
    if name not in _NAMED and not name.startswith(_OWN):
        raise ValueError(
            f"${{oc.env:{name}}} would be stored with the run; configs may read "
            f"{', '.join(_NAMED)} and {_OWN}*, and libraries read their own variables by themselves"
        )
    if name in os.environ:
        return os.environ[name]
    if not default:
        raise ValueError(f"${{oc.env:{name}}} is not set; set it, or write ${{oc.env:{name},..}}")
    return default[0]


def refuse_secrets(tree: Mapping[str, Any]) -> None:
    """Raise ValueError, without the value, where a config holds what looks like a secret."""
    from trainer.redaction import redact, secrets_in

    for key, kind in secrets_in(tree):
        raise ValueError(
            f"{redact(key)} holds what looks like {kind}, and configs are stored, logged and sent "
            "to trackers; leave it out, and set the variable that its library reads (HF_TOKEN, "
            "WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ..)"
        )
