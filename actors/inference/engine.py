"""One vLLM engine behind a few verbs: launch, abort, swap, score, measure and close.

Owns the `AsyncLLM` and, through it, vLLM's processes. Knows no rollout, prompt text, reward or
socket. Driven by `actors.worker`, or directly by a benchmark. The code for CPU and CUDA differs
only in the options of `engine_args`; of our tests, only tests/gpu run the CUDA branch.

Every token carries the exact policy version that sampled it, even if a swap falls between two
tokens of one request: EngineCore labels each step with its version, and `_Router` reads the label.
`_Router` replaces vLLM's own output processor inside `AsyncLLM`. That one would hold tokens back
for `stream_interval` steps, merge them across a swap, and take several times as long per token.

We depend on three internals of vLLM, to be checked at each upgrade: the place of `_Router`,
`actors.inference.logprob_packing`, and a pause without vLLM's own sleep of 20 ms.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

from actors.inference import vllm_errors
from actors.inference.device import check_device, engine_device
from actors.inference.generation import BASE_VERSION, EngineDied, Generation, Measurement, Meter
from actors.inference.step_pace import OPTION
from actors.inference.vllm_options import check_options
from actors.inference.weights import SwapFailed
from buffer.processes.descendants import OWNER
from configs.adapters import swaps_adapters
from configs.errors import one_line
from configs.schema import Config, LoraConfig, SamplingConfig

# vLLM reads these on import, here and in its processes.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# All outputs of a step at once. In slices of 128, `_Router` would count each as a step of its own,
# and log-probabilities of the first slice's array would be missing in the others.
os.environ["VLLM_V1_OUTPUT_PROC_CHUNK_SIZE"] = str(2**20)
# It serves top-k and top-p only, which we do not use, and a compiler would have to build it first.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
# A worker has nothing to save, and would take 5 s to end by itself.
os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")

import pydantic
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessorOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.inference import adapters
from actors.inference.extension import FRONTEND_PID

ADAPTER, ADAPTER_ID = "policy", 1  # of the only one; a new version takes its place
CLOSE_S = 7.0  # after this, vLLM's processes are killed and leave shared memory behind


def engine_args(config: Config, seed: int = 0) -> AsyncEngineArgs:
    """vLLM's options for one engine of this run. `seed` is that of requests without one.

    Raises `ValueError` if this vLLM was not built for `actors.device`, or for an option of
    `actors.vllm` that cannot be set.
    """
    check_device(config, current_platform.device_type)
    if engine_device(config) == "cpu":
        # Compiling prolongs the start of a tiny model by 14 s, or by 34 s the first time. With the
        # default block of 128 tokens, hardly any prompt would be shared.
        if config.actors.vllm.get("enforce_eager", True):
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        special: dict[str, Any] = {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(config.actors.kv_cache_gib * 2**30),
            "block_size": 32,
            # After a prefill in parts, vLLM rewinds the generator of a seeded request. torch's CPU
            # generator cannot do that, so vLLM would crash.
            "enable_chunked_prefill": False,
            "scheduler_cls": "actors.inference.logprob_packing.CompactScheduler",
            "additional_config": {OPTION: config.actors.min_step_ms},
        }  # fmt: skip
        if config.actors.tensor_parallel == 1:
            # By default, vLLM runs a CPU model in a process of its own, and both processes spin
            # while they wait for each other, which takes the learner's core on a machine with two.
            # vLLM does this to set the number of threads, which we set here instead.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
            special["distributed_executor_backend"] = UniProcExecutor
    elif config.actors.min_step_ms:
        raise ValueError(
            f"actors.min_step_ms={config.actors.min_step_ms}: only CPU engines emulate the latency "
            "of another machine; remove it on a GPU, otherwise it would not do anything"
        )
    else:
        special = {"gpu_memory_utilization": config.actors.gpu_memory_frac}
    options: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "hf_overrides": {"head_dtype": config.model.head_dtype},
        "max_model_len": config.model.max_context,
        # One more for `Engine.score`, which never waits for a rollout.
        "max_num_seqs": config.actors.slots + 1,
        "tensor_parallel_size": config.actors.tensor_parallel,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "actors.inference.extension.SnapshotLoader",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": seed,
    }
    if swaps_adapters(config):
        options |= adapters.options(config)
    return AsyncEngineArgs(**options | special | check_options(config))


def sampling_params(sampling: SamplingConfig, max_tokens: int, seed: int) -> SamplingParams:
    """vLLM's parameters of one response. It has a seed of its own only if `sampling.seeded`:
    vLLM draws seeded tokens in Python, one request after the other.
    """
    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=max_tokens,
        seed=seed if sampling.seeded else None,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # they are of this request alone, so vLLM need not copy them in depth
    )


class Engine:
    """One vLLM instance.

    The constructor blocks while the model loads. All methods are for one asyncio event loop.
    `version` is the policy that samples new requests, `BASE_VERSION` before the first swap.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        """Load `model.path`. `seed` decides all samples, unless `sampling.seeded`.

        Engines of one run must have different seeds; otherwise they may sample the same responses.
        Raises `ValueError` for options that cannot work, or for a model that vLLM cannot run. Needs
        a `private_folder`, because vLLM's processes leave their sockets behind.
        """
        assert OWNER in os.environ, "an engine was started outside a private folder"
        if os.path.isdir(config.model.path):
            os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ[FRONTEND_PID] = str(os.getpid())
        # We report the end of vLLM's processes ourselves, in one line.
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        self.version = BASE_VERSION
        self._sampling = config.sampling
        self._lora = config.model.lora if swaps_adapters(config) else None
        self._adapter: LoRARequest | None = None  # none before the first swap, nor with merge
        self._meter = Meter(config.actors.slots, time.monotonic())
        self._router = _Router(self._meter)
        self._causes = vllm_errors.Causes()
        args = engine_args(config, seed)
        try:
            self._llm = AsyncLLM.from_engine_args(args)
        except Exception as error:  # a model can make vLLM raise anything
            cause = self.cause or _said(error)
            self._causes.close()
            advice = "; with model.lora.merge=true it need not serve adapters" if self._lora else ""
            if "max_model_len" in cause:
                advice = f"; lower model.max_context={config.model.max_context}"
            raise ValueError(
                f"model.path={config.model.path}: vLLM cannot run it: {cause}{advice}"
            ) from error
        # Inside a running loop, vLLM has made a handler, which has not taken its first step yet.
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()
            self._llm.output_handler = None
        self._llm.output_processor = self._router  # type: ignore[assignment]
        self.tokenizer: Any = self._llm.get_tokenizer()
        configured = (self._llm.model_config.try_get_generation_config() or {}).get(
            "eos_token_id", []
        )
        ids = [
            self.tokenizer.eos_token_id,
            *(configured if isinstance(configured, list) else [configured]),
        ]
        self.eos_ids = frozenset(token for token in ids if token is not None)
        self._score_ids = count()
        self._gate = asyncio.Lock()  # held during a swap, so that no request starts
        self._submissions: set[asyncio.Task[None]] = set()

    @property
    def died(self) -> asyncio.Event:
        """Set when vLLM's processes are gone or broken, so that nothing more is sampled."""
        return self._router.died

    @property
    def cause(self) -> str:
        """Why vLLM or `_Router` failed, in one line. "" if neither did, or gave no reason."""
        return self._causes.first() or self._router.error

    @property
    def model_type(self) -> str:
        """The name of the model's family, from its configuration."""
        return self._llm.model_config.hf_text_config.model_type

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the model's vocabulary."""
        return self._llm.model_config.get_vocab_size()

    def launch(
        self,
        request_id: str,
        prompt_ids: list[int],
        max_tokens: int,
        *,
        seed: int,
        num_continued: int = 0,
    ) -> Generation:
        """Sample at most `max_tokens` tokens after `prompt_ids`, by the keys of `sampling`.

        `seed` decides the response, whatever else the engine does, but only if `sampling.seeded`.
        `prompt_ids` ends with the first `num_continued` tokens of the response, which another
        engine sampled. vLLM cannot advance a seeded generator to their end, and starting it again
        would repeat the draws that made them, so the rest is drawn from a generator of its own.
        Returns at once, and never raises.
        """
        if num_continued:
            seed = zlib.crc32(f"{seed} {num_continued}".encode()) >> 1
        params = sampling_params(self._sampling, max_tokens, seed)
        return self._launch(request_id, prompt_ids, params)

    async def score(self, token_ids: list[int]) -> array[float]:
        """Log-probabilities of all tokens but the first, at temperature 1, by the newest weights.

        This takes one prefill, alongside the requests that decode. Raises `EngineDied`, and any
        error of vLLM.
        """
        params = SamplingParams(
            max_tokens=1,
            logprobs=0,  # like all others, since a step's log-probabilities come in one array
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        generation = self._launch(f"score {next(self._score_ids)}", token_ids, params)
        try:
            await generation.finished
        except EngineDeadError as error:
            raise EngineDied(f"vLLM died while it scored a sequence: {self.cause}") from error
        return generation.prompt_logprobs

    def _launch(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> Generation:
        generation = Generation(request_id)
        self._router.expect(generation)
        task = asyncio.create_task(self._submit(generation, prompt_ids, params))
        self._submissions.add(task)
        task.add_done_callback(self._submissions.discard)
        return generation

    async def _submit(
        self, generation: Generation, prompt_ids: list[int], params: SamplingParams
    ) -> None:
        async with self._gate:
            if generation.request_id not in self._router:
                return  # aborted while it waited for a swap
            # The salt keeps a request from reusing a prompt that another policy version prefilled.
            prompt = tokens_input(prompt_ids, cache_salt=f"policy {self.version}")
            try:
                added = await self._llm.add_request(
                    generation.request_id, prompt, params, lora_request=self._adapter
                )
                # It may have been aborted, or have ended, before vLLM told us its own id.
                if generation.request_id not in self._router:
                    await self._llm.abort(added.request_id, internal=True)
            except Exception as error:
                # The error belongs to this request, whose worker reports it.
                self._router.fail(generation.request_id, error)

    async def abort(self, request_ids: list[str]) -> None:
        """Stop these requests. Those that have ended already are ignored.

        Returns once EngineCore has freed their slots. Raises `EngineDied`.
        """
        aborted = self._router.forget(request_ids)
        try:
            await self._llm.abort(
                [request_id for _, internal_ids in aborted for request_id in internal_ids],
                internal=True,
            )
            await self._llm.is_paused()  # answered in order, so the abort is done after this
        except EngineDeadError as error:
            raise EngineDied("vLLM died while it aborted requests") from error
        finally:
            for generation, _ in aborted:
                generation.end("abort")

    async def swap(self, path: str, version: int) -> float:
        """Load the safetensors file `path` as policy `version`, while all requests stay.

        It holds all weights, or adapters alone if `model.lora` says so. Returns the length of the
        pause in decoding, in seconds. Earlier tokens keep their version and their key-value cache,
        and every later token carries the new version. Raises `EngineDied`, or `SwapFailed`, after
        which the engine must not be used again.
        """
        async with self._gate:
            try:
                await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
                started = time.monotonic()  # until then, a step that had begun went on
                self._meter.interrupt()
                if self._lora is None:
                    _raise_first(await self._llm.collective_rpc("load_snapshot", args=(path,)))
                else:
                    self._adapter = await self._load_adapter(path, self._lora)
                await self._llm.update_weight_version(str(version))
                await self._llm.resume_generation()
            except EngineDeadError as error:
                raise EngineDied(f"vLLM died while it loaded policy version {version}") from error
            except Exception as error:  # vLLM passes its worker's error on as a bare Exception
                raise SwapFailed(
                    f"policy version {version} could not be loaded: {error}"
                ) from error
            self.version = version
            return time.monotonic() - started

    async def _load_adapter(self, path: str, lora: LoraConfig) -> LoRARequest:
        """Put the adapters of the file `path` in the place of those before.

        Requests in flight name the adapter that they use, so none may have started before there
        was one.
        """
        if self._adapter is None and self._router.num_expected:
            raise ValueError("requests in flight use no adapter")
        with adapters.folder(path, lora) as name:
            await self._llm.add_lora(LoRARequest(ADAPTER, ADAPTER_ID, name, load_inplace=True))
            _raise_first(await self._llm.collective_rpc("check_adapter", args=(ADAPTER_ID,)))
        return LoRARequest(ADAPTER, ADAPTER_ID, name)

    def measure(self) -> Measurement:
        """Return the engine's activity since the last call."""
        return self._meter.report(time.monotonic())

    def close(self) -> None:
        """Stop vLLM's processes, which takes seconds. Requests in flight never end."""
        self._llm.shutdown(timeout=CLOSE_S)
        self._causes.close()
        del self._llm  # now, since its destructor fails while the interpreter ends


def _raise_first(errors: list[str]) -> None:
    """Of vLLM's workers, which return "" if all went well."""
    for error in filter(None, errors):
        raise ValueError(error)


def _said(error: Exception) -> str:
    """On one line. A refused option of vLLM's also shows all other options, and a link."""
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(one["msg"] for one in error.errors())
    return one_line(error)


class _Router:
    """Passes EngineCore's outputs to their `Generation`s.

    It replaces `vllm.v1.engine.output_processor.OutputProcessor`.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._expected: dict[str, Generation] = {}  # by our id
        self._running: dict[str, Generation] = {}  # by vLLM's internal id
        self._internal: dict[str, str] = {}  # ours -> vLLM's
        self.died = asyncio.Event()
        self.error = ""  # of this class itself, after which EngineCore still runs

    def expect(self, generation: Generation) -> None:
        assert generation.request_id not in self._expected, (
            f"request {generation.request_id} is in the engine already"
        )
        self._expected[generation.request_id] = generation
        self._meter.occupy(len(self._expected), time.monotonic())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._expected

    @property
    def num_expected(self) -> int:
        return len(self._expected)

    def _drop(self, request_id: str) -> Generation | None:
        generation = self._expected.pop(request_id, None)
        internal = self._internal.pop(request_id, None)
        if internal is not None:
            del self._running[internal]
        self._meter.occupy(len(self._expected), time.monotonic())
        return generation

    def fail(self, request_id: str, error: Exception) -> None:
        if generation := self._drop(request_id):
            generation.end(error)

    def forget(self, request_ids: Iterable[str]) -> list[tuple[Generation, list[str]]]:
        """Route nothing more to these requests.

        Returns those that were in flight, with vLLM's ids if it knows them.
        """
        forgotten = []
        for request_id in request_ids:
            internal = self._internal.get(request_id)
            if generation := self._drop(request_id):
                forgotten.append((generation, [internal] if internal is not None else []))
        return forgotten

    # The interface of AsyncLLM's output processor ------------------------------------------------

    def add_request(
        self,
        request: Any,
        prompt: Any,
        parent_req: Any = None,
        request_index: int = 0,
        queue: Any = None,
    ) -> None:
        # It is gone if it was aborted in the meantime: see `_submit`.
        if generation := self._expected.get(request.external_req_id):
            self._running[request.request_id] = generation
            self._internal[generation.request_id] = request.request_id

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        return list(request_ids)

    def has_request(self, request_id: str) -> bool:
        return request_id in self._running

    def process_outputs(
        self, outputs: list[Any], timestamp: float, stats: Any, weight_version: str | None = None
    ) -> OutputProcessorOutput:
        """One step of EngineCore: for each request its new tokens, and how it ended if it did."""
        version = BASE_VERSION if weight_version in (None, "default") else int(weight_version)
        num_tokens = num_ended = 0
        logprobs: Iterator[float] = iter(())
        for output in outputs:
            # Its own and, with `logprob_packing`, those of the outputs after it as well.
            if output.new_logprobs is not None:
                logprobs = iter(output.new_logprobs.logprobs[:, 0].tolist())
            of_output = list(islice(logprobs, len(output.new_token_ids)))
            generation = self._running.get(output.request_id)
            if generation is None:
                continue  # it was aborted, which EngineCore did not know yet
            assert len(of_output) == len(output.new_token_ids), "tokens without log-probabilities"
            if output.new_token_ids:
                num_tokens += 1
                generation.extend(version, output.new_token_ids, of_output)
            if output.new_prompt_logprobs_tensors is not None:  # the prompt's own tokens come first
                scores = output.new_prompt_logprobs_tensors.logprobs[:, 0]
                generation.prompt_logprobs = array("f", scores.tolist())
            if output.finish_reason is not None:
                num_ended += 1
                self._drop(generation.request_id)
                generation.end(str(output.finish_reason))
        if num_tokens:
            self._meter.step(timestamp, num_tokens, num_ended)
        return OutputProcessorOutput(request_outputs=[], reqs_to_abort=[])

    def update_scheduler_stats(self, scheduler_stats: Any) -> None:
        pass  # statistics are off

    def propagate_error(self, error: Exception) -> None:
        if not isinstance(error, EngineDeadError):
            self.error = one_line(error, with_type=True)
        self.died.set()
        for generation in list(self._expected.values()):
            self.fail(generation.request_id, error)
