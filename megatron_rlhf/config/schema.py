"""The settings of a run as frozen dataclasses; the text under each field is its help and its documentation.

Values that the InstructGPT paper (arXiv 2203.02155) does not print are marked "open:" with where the default is from.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions, of the llama and neox styles."""

    base: float = 10000.0
    """Base of the frequencies (theta)."""
    scaling: str = "none"
    """none, linear, llama3 or yarn: how the frequencies change for contexts longer than the original one."""
    factor: float = 1.0
    """How many times the original context the scaled one is."""
    low: float = 1.0
    """llama3: frequencies that turn less often within the original context are divided by `factor`."""
    high: float = 4.0
    """llama3: frequencies that turn more often within the original context stay."""
    original_context: int = 8192
    """llama3, yarn: the context the model was first trained with."""
    fraction: float = 1.0
    """Share of a head's width that turns; the numbers behind it stay as they are (GPT-NeoX: 0.25)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Architecture only."""

    layers: int
    """Transformer layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Attention heads."""
    vocabulary: int
    """Tokens in the tokenizer; rows are padded for tensor parallelism, the padding is never sampled."""
    context: int = 2048
    """Longest row in tokens."""
    ffn: int = 0
    """Width of the feed-forward block; 0 means 4 x hidden, for llama 8/3 x hidden up to a multiple of 256."""
    head_dim: int = 0
    """Width of an attention head; 0 means hidden / heads."""
    tied: bool = True
    """Whether the output layer is the input embedding (GPT-3)."""
    style: str = "gpt"
    """gpt (learned positions, LayerNorm, GELU, biases), neox (gpt with rotary positions) or llama (rotary positions,
    RMSNorm, SwiGLU, no biases)."""
    kv_heads: int = 0
    """Key-value heads, each shared by heads / kv_heads query heads; 0 means as many as heads."""
    activation: str = "gelu"
    """gpt and neox style: gelu, or gelu_tanh for its tanh approximation, which GPT-2 was trained with."""
    qkv_bias: bool = False
    """llama style: whether the projections to queries, keys and values have biases (Qwen2); other styles have all."""
    linear_bias: bool = False
    """llama style: whether every projection of a layer has a bias (Granite's code models); other styles have all."""
    norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    rope: Rope = field(default_factory=Rope)
    """Rotary positions, where the style has them."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    precision: str = "fp32"
    """fp32, bf16, or fp16 with a dynamic loss scale (`adam.loss_scale`)."""

    @property
    def rotary(self) -> bool:
        """Whether heads turn by their positions; else positions are learned."""
        return self.style != "gpt"

    @property
    def gated(self) -> bool:
        """Whether there are RMSNorm and SwiGLU in place of LayerNorm and GELU."""
        return self.style == "llama"

    @property
    def biased(self) -> bool:
        """Whether every projection of a layer has a bias."""
        return not self.gated or self.linear_bias

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward block."""
        return self.ffn or (-(-8 * self.hidden // (3 * 256)) * 256 if self.gated else 4 * self.hidden)

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def rotary_width(self) -> int:
        """Numbers of a head that turn."""
        return int(self.head_width * self.rope.fraction)

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.kv_heads or self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """One layout word a role."""

    policy: str = "tp1"
    """The policy while it trains."""
    generate: str = "tp1"
    """The policy while it generates."""
    reference: str = "tp1"
    """The frozen reference; the policy's layout makes the first KL exactly 0."""
    value: str = "tp1"
    """The value model."""
    reward: str = "tp1"
    """The reward model."""
    pretrain: str = "tp1"
    """The policy while it is pretrained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What bounds activation memory."""

    micro_batch: int = 8
    """Rows of one forward-backward of the pipeline."""
    forward_micro_batch: int = 32
    """Rows of one forward without backward."""
    recompute: str = "none"
    """none, selective (core attention) or full (whole layers)."""
    head_rows: int = 0
    """Positions whose logits exist at a time while a language model trains, 0 for all of a micro-batch. Logits are then
    made twice, which pays in memory where the vocabulary is much wider than the network."""
    transformer_engine: str = "auto"
    """auto uses Transformer Engine's layers where it and a GPU are there, never leaves them out."""
    buckets: int = 1
    """Row lengths of one pass over a batch; each more saves padding and costs one filling of the pipeline."""
    packing: bool = False
    """Whether language-model rows lie end to end in one line, each attending to itself (SFT, pretraining, its mix)."""
    pack_tokens: int = 0
    """Tokens of a packed line, 0 for the longest row; `micro_batch` counts lines."""
    deterministic: bool = False
    """Whether an operation without a deterministic algorithm is refused and libraries are held to theirs, so that a
    resumed run is bit-equal on GPUs too; slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """What fp16 multiplies the loss by, so that small gradients do not round to 0; other precisions have none.

    An update whose gradients overflow is skipped. All but `initial` (2^32) and `patience` are Megatron's defaults.
    """

    initial: float = 65536.0
    """The first scale; powers of two unscale exactly."""
    growth_interval: int = 1000
    """Updates in a row without overflow after which the scale grows."""
    growth: float = 2.0
    """What it grows by."""
    backoff: float = 0.5
    """What an overflow multiplies it by."""
    hysteresis: int = 2
    """Overflows since the scale last grew until it first shrinks; from then on every overflow shrinks it."""
    minimum: float = 1.0
    """The smallest scale."""
    patience: int = 20
    """Overflows in a row at the smallest scale that end the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam's constants, the paper's for every model (appendix C)."""

    beta1: float = 0.9
    """First moment."""
    beta2: float = 0.95
    """Second moment."""
    weight_decay: float = 0.0
    """open: none in reward and PPO training."""
    clip: float = 1.0
    """open: global gradient norm limit."""
    host: bool = False
    """Whether fp32 main weights and moments lie in host memory, where Adam then runs; for GPUs that are too small."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """The loss scale of fp16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """One learning-rate schedule."""

    rate: float
    """Peak learning rate."""
    schedule: str = "cosine"
    """cosine to `final` of the peak over the run, or constant."""
    final: float = 0.1
    """Share of the peak at the end of the cosine."""
    warmup: int = 0
    """Updates (iterations in PPO) of linear warm-up; one that fp16 skipped does not count."""
    warmup_start: float = 0.1
    """Share of the peak at step 0 of the warm-up."""
    epsilon: float = 1e-8
    """Adam's epsilon; open: 1e-5 in reward and PPO training (lm-human-preferences)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What `prepare` reads and writes."""

    directory: str = ""
    """Folder of the tokenizer, *.jsonl and the indexed pretraining text; empty means <out>/data."""
    source: str = "chitchat"
    """chitchat (the quickstart's corpus), or a folder with the user's own JSONL."""
    end_token: str = ""
    """The token that closes a response, for example <|im_end|>; empty means what the tokenizer's files say."""
    max_prompt_tokens: int = 1024
    """Longer prompts are filtered out (appendix C)."""
    max_response_tokens: int = 1024
    """Longer demonstrations are filtered out; generation stops there."""
    min_response_tokens: int = 1
    """Shorter demonstrations are filtered out."""
    prompts_per_user: int = 200
    """Cap a user or organisation (section 3.2)."""
    shared_prefix_tokens: int = 64
    """Prompts that share a prefix this long are duplicates (section 3.2)."""
    valid_share: float = 0.1
    """Share of users held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    """Language modelling on text, where no pretrained model is at hand."""

    steps: int
    """Optimizer steps."""
    batch: int
    """Rows a step."""
    length: int
    """Tokens a row."""
    learning: Learning
    """Learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sft:
    """Supervised fine-tuning on demonstrations."""

    epochs: int = 16
    """Passes over the demonstrations (section 3.5; 2 for the RL start, appendix C.3)."""
    examples: int = 0
    """Demonstrations used, 0 for all."""
    batch: int = 32
    """Demonstrations a step."""
    dropout: float = 0.2
    """Residual dropout (section 3.5)."""
    pretraining_fraction: float = 0.0
    """Share of pretraining rows mixed into each step (0.1 for the RL start, appendix C.3)."""
    loss_on: str = "response"
    """open: response (and its end token), or sequence."""
    learning: Learning
    """Learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """K samples a prompt, ranked by a labeler."""

    prompts: int
    """Prompts to rank."""
    valid_prompts: int
    """Held-out prompts to rank."""
    responses_min: int = 4
    """Smallest K (section 3.5)."""
    responses_max: int = 9
    """Largest K."""
    policy: str = "sft"
    """open: the stage whose policy is sampled, sft or rl_start (the paper: mostly SFT)."""
    temperature: float = 1.0
    """open: temperature of the comparison samples."""
    noise: float = 0.45
    """Scale of the labeler's Gumbel noise on the gold score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """Reward-model training, equation (1)."""

    epochs: int = 1
    """More overfits (appendix C.2)."""
    batch: int = 64
    """Prompts a step (appendix C.2)."""
    dropout: float = 0.0
    """open: residual dropout."""
    denominator: str = "surviving"
    """open: a prompt's loss is divided by its pairs that are no tie (surviving) or by all its pairs (all)."""
    learning: Learning
    """Learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    temperature: float = 1.0
    """Temperature; log-probs carry it too."""
    max_tokens: int = 1024
    """Longest response, the end token included."""
    batch: int = 256
    """Sequences a replica decodes together; 0 is as many as fit in the memory that is free."""
    top_k: int = 0
    """Verb sample only: draw from the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Verb sample only: draw from the smallest set of tokens with this probability; 1 means all."""
    groups: int = 0
    """Parts of them that take turns in the pipeline's stages; 0 is one a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kl:
    """The per-token penalty against the reference."""

    coef: float = 0.02
    """beta (appendix C.4)."""
    estimator: str = "k1"
    """open: k1, k2, k3 or exact in the reward; k1 is the log-ratio of equation (2). k3 is always logged.

    exact is the sum over the vocabulary at every position, k1's expectation over the token drawn there: never negative
    and without that draw's noise. The reward, which it is, cannot tell tokens apart, so what the drawn one departs from
    the expectation joins its own advantage; the policy gradient is then k1's on average, with less noise. It needs the
    reference in the policy's layout, as many products as an estimate, and the hidden states of one replica's responses
    in host memory."""
    adaptive: bool = False
    """Whether beta follows `target` (Ziegler et al. 2019)."""
    target: float = 6.0
    """KL in nats a response that the adaptive beta aims at."""
    horizon: float = 10000.0
    """Episodes over which it adapts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ppo:
    """PPO and PPO-ptx, equation (2) and appendix C.4."""

    iterations: int = 500
    """Iterations of the run."""
    episodes: int = 512
    """Episodes an iteration."""
    minibatches: int = 8
    """Updates an iteration and epoch."""
    epochs: int = 1
    """Inner epochs."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """open: GAE lambda (Stiennon et al. 2020)."""
    clip: float = 0.2
    """Ratio clip."""
    value_clip: float = 0.2
    """open: value clip (Ziegler et al. 2019); 0 turns it off."""
    whiten_advantages: bool = True
    """open: advantages to mean 0, variance 1 over the whole batch."""
    whiten_rewards: bool = False
    """open: rewards to variance 1."""
    score_clip: float = 0.0
    """open: scores are clipped to +- this; 0 is off."""
    normalisation: str = "tokens"
    """open: what policy, value and pretraining losses are divided by, tokens or rows; gives gamma its meaning."""
    dropout: float = 0.0
    """open: residual dropout; anything but 0 makes the first ratio differ from 1, and the run refuses to go on."""
    entropy_coef: float = 0.0
    """open: entropy bonus; must be 0, kept as a named setting of the paper's open points."""
    missing_end: str = "replace"
    """open: a response without end token has its score replaced, subtracted from, or kept: replace, subtract, keep."""
    missing_end_score: float = -1.0
    """open: the fixed score of `missing_end` (subtract takes its magnitude off)."""
    pretraining_coef: float = 27.8
    """gamma of equation (2); 0 is plain PPO and runs no pretraining forward."""
    pretraining_ratio: int = 8
    """Pretraining examples an episode."""
    average_decay: float = 0.992
    """Decay of the weight average (EMA)."""
    average_unit: str = "update"
    """open: the average follows every update, or every iteration."""
    evaluate_average: bool = True
    """open: evaluation reads the average (true) or the live weights (false)."""
    kl: Kl = field(default_factory=Kl)
    """KL penalty."""
    policy: Learning
    """The policy's learning rate; open: not printed in the paper."""
    value: Learning
    """The value model's learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshard:
    """The switch between the policy's train and generate layout; no setting changes what a run computes."""

    staging_mb: int = 128
    """MiB through which weights travel that do not lie in one piece."""
    proof: str = "always"
    """Whether a digest of all weights is compared after every switch: always or never."""
    check: bool = False
    """Whether a checksum travels with every message; to find out which one is at fault."""
    park_optimizer: bool = False
    """Whether fp32 main weights, moments and the average wait in host memory while the policy generates."""
    share_reference: bool = False
    """Whether the reference waits in host memory and takes the policy's place to be read; it needs its layout."""
    node: int = 0
    """GPUs that NVLink joins; 0 is what the launcher says, else 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """The win rate and its interval."""

    prompts: int
    """Held-out prompts."""
    temperature: float = 1.0
    """Temperature of the compared responses."""
    max_tokens: int = 0
    """Longest compared response, the end token included; 0 means sampling.max_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is saved and when."""

    every: int = 0
    """Save the state every n steps or iterations; 0 only when a signal asks to stop."""
    phases: bool = False
    """Save the state at every phase boundary of a PPO iteration, for iterations so long that none may be lost."""
    resume: str = "auto"
    """auto goes on from the newest checkpoint of the run's folder, never starts anew."""
    pretrained: str = ""
    """Folder of pretrained weights; empty means what `pretrain` wrote."""
    asynchronous: bool = True
    """Whether a state is written while the run goes on, from a copy in host memory; not the one at a signal."""
    keep: int = 2
    """States kept, the newest; the one before stands in where the newest is damaged."""
    keep_every: int = 0
    """States of every n-th step are kept too; 0 is none."""
    best: str = ""
    """The state that is best by a number of log.jsonl is kept too, for example max score; empty is none."""
    verify: str = "digest"
    """What is looked at before a state or weights are read: digest (the content of every file) or size."""
    untrained: bool = False
    """Whether PPO starts from initial weights and reads none of earlier stages: to measure how fast it is."""
    allow: str = ""
    """Settings that may differ from those a state was saved with, for example ppo.clip,adam.clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observe:
    """Where a run's numbers go beside log.jsonl; no setting changes what a run computes."""

    boards: str = "tensorboard"
    """tensorboard, wandb and mlflow, with commas between, or none; the last two are extras of the same name."""
    prometheus: str = ""
    """File ending in .prom that holds the newest row for the textfile collector of Prometheus's node_exporter, a path
    from the run's folder; empty is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What is reached of the machines' rated speeds; `megatron-rlhf plan calibrate` fits them to measured runs.

    With the A100's `gemm` they reproduce 19 published step times of Megatron within 8 % (tests/plan/test_published.py).
    """

    gemm: float = 0.65
    """Share of `flops` that large matrix products reach; open: 0.78 on A100s, on H100s what brings Megatron-Core's
    175B in bf16 to the 47 % of the rated speed that it reports as its best."""
    memory: float = 0.85
    """Share of `bandwidth` that reads and writes reach."""
    nvlink: float = 0.8
    """Share of `nvlink` that collectives reach."""
    nic: float = 0.8
    """Share of `nic` that collectives reach."""
    launch: float = 8e-6
    """Seconds until the host has started one more kernel."""
    latency: float = 15e-6
    """Seconds that a message or collective takes however small it is."""
    straggler: float = 1.02
    """How much longer the slowest GPU takes than the others; all wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines that a plan is made for, an H100's by default; a run itself asks the machine it is on.

    Rank r is on node r // `node`; speeds are rated ones, one way, of one GPU.
    """

    node: int = 8
    """GPUs a node."""
    nvlink: float = 450e9
    """Bytes a second to the other GPUs of its node."""
    nic: float = 50e9
    """Bytes a second to other nodes."""
    memory: float = 80e9
    """Bytes of memory."""
    flops: float = 989.4e12
    """Floating-point operations a second of dense bf16 matrix products."""
    bandwidth: float = 3.35e12
    """Bytes a second of its memory."""
    host: float = 64e9
    """Bytes a second to host memory."""
    ram: float = 76.8e9
    """Bytes a second of host memory, its share of the node's."""
    disk: float = 0.25e9
    """Bytes a second to the storage of checkpoints; open: 2 GB/s a node, measure yours."""
    watts: float = 1275.0
    """Electric power, its share of the node's; 0 leaves energy out."""
    price: float = 0.0
    """What an hour of it costs, in any currency; 0 leaves the price out."""
    factors: Factors = field(default_factory=Factors)
    """What is reached of these speeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """What `submit` asks SLURM for, and what a job does before its ranks start."""

    partition: str = ""
    """Partition; empty is SLURM's default."""
    account: str = ""
    """Account that pays; empty is SLURM's default."""
    qos: str = ""
    """Quality of service; empty is SLURM's default."""
    time: str = "24:00:00"
    """Walltime as SLURM writes it, for example 2-00:00:00 for two days."""
    nodes: int = 0
    """Nodes; 0 is what the ranks need."""
    tasks: int = 0
    """Ranks a node; 0 is one a GPU (cluster.node), or all ranks where they are fewer."""
    gpus: int = -1
    """GPUs a node; -1 is one a rank, 0 asks for none."""
    cpus: int = 0
    """CPUs a rank; 0 is SLURM's default."""
    signal: int = 600
    """Seconds before the walltime at which the run saves and is queued again."""
    attempts: int = 3
    """Starts in a row without a new state after which the job is not queued again."""
    container: str = ""
    """Image that the ranks run in, pyxis:IMAGE or apptainer:IMAGE; empty is none."""
    mounts: str = ""
    """Folders that the container sees, as its own option takes them, for example /scratch:/scratch,/data:/data."""
    modules: str = ""
    """Modules to load, for example cuda/12.8 nccl/2.27."""
    setup: str = ""
    """A shell line that each job runs first, for example source VENV/bin/activate."""
    options: str = ""
    """Further options of sbatch, separated by semicolons, for example --exclusive; --mem=0."""
    python: str = ""
    """Python that the ranks run; empty is the one that submits, in a container python3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchdog:
    """What ends a run that hangs."""

    seconds: float = 600.0
    """Seconds in which no rank moves on after which all write their stacks and end with 76; 0 is never."""
    start: float = 600.0
    """Seconds in which all ranks must have come; then they end with 76, and rank 0 says who is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One run."""

    out: str
    """Folder of everything the run writes."""
    seed: int = 1
    """Seed of weights, orders and samples."""
    model: Model
    """The policy and the reference."""
    reward_model: Model
    """The reward and the value model."""
    layout: Layouts
    """Layouts by role."""
    compute: Compute
    """Micro-batches and recompute."""
    adam: Adam
    """Adam's constants."""
    data: Data
    """Data room."""
    pretrain: Pretrain
    """Pretraining."""
    sft: Sft
    """The SFT baseline."""
    rl_start: Sft
    """The initial policy of PPO, its reference too (appendix C.3)."""
    rank: Rank
    """Comparison data."""
    reward: Reward
    """Reward model."""
    sampling: Sampling
    """Rollouts."""
    ppo: Ppo
    """PPO."""
    evaluate: Evaluate
    """Evaluation."""
    reshard: Reshard = field(default_factory=Reshard)
    """The phase switch."""
    checkpoint: Checkpoint
    """Saving and resuming."""
    observe: Observe = field(default_factory=Observe)
    """Watching a run."""
    cluster: Cluster = field(default_factory=Cluster)
    """What a plan is made for."""
    slurm: Slurm = field(default_factory=Slurm)
    """What a job asks for."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """Hangs."""
