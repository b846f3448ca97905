"""The rival's side: TRL's PPO trainer, its own loop and nothing changed in it; a callback stops it between iterations.

Run as `python -m benchmarks.ppo.rival TASK DEVICE`. This process imports nothing that bends Megatron-Core or torch.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.harness.turns import Channel
from benchmarks.ppo.task import Task
from megatron_rlhf.observe.memory import peak_bytes


class Clock(TrainerCallback):
    """Takes the turns and the seconds by phase of each; between two turns the trainer waits in `on_step_end`."""

    def __init__(self, channel: Channel, before: int, minibatches: int) -> None:
        self.channel = channel
        self.before = before
        self.minibatches = minibatches
        self.iterations = 0
        self.updates = 0
        self.marks: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first iteration warms up."""
        self._begin()

    def on_log(self, *_: Any, **__: Any) -> None:
        """Updates have ended when their statistics are logged."""
        self.marks["learned"] = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An iteration has ended: tell of it, wait for the next turn; SystemExit when there is none."""
        end = time.perf_counter()
        assert self.updates == self.minibatches, f"{self.updates} optimizer steps instead of {self.minibatches}"
        self.channel.say(**(self._measured(end) if self.iterations else {"gpu": _gpu()}))
        self.iterations += 1
        if not self.channel.my_turn():
            raise SystemExit(0)
        self._begin()

    def _begin(self) -> None:
        self.updates = 0
        self.marks = {"begin": time.perf_counter(), "scoring": 0.0}

    def _measured(self, end: float) -> dict[str, Any]:
        at = self.marks
        phases = {
            "generate": at["generated"] - at["generating"],
            "score": at["scoring"],
            "annotate": at["scored"] - at["generated"] - at["scoring"],
            "update": at["learned"] - at["learning"],
        }
        peak = peak_bytes()
        held = 0 if torch.cuda.is_available() else self.before
        return {"seconds": end - at["begin"], "phases": phases, "peak": peak, "growth": peak - held}

    def watch(self, trainer: PPOTrainer, reward: torch.nn.Module) -> None:
        """Note when the functions that the trainer's loop calls begin and end; they do what they did."""
        inner: dict[str, Callable[..., Any]] = {
            name: getattr(ppo_trainer, name) for name in ("batch_generation", "get_reward", "forward")
        }
        stepped = trainer.optimizer.optimizer.step

        def batch_generation(*args: Any, **kwargs: Any) -> Any:
            self.marks["generating"] = time.perf_counter()
            answer = inner["batch_generation"](*args, **kwargs)
            self.marks["generated"] = time.perf_counter()
            return answer

        def get_reward(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            answer = inner["get_reward"](model, *args, **kwargs)
            if model is reward:
                self.marks["scored"] = time.perf_counter()
                self.marks["scoring"] += self.marks["scored"] - began
            return answer

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.marks.setdefault("learning", time.perf_counter())
            return inner["forward"](*args, **kwargs)

        def step(*args: Any, **kwargs: Any) -> Any:
            self.updates += 1
            return stepped(*args, **kwargs)

        for function in (batch_generation, get_reward, forward):
            setattr(ppo_trainer, function.__name__, function)
        trainer.optimizer.optimizer.step = step


def trainer(task: Task, device: str, folder: str, clock: Clock) -> PPOTrainer:
    """TRL's trainer with the task's sizes: the whole rollout in one batch, an update in one micro-batch, like ours."""
    # The padding is a word of its own, so that no drawn token is taken for padding and no response gets shorter.
    pad, end = task.vocabulary, task.vocabulary + 1
    sizes = GPT2Config(
        vocab_size=task.vocabulary,
        n_positions=task.context,
        n_embd=task.hidden,
        n_layer=task.layers,
        n_head=task.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        num_labels=1,
    )
    settings = PPOConfig(
        output_dir=folder,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=task.rate,
        lr_scheduler_type="constant",
        adam_beta2=task.beta2,
        adam_epsilon=task.epsilon,
        weight_decay=0.0,
        total_episodes=10**9,
        # With gradient accumulation accelerate would take one optimizer step an iteration, whatever num_mini_batches.
        per_device_train_batch_size=task.episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=task.minibatches,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=task.episodes,
        response_length=task.new_tokens,
        stop_token=None,
        temperature=1.0,
        kl_coef=task.kl_coef,
        cliprange=task.clip,
        lam=task.lam,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    words = {f"w{number}": number for number in range(task.vocabulary)} | {"<pad>": pad, "<end>": end}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<end>")),
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
    )
    generator = torch.Generator().manual_seed(1)
    prompts = Dataset.from_list(
        [
            {"input_ids": torch.randint(0, task.vocabulary, (length,), generator=generator).tolist()}
            for length in task.prompt_lengths
        ]
    )
    policy, reference = GPT2LMHeadModel(sizes), GPT2LMHeadModel(sizes)
    reference.load_state_dict(policy.state_dict())
    value, reward = GPT2ForSequenceClassification(sizes), GPT2ForSequenceClassification(sizes)
    value.load_state_dict(reward.state_dict())
    made = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference.eval(),
        reward_model=reward.eval(),
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[clock],
    )
    clock.watch(made, reward)
    return made


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main() -> None:
    """Warms up with one iteration, then runs one a turn until the parent leaves."""
    channel = Channel()
    task, device = Task.parse(sys.argv[1]), sys.argv[2]
    gc.collect()
    clock = Clock(channel, psutil.Process().memory_info().rss, task.minibatches)
    with tempfile.TemporaryDirectory() as folder:
        trainer(task, device, folder, clock).train()


if __name__ == "__main__":
    main()
