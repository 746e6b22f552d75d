"""`python -m tools.bench trl`: seconds per step of TRL's GRPO trainer and of ours, on one batch.

Owns the comparison: the embedded default with the model, prompts, batch, objective and optimizer of
`configs/demo.yaml`, all 8 responses of a prompt trained on. TRL generates with transformers, as it
does by default, in this process; ours are runs of `tools.launch`, of which the last selects as the
demo does. The first step of each is left out, since it loads what the others use. Needs the extra
`dev`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from actors.verifiers import INLINE
from buffer.data.sources import make_sources
from configs import cli
from configs.extras import import_extra
from configs.model_path import check_model
from configs.objectives import objective
from configs.schema import Config
from tools.reporting.run_directory import RunDirectory

STEPS = 13  # the first one is left out
SEEDS = (0, 1, 2)  # lengths drift differently in each
PLAIN = ["darts.policy=plain", "redundancy.rule=none"]
OURS = {
    "sync plain": [*PLAIN, "pipeline.mode=sync"],
    "async plain": [*PLAIN, "pipeline.mode=async"],
    "the demo": [],  # with its selection and relative limit
}


def main() -> None:
    configs = [cli.load(["--config", "demo", f"run.steps={STEPS}", f"run.seed={s}"]) for s in SEEDS]
    check_model(configs[0].model.path)
    print(
        f"{configs[0].batch.groups} prompts of {configs[0].darts.group_size} responses, "
        f"{STEPS - 1} steps, {len(SEEDS)} seeds"
    )
    trl = [train_with_trl(config) for config in configs]
    of_trl = fmean(fmean(seconds) for seconds in trl)
    _row("TRL", trl, of_trl)
    for name, overrides in OURS.items():
        _row(f"ours, {name}", [_ours(overrides, seed) for seed in SEEDS], of_trl)


def _row(name: str, runs: list[list[float]], of_trl: float) -> None:
    means = [fmean(seconds) for seconds in runs]
    by_seed = ", ".join(f"{mean:.2f}" for mean in means)
    print(
        f"{name:<18}{fmean(means):6.2f} s per step (by seed: {by_seed}); "
        f"TRL's over it: {of_trl / fmean(means):.1f}",
        flush=True,
    )


def train_with_trl(config: Config) -> list[float]:
    """Seconds of each step but the first, on this machine's CPU."""
    with warnings.catch_warnings():  # about vLLM, which TRL is not to use here
        warnings.simplefilter("ignore")
        trl = import_extra("trl", "python -m tools.bench trl", "dev")
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        """When each step ended."""

        ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    verify = INLINE["tagged_sum"]

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        # The text that TRL passes lacks the token that ends a right answer.
        texts = tokenizer.batch_decode(completion_ids)
        return [verify(prompt, text, "", {}) for prompt, text in zip(prompts, texts, strict=True)]

    groups, size, adam = config.batch.groups, config.darts.group_size, config.optimizer
    clip = objective(config.loss)
    prompts = [payload.text for payload in make_sources(config).train.draw(groups * STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=config.model.path,
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[Clock],
            args=trl.GRPOConfig(
                output_dir=folder,
                seed=config.run.seed,
                max_steps=STEPS,
                per_device_train_batch_size=groups * size,
                num_generations=size,
                max_completion_length=config.sampling.max_tokens,
                temperature=config.sampling.temperature,
                loss_type=config.loss.kind,
                epsilon=clip.clip_low,
                epsilon_high=clip.clip_high,
                beta=0.0,
                learning_rate=adam.lr,
                lr_scheduler_type="constant",
                adam_beta1=adam.betas[0],
                adam_beta2=adam.betas[1],
                weight_decay=adam.weight_decay,
                max_grad_norm=adam.max_grad_norm,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                log_level="error",
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _differences(Clock.ends)


def _ours(overrides: list[str], seed: int) -> list[float]:
    command = [sys.executable, "-m", "tools.launch", "--config", "demo", *overrides]
    command += [f"run.steps={STEPS}", f"run.seed={seed}", "eval.every=0", "launch.progress=none"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, f"run.dir={folder}"], check=True, stdout=subprocess.DEVNULL)
        return _differences(RunDirectory.read(Path(folder) / "demo").seconds())


def _differences(ends: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(ends)]
