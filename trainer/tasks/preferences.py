"""Preferences: a reward for every text, or a language model that learns by DPO, from pairs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.heads import CAUSAL_LM, SEQUENCE, CausalLMSpec, preference_model, reward_model
from models.lora import adapter_names
from models.nn.head import IGNORED
from models.nn.model import DecoderModel
from models.nn.preferences import of_pairs, pair_loss
from trainer.batch import Batch
from trainer.data.examples import PREFERENCE, Labels
from trainer.protocols import Engine
from trainer.tasks.classification import decoder, places
from trainer.tasks.protocol import Judged, Totals

METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@dataclass(frozen=True, kw_only=True)
class RewardTask:
    """Train trunk and `score` so that the chosen text of a pair gets more than the rejected one."""

    @property
    def head(self) -> str:
        return SEQUENCE

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError for data without pairs, or a model that takes no head."""
        _check(spec, labels, "reward", "reward")

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        return reward_model(decoder(spec))

    def judge(self, engine: Engine, batch: Batch, number: int, labels: Labels | None) -> Judged:
        """Answers: place, and the rewards of the chosen and of the rejected text of each pair."""
        rewards = torch.stack(of_pairs(engine.logits(batch).double()), 2)
        return _judged(rewards, rewards, batch, number)

    def metric_names(self, labels: Labels | None) -> tuple[str, ...]:
        return METRICS

    def eval_metrics(self, totals: Totals) -> dict[str, Any]:
        if totals.answers is None or not len(totals.answers):
            return {}
        return _metrics(totals.answers[:, 1], totals.answers[:, 2])


@dataclass(frozen=True, kw_only=True)
class DPOTask:
    """Train a language model's adapter so that it prefers the chosen texts more than its base does.

    Source: Rafailov et al. 2023, equation 7.
    """

    beta: float = 0.1
    """The reward of a text is beta times its log-probability's gain over the base's."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be wrong (cDPO); losses are logged plain."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at the same time in the loss."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"task.beta={self.beta} is not positive; set it to 0.1")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"task.label_smoothing={self.label_smoothing} is no share below 0.5; set it to 0.1 "
                "or 0"
            )
        if self.chunk_tokens < 1:
            raise ValueError(
                f"task.chunk_tokens={self.chunk_tokens} is not positive; set it to 1024"
            )

    @property
    def head(self) -> str:
        return CAUSAL_LM

    def check(self, spec: CausalLMSpec, labels: Labels | None) -> None:
        """Raise ValueError for data without pairs, or a model of another kind."""
        _check(spec, labels, "dpo", "text")

    def build_model(self, spec: CausalLMSpec, labels: Labels | None) -> DecoderModel:
        return preference_model(
            decoder(spec), chunk_tokens=self.chunk_tokens, beta=self.beta,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def judge(self, engine: Engine, batch: Batch, number: int, labels: Labels | None) -> Judged:
        """Answers: place, rewards of the two texts of each pair, and their log-probabilities."""
        log_probs = torch.stack(of_pairs(engine.logits(batch).double()), 2)
        gains = self.beta * (log_probs[..., :1] - log_probs[..., 1:])
        return _judged(gains, torch.cat((gains, log_probs[..., :1]), -1), batch, number)

    def metric_names(self, labels: Labels | None) -> tuple[str, ...]:
        return (*METRICS, "chosen_logps", "rejected_logps")

    def eval_metrics(self, totals: Totals) -> dict[str, Any]:
        if totals.answers is None or not len(totals.answers):
            return {}
        _, chosen, chosen_logps, rejected, rejected_logps = totals.answers.T
        return _metrics(chosen, rejected) | {
            "chosen_logps": float(chosen_logps.mean()),
            "rejected_logps": float(rejected_logps.mean()),
        }


def check_reference(model: nn.Module) -> None:
    """Raise ValueError for a DPO model whose adapters aside is not what it started from."""
    adapters = set(adapter_names(model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if others := [name for name in trained if name not in adapters]:
        raise ValueError(
            "task=dpo compares the model with its base, the adapter switched off, and "
            f"{others[0]} would train in the base; set adapter=lora without modules_to_save"
        )


def _check(spec: CausalLMSpec, labels: Labels | None, task: str, learns: str) -> None:
    if labels is None or labels.problem_type != PREFERENCE:
        raise ValueError(
            f"task={task} needs pairs of texts, of which one is preferred; set data=preferences"
        )
    if bool(labels.names) != (learns == "reward"):
        raise ValueError(
            f"task={task} needs texts that end where it reads them; "
            f"set data.encoder.learns={learns}"
        )
    decoder(spec)


def _judged(rewards: Tensor, answers: Tensor, batch: Batch, number: int) -> Judged:
    """Return the judgement of (B, G, 2, 1) rewards and (B, G, 2, n) answers of pairs."""
    assert batch.class_labels is not None
    is_pair = (batch.class_labels != IGNORED).to(rewards.device)
    chosen, rejected = rewards[..., 0].unbind(-1)
    loss = pair_loss(chosen, rejected, is_pair, torch.ones_like(chosen[0, 0]))
    numbers = torch.arange(1, is_pair.shape[1] + 1).expand(is_pair.shape)
    own = places(batch, number, numbers).to(rewards.device)[..., None]
    return Judged(loss.sum, loss.num_targets, torch.cat((own, answers.flatten(2)), -1)[is_pair])


def _metrics(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float((chosen > rejected).mean()),
        "margin": float((chosen - rejected).mean()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
    }
