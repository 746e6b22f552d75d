"""The data of a run is judged before any engine is loaded: rows, lengths and rewards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs import cli
from configs.errors import ExitStatus
from configs.schema import Config
from tests.pages import ROOT
from tests.unit.tools.test_check import make_config
from tools import check
from tools.checking.data import check_data
from tools.checking.findings import Finding
from tools.checking.gate import Refused
from tools.launching import data_check
from tools.warm_start import build_tokenizer

RIGHT = "return float(bool(answer) and response.strip() == answer)"


def findings(config: Config, quick: bool = False) -> dict[tuple[str, str], str]:
    """The result of each finding, by verdict and subject."""
    found = [one for one in check_data(config, quick) if isinstance(one, Finding)]
    return {(one.verdict, one.subject): one.result for one in found}


def rows(*answers: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]


def with_verifier(
    folder: Path, body: str, given: Sequence[Any] = rows("4", "5"), *overrides: str
) -> Config:
    (folder / "own_verifier.py").write_text(f"def verify(prompt, response, answer, _):\n    {body}")
    return make_config(
        folder, list(given), None, "data.environment=own_verifier:verify", *overrides
    )


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the folder of the verifier."""
    monkeypatch.chdir(tmp_path)


def test_text_without_tokens_is_named(tmp_path: Path) -> None:
    given = [{"prompt": "A4B2=", "answer": "1"}, {"prompt": "A4B2√=", "answer": "1"}]
    config = make_config(tmp_path, given, None)
    build_tokenizer().save_pretrained(config.model.path)
    found = findings(config)
    assert found["note", "unknown text"].startswith("1 of 2 prompts hold characters")


@pytest.mark.parametrize(
    ("answer", "environment"),
    [
        ("4", "exact"),
        (4, "numeric"),
        ("6*7 = 42\n#### 42", "auto"),
        ("Paris", "auto"),
        ("\\frac{1}{2}", "math_verify"),
    ],
)
def test_reference_answers_are_worth_more_than_nonsense(
    answer: Any, environment: str, tmp_path: Path
) -> None:
    found = findings(make_config(tmp_path, rows(answer), None, f"data.environment={environment}"))
    assert ("ok", "rewards") in found and ("warning", "rewards") not in found
    assert "the reference answer 1, empty 0, nonsense 0" in found["ok", "rewards"]


@pytest.mark.parametrize("body", ["return 0.0", "return 1.0", "return float(len(response) > 40)"])
def test_a_verifier_that_prefers_nothing_to_nonsense_is_suspect(body: str, tmp_path: Path) -> None:
    found = findings(with_verifier(tmp_path, body))
    assert "in 2 of 2 rows" in found["warning", "rewards"]
    assert ", row 1) with the answer '4'" in found["warning", "rewards"]


def test_a_penalty_for_nonsense_is_as_good_as_a_reward(tmp_path: Path) -> None:
    body = "return 0.0 if response == answer else -1.0"
    assert ("warning", "rewards") not in findings(with_verifier(tmp_path, body))


@pytest.mark.parametrize(("pays", "verdict"), [(True, "ok"), (False, "note")])
def test_an_environment_is_played_to_its_end(pays: bool, verdict: str, tmp_path: Path) -> None:
    """The reward of its second turn counts; one that expects other responses is no suspect."""
    (tmp_path / "own_game.py").write_text(
        "class Game:\n    turns = 0\n    def step(self, response):\n        self.turns += 1\n"
        f"        return 'again' if self.turns < 2 else float({pays} and response == '4')\n"
    )
    found = findings(make_config(tmp_path, rows("4"), None, "data.environment=own_game:Game"))
    assert (verdict, "rewards") in found and ("SUSPECT", "rewards") not in found
    assert ("reference answer 1," in found["ok", "rewards"]) == pays


def test_a_verifier_without_reference_answers_is_only_called(tmp_path: Path) -> None:
    found = findings(with_verifier(tmp_path, "return float(len(response))", [{"prompt": "write"}]))
    assert ("note", "reference") in found and ("warning", "rewards") not in found


@pytest.mark.parametrize(
    ("body", "cause", "response"),
    [
        ("return 1 / len(response)", "ZeroDivisionError", "''"),
        ("return 'good'", "not a finite number", "''"),
        ("return float(response == answer) if len(response) < 9 else None", "None", "'xqzv"),
    ],
)
def test_a_verifier_that_gives_no_reward_fails(
    body: str, cause: str, response: str, tmp_path: Path
) -> None:
    result = findings(with_verifier(tmp_path, body))["error", "verifier"]
    assert result.startswith(f"gave no reward for 2 of 2 rows; on the response {response}")
    assert cause in result and ", row 1)" in result


def test_a_verifier_that_hangs_fails_after_its_time(tmp_path: Path) -> None:
    body = "import time; time.sleep(60)"
    limit = "data.verifier_timeout_s=0.2"
    assert "0.2" in findings(with_verifier(tmp_path, body, rows("4"), limit))["error", "verifier"]


def test_a_long_row_is_counted_and_named(tmp_path: Path) -> None:
    given = [{"prompt": "x" * length, "answer": "4"} for length in (10, 20, 1400)]
    found = findings(make_config(tmp_path, given, None))
    assert found["ok", "lengths"].startswith("prompts have 10 to 1400 tokens, median 20, of ")
    assert "skips 1 of 3 prompts" in found["note", "too long"]
    assert ", row 3) has 1400 tokens" in found["note", "too long"]


def test_no_run_starts_if_every_row_is_too_long(tmp_path: Path) -> None:
    given = [{"prompt": "x" * 1400, "answer": "4"}]
    assert ("error", "too long") in findings(make_config(tmp_path, given, None))


def test_repeated_rows_and_several_answers_are_named(tmp_path: Path) -> None:
    given = [row | {"prompt": "2+2?"} for row in rows("4", "4", "5")]
    found = findings(make_config(tmp_path, given, None))
    assert "row 2 repeats" in found["note", "duplicates"]
    assert found["note", "answers"].endswith("rows.jsonl, row 3 differ")


def test_held_out_prompts_that_are_trained_on_are_suspect(tmp_path: Path) -> None:
    config = make_config(tmp_path, rows("4", "5"), None)
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text((tmp_path / "rows.jsonl").read_text())
    data, every = replace(config.data, eval=str(held_out)), replace(config.eval, every=1)
    assert "2 of 2" in findings(replace(config, data=data, eval=every))["warning", "held out"]


# The commands ------------------------------------------------------------------------------------


def depth(config: Config, depth: str) -> check.CheckConfig:
    return check.CheckConfig(**{**vars(config), "depth": depth})


def test_only_a_check_by_hand_fails_on_a_suspicion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_verifier(tmp_path, "return 0.0")
    assert check.run(depth(config, "data")) == ExitStatus.FAILED
    assert "prompt 1: " in capsys.readouterr().out
    assert check.run(depth(config, "quick")) == ExitStatus.OK
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  warning")


def test_every_depth_fails_if_no_run_could_work(tmp_path: Path) -> None:
    config = with_verifier(tmp_path, "return None")
    for value in ("quick", "data", "all"):
        with pytest.raises(Refused, match="verifier: gave no reward"):
            check.run(depth(config, value))


@pytest.mark.slow
def test_the_launcher_refuses_a_broken_verifier_and_prints_a_suspicion(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"own_verifier:verify on prompt .* raised KeyError"):
        data_check.check_data(with_verifier(tmp_path, "raise KeyError(7)"))
    data_check.check_data(with_verifier(tmp_path, "return 0.0"))
    assert "warning" in capfd.readouterr().out
    data_check.check_data(with_verifier(tmp_path, RIGHT))
    assert "warning" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.train=reasoning_gym:chainsum", "has no task 'chainsum'; near ones: chain_sum"),
        ("data.environment=nosuch", "data.environment='nosuch' is no known verifier"),
    ],
)
def test_a_wrong_name_is_refused_before_a_process_of_the_run_starts(
    override: str, line: str, tmp_path: Path
) -> None:
    pytest.importorskip("reasoning_gym")
    config = make_config(tmp_path, rows("4"), None, override)
    with pytest.raises(ValueError, match=line):
        data_check.check_data(config)


def test_the_launcher_does_not_check_the_data_that_come_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_check, "subprocess", None)
    data_check.check_data(cli.load([]))


# The example -------------------------------------------------------------------------------------

EXAMPLE = ROOT / "examples/own_data"


@pytest.mark.slow
@pytest.mark.parametrize("in_its_folder", [True, False])
def test_the_example_is_checked_from_the_root_and_from_its_own_folder(
    in_its_folder: bool, tmp_path: Path
) -> None:
    model = make_config(tmp_path, rows("4"), None).model.path
    overrides = [f"model.path={model}", "depth=data"]
    if in_its_folder:
        overrides += ["data.train=rows.jsonl", "data.environment=verifier:verify"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.check", "--config", str(EXAMPLE / "config.yaml"), *overrides],
        cwd=EXAMPLE if in_its_folder else ROOT,
        env={**data_check.os.environ, **data_check.python_path()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "means: the reference answer 1, empty 0, nonsense 0" in done.stdout


def test_the_users_part_of_the_example_is_short() -> None:
    lines = (EXAMPLE / "verifier.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 20
