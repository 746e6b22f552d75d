"""Every message on the wire: one tagged union per sender, named by who sends it to whom.

Encoded as msgpack against these types: unknown fields, wrong types and values out of bounds are
refused, and nothing is unpickled. Tokens, log-probabilities and masks travel as little-endian
arrays: `tokens` int32, `logprobs` float32.
"""

# It does not know that msgspec structs inherit frozen=True:
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

Role = Literal["buffer", "engine", "learner", "monitor"]

LINE_CHARS = 4000  # of an error; its sender cuts it
TEXT_CHARS = 8000  # of a response, which its sender cuts, too
BEGINNING_CHARS = 60  # of a prompt, as monitors show it
MAX_CHUNKS = 1000  # of one `Progress`
MAX_SLOTS = 2**13
MAX_ROLLOUTS = 2 * MAX_SLOTS  # of an engine: in its slots, and ended but not yet settled
MAX_REWARD = 1e6  # and the least is its negative

# A peer's values are bounded by their types, so that the decoder refuses all others. No bound
# admits NaN. A pattern ends with \Z, because $ also matches before a last newline.
Whole = Annotated[int, Meta(ge=0, le=2**53)]  # ids, steps, counts
Version = Annotated[int, Meta(ge=-1, le=2**40)]  # -1: none yet
Slots = Annotated[int, Meta(ge=1, le=MAX_SLOTS)]
VocabSize = Annotated[int, Meta(ge=1, le=2**31)]
NumBytes = Annotated[int, Meta(ge=0, le=2**42)]
Reward = Annotated[float, Meta(ge=-MAX_REWARD, le=MAX_REWARD)]
Amount = Annotated[float, Meta(ge=0, le=1e12)]  # seconds, tokens per second
Share = Annotated[float, Meta(ge=0, le=2)]  # cancelled requests may still decode beside new ones
Name = Annotated[str, Meta(max_length=200, pattern=r"^[ -~]+\Z")]  # printable ASCII
OptionalName = Annotated[str, Meta(max_length=200, pattern=r"^[ -~]*\Z")]
Line = Annotated[str, Meta(max_length=LINE_CHARS)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS)]
Place = Annotated[str, Meta(max_length=4096)]  # an address or a path
Digest = Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{64})?\Z")]  # sha256 in hex, or ""
ProbeLogprobs = Annotated[bytes, Meta(max_length=1 << 14)]
MetricName = Annotated[str, Meta(max_length=100, pattern=r"^[a-z0-9_]+/[a-z0-9_/]+\Z")]
Metrics = Annotated[
    dict[MetricName, Annotated[float, Meta(ge=-1e300, le=1e300)]], Meta(max_length=300)
]


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of everything that travels."""

    def _cut(self, field: str, most: int) -> None:
        """Keep the beginning of a text that its receiver would refuse for its length."""
        text = getattr(self, field)
        if len(text) > most:
            msgspec.structs.force_setattr(self, field, text[:most])


class SnapshotRef(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The address of an immutable weight snapshot, and the means to verify it."""

    version: Version
    digest: Digest  # of the safetensors bytes
    num_bytes: NumBytes
    address: Place  # zmq endpoint that serves it, or "" for the file transport
    path: Place  # file that holds it, or "" for the zmq transport
    # Of its difference from the version before (`buffer.wire.deltas`); 0 if that is not served.
    delta_bytes: NumBytes = 0
    base_digest: Digest = ""  # of the version before


class Chunk(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Consecutive tokens of one rollout: sampled by one policy version, or given (`sampled=False`,
    no logprobs).

    `offset` is their place in the rollout: its prompt begins at 0, and the tokens that the engine
    was given as `LaunchedRollout.prefix` follow the prompt.
    """

    rollout_id: Whole
    offset: Whole
    sampled: bool
    version: Version
    tokens: bytes
    logprobs: bytes


# both ---------------------------------------------------------------------------------------------


class Heartbeat(Message):
    """Sent by every link each second: I am alive."""


class Shutdown(Message):
    """The run is over for this peer. `error` is empty when it ended well.

    `restart`: the peer itself stands still; its process is to be started again.
    """

    error: Line
    restart: bool = False

    def __post_init__(self) -> None:
        self._cut("error", LINE_CHARS)


class HelloAgain(Message):
    """The buffer does not know this connection: it was restarted, or took the peer for lost.

    The answer to a heartbeat. The peer must connect again and say hello.
    """


class Received(Message):
    """The buffer has read messages of `num_bytes` on this connection since its hello, as
    `buffer.wire.credit` counts them, so that as many more may be sent.
    """

    num_bytes: int


class Part(Message):
    """A piece of a message that is larger than one piece may be; the pieces come in order."""

    data: bytes
    last: bool


# actor -> buffer ----------------------------------------------------------------------------------


class EngineHello(Message):
    """An engine offers `slots` credits. Repeated until a `Welcome` comes.

    incarnation: of this process. The same one on another connection goes on with its rollouts; a
    new one replaces the engine of that name.
    rollouts: launched here, and not yet settled or forgotten.
    run: the run that this link has served before, "" for none; a buffer of another run refuses it.
    """

    engine_id: Name
    engine_type: Name  # engines of one type share a latency curve, e.g. "cpu/float32/tp1"
    slots: Slots
    policy_version: Version
    pid: Whole
    incarnation: Name
    rollouts: Annotated[list[Whole], Meta(max_length=MAX_ROLLOUTS)] = []
    run: OptionalName = ""


class Progress(Message):
    """Chunks decoded since the last report, in order.

    `waits`: rollouts that have ended a turn, and decode nothing until their environment answers.
    """

    chunks: Annotated[list[Chunk], Meta(max_length=MAX_CHUNKS)]
    waits: Annotated[list[Whole], Meta(max_length=MAX_CHUNKS)] = []


class Finished(Message):
    """A rollout ended by itself and was scored. All its chunks were sent before.

    `num_tokens` counts its sampled tokens. `truncated`: it reached its length limit, which is
    `sampling.max_tokens`, the end of the context, or where a `Curtail` met it.
    """

    rollout_id: Whole
    num_tokens: Whole
    truncated: bool
    reward: Reward
    text: Text  # the response as text, for samples.jsonl; may be cut

    def __post_init__(self) -> None:
        self._cut("text", TEXT_CHARS)


class Failed(Message):
    """A rollout could not be generated or scored; `error` is one line that names the cause, the
    place and the fix.
    """

    rollout_id: Whole
    error: Line
    unusable: bool = False  # its prompt does not fit the context: no retry can help

    def __post_init__(self) -> None:
        self._cut("error", LINE_CHARS)


class Stopped(Message):
    """The engine confirms a cancel, so the slot is free.

    `num_tokens` were sampled until it stopped, and `text` is their text.
    """

    rollout_id: Whole
    num_tokens: Whole
    text: Text = ""  # for samples.jsonl; may be cut

    def __post_init__(self) -> None:
        self._cut("text", TEXT_CHARS)


class PolicyLoaded(Message):
    """The engine swapped in a snapshot: seconds to fetch it, and seconds that decoding paused."""

    version: Version
    fetch_s: Amount
    pause_s: Amount


class VerifierReport(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """An engine's verifier: how busy it is now, and the verifications since the last report."""

    num_workers: Whole = 0  # responses that can be verified at the same time
    num_waiting: Whole = 0  # responses that wait for a free worker
    num_busy: Whole = 0  # workers that verify
    num_verified: Whole = 0  # verifications that ended, failures included
    num_failed: Whole = 0  # of these, those without a reward, for any reason
    num_timeouts: Whole = 0  # of these, those that exceeded data.verifier_timeout_s
    queue_s: Amount = 0.0  # sum of the times that they had waited for a worker
    time_s: Amount = 0.0  # sum of the times that they took
    longest_s: Amount = 0.0


class EngineReport(Message):
    """The engine's measurements since its last report."""

    batch: Amount  # mean number of requests decoding
    ms_per_token: Amount  # mean time between two tokens of one request
    tokens_per_s: Amount
    busy_frac: Share  # mean occupied slots / slots
    verifier: VerifierReport = VerifierReport()


class Probed(Message):
    """The probe's results under the engine's weights of `version` (`buffer.wire.probe`)."""

    version: Version  # -1: the weights that it started with
    model_type: Name
    logprobs: ProbeLogprobs  # float32


class Leaving(Message):
    """The speaker was told to leave. An engine has sent all its tokens, and other engines continue
    its rollouts. A learner rank has saved its checkpoint, and another learner may take its place.
    """


EngineMessage = Union[
    EngineHello, Progress, Finished, Failed, Stopped, PolicyLoaded, Probed, EngineReport, Leaving
]


# buffer -> actor ----------------------------------------------------------------------------------


class PromptPayload(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A prompt as its source gave it: text, or chat messages, and the data that its environment
    needs to score it.
    """

    prompt_id: str
    text: str  # "" if `messages` is given
    messages: list[dict[str, str]]
    answer: str
    metadata: str  # JSON, for the environment (reasoning_gym's entry, say)
    source: str = ""  # its file and row, "" if it has none
    kind: str = ""  # evaluations report each kind separately; "" if there is only one

    @property
    def name(self) -> str:
        """How messages call it: by its id, and where to find it."""
        return f"prompt {self.prompt_id}" + (f" ({self.source})" if self.source else "")

    @property
    def beginning(self) -> str:
        """Of its text, or of its last message, on one line for monitors."""
        text = self.text or (self.messages[-1].get("content", "") if self.messages else "")
        return beginning(text)


def beginning(text: str) -> str:
    return " ".join(text[: 4 * BEGINNING_CHARS].split())[:BEGINNING_CHARS]


class LaunchedRollout(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One rollout to start; `prefix` holds the tokens already paid for on an engine that died.

    `seed` is that of the whole response, whichever engine samples which part of it.
    """

    rollout_id: int
    seed: int
    prefix: bytes  # int32 sampled tokens, empty as a rule


class Launch(Message):
    """Start these rollouts of one prompt; those that the engine has already just go on."""

    group_id: int
    prompt: PromptPayload
    rollouts: list[LaunchedRollout]


class Cancel(Message):
    """Abort these rollouts; answer each with `Stopped` (or `Finished`, if it got there first)."""

    rollout_ids: list[int]


class Curtail(Message):
    """End these rollouts where they are, as at their length limit; answer each with `Finished`."""

    rollout_ids: list[int]


class Welcome(Message):
    """The buffer accepts an engine.

    policy: the newest snapshot, if one was published.
    resend: for each rollout of the hello that goes on, the number of its tokens that the buffer
        holds, prompt included. The engine sends the others, and its end if it has ended.
    forget: rollouts of the hello that are over, or were launched again elsewhere.
    run: names the run, across its resumes.
    """

    policy: SnapshotRef | None
    resend: dict[int, int] = {}
    forget: list[int] = []
    run: str = ""


class Settled(Message):
    """The ends of these rollouts are recorded, so the engine may forget their tokens."""

    rollout_ids: list[int]


class PolicyPublished(Message):
    """A newer snapshot can be fetched."""

    policy: SnapshotRef


EngineCommand = Union[
    Welcome, Launch, Cancel, Curtail, Settled, PolicyPublished, Heartbeat, HelloAgain, Shutdown
]


# learner -> buffer --------------------------------------------------------------------------------


class Work(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The work of training on a trajectory, in units of one token's pass through the layers.

    That is its number of tokens and the two terms below.
    """

    per_prediction: Amount = 0.0  # in the head, for each sampled token
    per_pair: Amount = 0.0  # in attention, times the square of the number of tokens
    shares_prompts: bool = False  # whether a rank forwards the prompt of its responses once


class LearnerHello(Message):
    """A learner rank is ready to train `step` (0 for a fresh run). Rank 0 says so after all others.

    incarnation: of this learner, the same over all its connections and ranks.
    resumed: it was started with run.resume, so it may continue records that exist.
    take_over: it replaces a learner that is still alive.
    vocab_size: of its model; token ids are below it.
    work: of its model, by which trajectories are divided among the ranks.
    """

    rank: Whole
    num_ranks: Whole
    step: Whole
    pid: Whole
    vocab_size: VocabSize
    incarnation: OptionalName = ""
    resumed: bool = False
    take_over: bool = False
    run: OptionalName = ""  # as in `EngineHello`
    work: Work = Work()


class Pull(Message):
    """Rank asks for its shard of a portion of `step`."""

    rank: Whole
    step: Whole
    portion: Whole = 0


class Trained(Message):
    """Rank 0: `step` is done.

    Repeated until `Acknowledged`. Metrics by their `metrics.jsonl` names.
    """

    step: Whole
    num_tokens: Whole  # over all ranks, those that contributed to the gradient
    metrics: Metrics


class NewPolicy(Message):
    """The learner's weights are policy `version` from now on; `Published` follows.

    Until then engines keep an older policy, as if they had not swapped yet.
    """

    version: Whole


class Published(Message):
    """The snapshot of the newest policy is ready to be fetched."""

    policy: SnapshotRef
    seconds: Amount
    probe: ProbeLogprobs = b""  # float32: its results under these weights (`buffer.wire.probe`)


class LearnerFailed(Message):
    """The learner cannot go on; one line says why."""

    rank: Whole
    error: Line

    def __post_init__(self) -> None:
        self._cut("error", LINE_CHARS)


LearnerMessage = Union[LearnerHello, Pull, Trained, NewPolicy, Published, LearnerFailed, Leaving]


# buffer -> learner --------------------------------------------------------------------------------


class Evaluated(Message):
    """The policy after `step` steps was evaluated on the held-out prompts."""

    step: int
    reward_mean: float


class LearnerWelcome(Message):
    """The newest policy of which the buffer knows, and the newest that engines can fetch.

    Both are -1 before any publication. A learner publishes first, with the next version.
    """

    policy_version: int
    offered_version: int = -1
    run: str = ""
    evaluated: Evaluated | None = None  # the newest evaluation, if there was one


class Trajectory(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A selected rollout: prompt and response in one row.

    `sampled` is 1 for tokens that the policy sampled.

    Example: two prompt tokens, then three sampled ones, of which a newer policy sampled the last.

        Trajectory(
            rollout_id=68, group_id=17,
            tokens=int32([5, 9, 4, 4, 2]), sampled=uint8([0, 0, 1, 1, 1]),
            actor_logprobs=float32([0, 0, -0.1, -1.2, -0.3]), versions=[(4, 2), (5, 1)],
            reward=1.0, truncated=False, advantage=0.707,
        )
    """

    rollout_id: int
    group_id: int
    tokens: bytes  # int32 [T]
    sampled: bytes  # uint8 [T]
    actor_logprobs: bytes  # float32 [T], 0 where given
    versions: list[tuple[int, int]]  # runs of (policy version, number of sampled tokens), in order
    reward: float
    truncated: bool
    advantage: float  # against the M trajectories of its group, this one included


class Minibatch(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The part of a step that one optimizer update takes.

    The loss is divided by one of the totals, which are over all ranks and include trajectories
    without an advantage.
    """

    num_trajectories: int  # of this rank's shard
    loss_tokens: int
    loss_responses: int


class Shard(Message):
    """One rank's part of a step, or of one portion of it. In each update, all shards of a portion
    take about equal work.

    Only trajectories with a gradient are in it. A truncated one, unless loss.train_truncated,
    counts in its group's rewards alone. One without an advantage counts in the totals alone, unless
    a KL penalty gives it a gradient.

    Example: rank 0 of 2, in a step of 2 groups of 3, of which one trajectory was truncated.

        Shard(
            step=12, policy_version=5, trajectories=[t0, t3],
            minibatches=[Minibatch(num_trajectories=2, loss_tokens=482, loss_responses=5)],
        )
    """

    step: int
    policy_version: int
    trajectories: list[Trajectory]  # those of the first update, then of the second, and so on
    minibatches: list[Minibatch]  # one per update; of this portion
    portion: int = 0
    last: bool = True  # whether the step is complete with this portion

    @property
    def loss_tokens(self) -> int:
        return sum(minibatch.loss_tokens for minibatch in self.minibatches)

    def split(self) -> Iterator[tuple[list[Trajectory], Minibatch]]:
        """This rank's trajectories of each update."""
        start = 0
        for minibatch in self.minibatches:
            end = start + minibatch.num_trajectories
            yield self.trajectories[start:end], minibatch
            start = end


class Acknowledged(Message):
    """`step` is recorded as trained. Repeated for each repetition of its `Trained`."""

    step: int


LearnerCommand = Union[
    LearnerWelcome, Shard, Acknowledged, Evaluated, Heartbeat, HelloAgain, Shutdown
]


# all that the buffer receives, by the role of the speaker, and all that it sends to its peers
SPEAKERS: dict[Role, Any] = {
    "engine": Union[EngineMessage, Heartbeat],
    "learner": Union[LearnerMessage, Heartbeat],
}
Inbound = Union[EngineMessage, LearnerMessage, Heartbeat]
Outbound = Union[EngineCommand, LearnerCommand, Received, Part]


# buffer -> monitors (PUB) -------------------------------------------------------------------------


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout of a group in flight, as a monitor draws it."""

    rollout_id: int
    tokens: int
    state: str  # "running", or its end


class GroupView(msgspec.Struct, frozen=True, kw_only=True):
    """A group in flight."""

    group_id: int
    prompt_id: str
    long_end: str
    budget: int
    short_cutoff: int  # length of the K-th shortest so far; 0 while fewer have finished
    rollouts: list[RolloutView]
    text: str = ""  # the beginning of the prompt


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """An engine, as the buffer sees it."""

    engine_id: str
    engine_type: str
    slots: int
    in_flight: int
    policy_version: int
    tokens_per_s: float
    busy_frac: float
    curve: list[tuple[float, float]]  # (batch, ms per token)


class PromptView(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a recently closed prompt."""

    prompt_id: str
    spread: float  # standard deviation of log length
    budget: int
    pass_rate: float
    lengths_right: list[int]  # finished lengths with reward above 0.5
    lengths_wrong: list[int]
    num_cancelled: int = 0
    text: str = ""  # the beginning of the prompt


class WaitView(msgspec.Struct, frozen=True, kw_only=True):
    """The longest wait of one kind at present. At `limit_s`, the buffer acts."""

    what: str
    waited_s: float
    limit_s: float
    key: str  # that sets the deadline


class LiveState(Message):
    """The live state, published a few times a second.

    `histogram` counts ends by length bin over recent groups. `evaluated` is (prompts done, prompts)
    of the evaluation under way, (0, 0) without one. `warnings` are the newest, each with its time.
    """

    time_s: float
    run_name: str
    phase: str  # "starting", "first evaluation", "training", "evaluating", "done"
    step: int
    steps: int
    policy_version: int
    max_lag: int
    waiting: str  # who waits for whom, in words
    groups_open: int
    groups_ready: int
    bytes_held: int
    refused_frames: int  # that no peer of this version may send
    histogram_edges: list[int]
    histogram: dict[str, list[int]]  # end -> count per bin
    lags: list[int]  # lag of recently shipped trajectories
    metrics: dict[str, float]  # the newest line of metrics.jsonl, and the newest evaluation
    groups: list[GroupView]
    engines: list[EngineView]
    prompts: list[PromptView]
    waits: list[WaitView] = []
    evaluated: tuple[int, int] = (0, 0)
    warnings: list[tuple[float, str]] = []


# weights: actor <-> the learner's snapshot server -------------------------------------------------


class FetchSnapshot(Message):
    """Give me `num_bytes` of snapshot `version`, or of its delta, from `offset`."""

    version: Version
    offset: NumBytes
    num_bytes: NumBytes
    delta: bool = False


class SnapshotChunk(Message):
    """A part of a snapshot's safetensors bytes."""

    version: Version
    offset: NumBytes
    data: bytes


class SnapshotGone(Message):
    """That version is no longer kept; `newest` is."""

    version: Version
    newest: int
