"""Names of every metric a run writes, in one place.

`group/metric`: W&B makes one section per group. Seconds are wall time in the controller, shares lie in 0..1, lengths
are in tokens. A name is only ever spelled here; `metrics.jsonl`, W&B, progress and report all use these constants.
"""

from __future__ import annotations

from perception.types import FailureKind

# Reward: over the trajectories of a step
REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
ZERO_VARIANCE = "reward/zero_variance"  # share of sampled groups whose rewards are all equal: they teach nothing
SAMPLING_ROUNDS = "reward/sampling_rounds"  # how often the step sampled (`algorithm.dynamic=refill`)
GROUPS_TRAINED = "reward/groups_trained"  # groups the learner got
PARSE_OK = "reward/parse_ok"  # share of trajectories with an answer that parses
COMPONENT_PREFIX = "component/"
FAILURE_PREFIX = "failure/"

# Perception: how good the answers are
GIOU = "perception/giou"  # mean over samples of mask IoU; a missed or invented target counts as 0
BOX_IOU = "perception/box_iou"
BOXES_ANSWERED = "perception/boxes_answered"  # per trajectory
BOXES_TRUE = "perception/boxes_true"  # per sample

# Held-out evaluation; W&B shows these under `eval/`
GIOU_GREEDY = "giou_greedy"  # temperature 0
GIOU_SAMPLED = "giou_sampled"  # the rollout temperature
HELD_OUT_PARSE_OK = "parse_ok"  # of the sampled answers
HELD_OUT_SAMPLES = "samples"
HELD_OUT_RELOOK_RATE = "relook_rate"  # share of the sampled answers that were looked at again
HELD_OUT_LOOK_GAIN = "look_gain"  # mask IoU of what was kept less that of the first pass, over all sampled answers

# Look-to-Confirm (look=relook): over the trajectories of a step
LOOK_PASSES = "look/passes"  # per trajectory
RELOOK_RATE = "look/relook_rate"  # share looked at again
RELOOK_GAIN = "look/gain"  # mask IoU of the kept answer less the first one's, mean over those looked at again
RELOOK_CHANGED = "look/changed"  # share of those whose kept answer is not the first one
CONFIDENCE = "look/confidence"  # mean expected mask IoU of the kept answers
THRESHOLD = "look/threshold"  # below this confidence an answer is looked at again
CALIBRATION_ERROR = (
    "look/calibration_error"  # |expected - true mask IoU| over ten bins, before this step is learned from
)
PREFIX_HITS = "look/prefix_hits"  # share of what a second pass shares with the first that came from the prefix cache

# Responses
RESPONSE_TOKENS = "response/tokens_mean"
RESPONSE_TRUNCATED = "response/truncated"  # share that met the token limit

# Policy update
LOSS = "policy/loss"
ENTROPY = "policy/entropy"  # nats per sampled token
KL = "policy/kl"  # estimate (`algorithm.kl`) of the KL to the starting policy, nats per token
RATIO = "policy/ratio"  # mean importance ratio learner / engine, before truncation and clipping
LOGPROB_MISMATCH = "policy/logprob_mismatch"  # mean |log p learner - log p engine|
LOGPROB_MISMATCH_MAX = "policy/logprob_mismatch_max"
CLIP_LOW = "policy/clip_low"  # share of tokens below 1 - clip_low
CLIP_HIGH = "policy/clip_high"  # share of tokens above 1 + clip_high
IMPORTANCE = "policy/importance"  # mean truncated weight learner / engine
IMPORTANCE_CAPPED = "policy/importance_capped"  # share of tokens whose weight was cut at importance_cap
GRAD_NORM = "policy/grad_norm"  # before clipping
LR = "policy/lr"
POLICY_VERSION = "policy/version"  # weights the step's rollouts were sampled from

# Learner: one update, all ranks together
LEARNER_SAMPLES_PER_S = "learner/samples_per_s"  # trajectories
LEARNER_TOKENS_PER_S = "learner/tokens_per_s"  # tokens of the rows without padding, prompts once per group
MFU = "learner/mfu"  # useful FLOPs over what a plain matrix product reaches (`learner/flops.py`)
PEAK_MEMORY = "learner/peak_gib"  # of the fullest rank: device memory on CUDA, resident memory on the CPU
PACKING = "learner/packing"  # tokens of one row per trajectory / tokens computed: what sharing prompts saves
ROW_FILL = "learner/row_fill"  # share of the computed tokens that is not padding
COMPILED = "learner/compiled"  # graphs compiled so far, rank 0
FEATURE_HITS = "learner/feature_hits"  # share of images whose features came from the cache (frozen vision tower)

# Time: seconds of one step, by stage
SECONDS_STEP = "time/step"
SECONDS_GENERATE = "time/generate"
SECONDS_SCORE = "time/score"
SECONDS_LEARN = "time/learn"
SECONDS_SYNC = "time/sync"
SECONDS_CONTROLLER = "time/controller"  # the step less the four stages
SYNC_PAUSE = "time/sync_pause"  # the engine stood still
SYNC_TRANSFER = "time/sync_transfer"  # bytes on their way

# Throughput
TOKENS_PER_S = "throughput/tokens_per_s"  # sampled tokens over the whole step
SAMPLES_PER_S = "throughput/samples_per_s"  # trajectories over the whole step
SAM_CACHE_HITS = "throughput/sam_cache_hits"  # share of groups whose image embedding was already there

STAGES = (SECONDS_GENERATE, SECONDS_SCORE, SECONDS_LEARN, SECONDS_SYNC, SECONDS_CONTROLLER)
"""The stages of a step in order; they add up to SECONDS_STEP."""


def component(name: str) -> str:
    """Mean raw value of one reward component."""
    return COMPONENT_PREFIX + name


def held_out(metric: str, name: str) -> str:
    """A held-out metric of one set: `metric/name`; the set a run is judged by has the name "" and nothing added."""
    return f"{metric}/{name}" if name else metric


def failure(kind: FailureKind) -> str:
    """Share of a step's trajectories that failed in this way."""
    return FAILURE_PREFIX + kind.value
