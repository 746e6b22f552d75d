"""`python -m tools.bench core`, `buffer` and `turns`, which run on a machine of any speed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from actors import verifier_workers
from actors.verifier_limit import CANCELLED_S
from configs import cli
from tools import bench
from tools.benchmarks import buffer, checkpoints, compiling, shared_prompts, trl_steps, turns
from tools.warm_start import build_model, build_tokenizer


def test_the_core_bench_measures_progress_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    bench.core([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["progress", "ends"]
    for line in lines[1:]:
        assert float(line.split()[1].replace(",", "")) > 0


def test_the_subject_buffer_takes_no_options() -> None:
    with pytest.raises(ValueError, match="x=1: the subject buffer takes no options"):
        bench.buffer(["x=1"])


def test_a_waiting_rollout_occupies_no_slot_and_a_straggler_costs_its_cancel(
    tmp_path: Path,
) -> None:
    """With the real buffer, worker and processes. The bounds leave time for a busy machine."""
    case = ("straggling", "darts")
    sizes = turns.Sizes(steps=2, warm_up=1, slow_frac=0.1, num_workers=16)
    result = turns.measure(tmp_path, [case], sizes)[case]
    assert result.overlap_s == 0
    assert result.most_at_once > 1.5 * turns.SLOTS  # freed slots were taken by other rollouts
    assert result.cancel_delays and max(result.cancel_delays) < 2
    step_s = CANCELLED_S + verifier_workers.POLL_S
    assert result.lingering_s < 2 * step_s * len(result.cancel_delays)


@pytest.mark.slow
def test_the_buffer_bench_prints_every_figure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer.main(
        buffer.Sizes(
            num_records=200, rounds=1, warm_up=50, measured_s=1.0, num_engines=20, steps=1,
            outstanding=(16, 32),
        )
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    figures = {name: _figures(rest) for name, _, rest in (line.partition(": ") for line in lines)}
    assert figures["trajectories of 2,000 tokens through socket, core and logs"][0] > 0
    assert figures["cost of durability"][0] < 100
    assert figures["progress of 20 engines"][0] > 0
    [p50, p99] = [n for n in figures["cancel decision to freed slot"] if n not in (50, 99)][:2]
    assert 0 < p50 <= p99
    table = [_figures(line) for line in lines[-2:]]
    assert [row[0] for row in table] == [16, 32]
    assert table[0][1] < table[1][1] and all(row[3] > 0 for row in table)
    assert not list(tmp_path.iterdir())


def test_the_learner_bench_takes_steps_with_shared_and_repeated_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PROMPT": 20, "RESPONSE": 4, "GROUPS": 1, "GROUP_SIZE": 2}.items():
        monkeypatch.setattr(shared_prompts, name, value)
    shared_prompts.save_model(str(tmp_path))
    times, saved, _ = shared_prompts.steps(str(tmp_path), shared=True)
    assert len(times) == shared_prompts.STEPS and min(times) > 0
    assert saved == 19 / (2 * 23)
    assert shared_prompts.steps(str(tmp_path), shared=False)[1] == 0.0


def test_the_checkpoint_bench_saves_beside_optimizer_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dict.fromkeys(checkpoints.SIZES, 8) | {"hidden_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(checkpoints, "SIZES", small)
    monkeypatch.setattr(checkpoints, "ROUNDS", 1)
    checkpoints.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(checkpoints.PARTS)
    assert lines[0].startswith("0.00 GB on cpu")


def _figures(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text)]


def test_the_compile_bench_compares_steps_of_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a compiler here: tests/unit/learner/test_compiling.py uses one."""
    monkeypatch.setattr("learner.compiling.compile_blocks", lambda *_: "compiled nothing")
    monkeypatch.setattr(compiling, "STEPS", 1)
    monkeypatch.setattr(shared_prompts, "PROMPT", 16)
    monkeypatch.setattr(shared_prompts, "RESPONSE", 8)
    compiling.main()
    assert "ratio, median of 1 pairs" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trl_bench_times_every_step_of_its_trainer_but_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our own runs, which the tests of the pipeline are about."""
    build_model(seed=0).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(trl_steps, "STEPS", 3)
    small = ["batch.groups=2", "darts.group_size=2", "sampling.max_tokens=8"]
    config = cli.load(["--config", "demo", f"model.path={tmp_path}", *trl_steps.PLAIN, *small])
    seconds = trl_steps.train_with_trl(config)
    assert len(seconds) == 2 and min(seconds) > 0


def test_the_trl_bench_says_which_command_makes_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="tools.warm_start models/tiny-reasoner"):
        trl_steps.main()
