"""The sections that say what is learnt: conditions, hypernetwork and objective."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from hl_scale.config.section import Section


class HypernetworkConfig(Section):
    kind: Literal["hyperlora", "hyperlora.paper", "plain_lora"] = "hyperlora"
    """`hyperlora`: the one to use; `hyperlora.paper`: as published; `plain_lora`: one adapter for all conditions."""
    condition_width: int = Field(default=128, ge=1)
    """`hyperlora`: width of the encoded condition."""
    slot_width: int = Field(default=64, ge=1)
    """`hyperlora`: width of the learned slot embedding."""
    hidden_width: int = Field(default=256, ge=1)
    """Trunk width (`hyperlora`; the published network uses 8)."""
    trunk_layers: int = Field(default=2, ge=1)
    """`hyperlora`: hidden layers of the trunk."""
    generate_per_block: bool = False
    """`hyperlora`: generate the factors of each block where it is recomputed (base.gradient_checkpointing), so that
    those of one block exist at a time."""
    position: Literal["raw", "scaled"] = "raw"
    """`hyperlora.paper`: slot index appended as the raw integer (published) or divided by the number of slots."""
    initialization: Literal["zero_delta", "published"] = "zero_delta"
    """`zero_delta`: A random, B = 0, so delta W = 0; `published` (`hyperlora.paper` only): every weight N(0, 1e-7)."""

    @property
    def learns_conditions(self) -> bool:
        """Whether the adapter depends on the condition."""
        return self.kind != "plain_lora"


class TextToLoraConfig(Section):
    kind: Literal["text_to_lora"]
    """Text-to-LoRA (arXiv 2506.06105): residual MLPs over condition, depth and module embeddings."""
    size: Literal["L", "M", "S"] = "L"
    """`L`: a head emits A and B at once; `M`: one head for both, told apart by an embedding; `S`: one row of A or
    column of B at a time."""
    latent_width: int = Field(default=128, ge=8, multiple_of=4)
    """Width z of the latent: half of it for the condition, a quarter each for depth and module."""
    head_width: int = Field(default=512, ge=8)
    """Width of what the heads read."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """In the MLPs (published: 0.05). Its draws depend on the number of ranks."""
    rescale_heads: bool = True
    """Divide what the heads read by sqrt(head_width), so that learning rates do not depend on it (published: no)."""
    initialization: Literal["zero_delta", "published"] = "zero_delta"
    """`zero_delta`: delta W = 0 at step 0; `published`: M and S share one bias between A and B, so it is not."""
    generate_per_block: bool = False
    """Generate the factors of each block where it is recomputed (base.gradient_checkpointing)."""
    condition_tokens: int | None = Field(default=None, ge=1)
    """A condition is so many vectors, one a token, which are pooled by attention: conditions.maximum_tokens, with
    conditions.encoder = base_tokens."""
    pooling_queries: int = Field(default=8, ge=1)
    """Learned queries of that attention, each with a head of 64 entries."""

    @property
    def learns_conditions(self) -> bool:
        return True


class GatedLoraConfig(Section):
    kind: Literal["gated_lora"]
    """One LoRA whose rank-one parts are weighted by the condition; lora.rank bounds what all conditions can use."""
    hidden_width: int = Field(default=256, ge=1)
    """Width of the MLP from conditions to gates."""
    condition_tokens: int | None = Field(default=None, ge=1)
    """As for `text_to_lora`."""
    pooling_queries: int = Field(default=8, ge=1)
    """As for `text_to_lora`."""
    generate_per_block: ClassVar[bool] = False
    learns_conditions: ClassVar[bool] = True


def _hypernetwork_kind(value: Any) -> str:
    kind = value.get("kind", "hyperlora") if isinstance(value, dict) else value.kind
    return "hyperlora" if kind in ("hyperlora.paper", "plain_lora") else str(kind)


AnyHypernetworkConfig = Annotated[
    Annotated[HypernetworkConfig, Tag("hyperlora")]
    | Annotated[TextToLoraConfig, Tag("text_to_lora")]
    | Annotated[GatedLoraConfig, Tag("gated_lora")],
    Discriminator(_hypernetwork_kind),
]


OF_BASE = ("base", "base_mean", "base_tokens")
"""Encoders that are the base itself."""


class ConditionsConfig(Section):
    kind: Literal["auto", "typology", "descriptions", "one_hot"] = "auto"
    """`typology`: a variety's feature vector; `descriptions`: embedded task descriptions; `one_hot`: a unit vector per
    task, of which the hypernetwork's first layer makes a learned embedding; `auto`: what the data have."""
    encoder: str = "package:all-minilm-l6-v2"
    """Of descriptions: `package:all-minilm-l6-v2` (carried by a PyPI package), a directory or hub id of a
    sentence-transformers model; `base`: the base model's own state at the last token; `base_mean`: the mean of its
    states after a third of its blocks, standardised. Several, joined by " + ", stand side by side. `base_tokens`: those
    states themselves, a vector for each token up to `maximum_tokens`, for hypernetwork.condition_tokens."""
    encoder_revision: str | None = None
    """Hub revision of the encoder."""
    maximum_tokens: int = Field(default=256, ge=8)
    """A longer description is refused."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on description embeddings (whose entries have mean square 1) in training."""
    with_typology: bool = False
    """Append the feature vector of a task's variety to its description's embedding."""

    @field_validator("encoder")
    @classmethod
    def _each_once(cls, value: str) -> str:
        names = value.split(" + ")
        if not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise ValueError("each encoder is named once, with ' + ' between them")
        if "base_tokens" in names and len(names) > 1:
            raise ValueError("base_tokens stands alone: its embedding has a vector for each token")
        return value

    @property
    def encoders(self) -> tuple[str, ...]:
        """One name for each embedding."""
        return tuple(self.encoder.split(" + "))

    @property
    def sentence_encoders(self) -> tuple[str, ...]:
        """Those that are models of their own; none for one-hot conditions."""
        return () if self.kind == "one_hot" else tuple(name for name in self.encoders if name not in OF_BASE)

    @property
    def base_encodes(self) -> bool:
        """Whether the base reads descriptions."""
        return self.kind != "one_hot" and len(self.sentence_encoders) < len(self.encoders)

    def only(self, encoder: str) -> ConditionsConfig:
        """The same with one of the encoders."""
        return self.model_copy(update={"encoder": encoder})


class AlignmentConfig(Section):
    kind: Literal["alignment"] = "alignment"
    """Sinkhorn divergence between dialect and Standard English token clouds."""
    blur: float = Field(default=0.05, gt=0)
    """Blur; epsilon = blur^2 on the cost 0.5*|x-y|^2."""
    scaling: float = Field(default=0.5, gt=0, lt=1)
    """Ratio of successive blurs in the annealing schedule."""
    diameter: float | None = Field(default=None, gt=0)
    """Distance to begin annealing from, at least the largest between two states; null: each pair's own. With a number,
    the self term of a target does not depend on its partner and is computed once instead of at every step."""
    solver: Literal["native", "geomloss"] = "native"
    """`native`: hl_scale.sinkhorn; `geomloss`: geomloss.SamplesLoss, pair by pair."""
    normalization: Literal["sqrt_dim", "l2", "none"] = "sqrt_dim"
    """Of hidden states after the final norm: divided by sqrt(D), by each token's length, or untouched."""
    skip_first_token: bool = True
    """Leave the first token (BOS or CLS) out of the cloud: its state is the same for every text of a causal model."""


class SupervisedConfig(Section):
    kind: Literal["supervised"]
    """Cross-entropy of the answers, mean over each one's tokens, then over examples."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over the vocabulary."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """NEFTune: uniform noise on input embeddings within alpha / sqrt(tokens x width)."""
    weight_penalty: float = Field(default=0.0, ge=0)
    """Times the mean squares of generated A and B, summed over target modules."""
    unfamiliar_penalty: float = Field(default=0.0, ge=0)
    """Times the squared norm of the update of a random condition relative to the own ones, so that what is unlike any
    description changes little. A hypernetwork without conditions is left as it is."""
    logit_tokens: int = Field(default=64, ge=1)
    """Logits exist for so many answer tokens at a time."""


class ReconstructionConfig(Section):
    kind: Literal["reconstruction"]
    """Distance between generated factors and those of a library of trained LoRAs; the base is not run."""
    library: str
    """Directory that holds a PEFT directory for each task, named as the task."""
    targets: Literal["factors", "delta"] = "delta"
    """`factors`: mean absolute error of A and B; `delta`: squared Frobenius norm of the difference of delta W, relative
    to the library's mean, computed from the factors."""
    z_score: bool = True
    """`factors`: of entries normalised by mean and standard deviation over the library."""
    canonical: bool = True
    """Bring each target to its singular form first, which removes the freedom (B M, M^-1 A) of LoRA factors."""


def _objective_kind(value: Any) -> str:
    return str(value.get("kind", "alignment") if isinstance(value, dict) else value.kind)


AnyObjectiveConfig = Annotated[
    Annotated[AlignmentConfig, Tag("alignment")]
    | Annotated[SupervisedConfig, Tag("supervised")]
    | Annotated[ReconstructionConfig, Tag("reconstruction")],
    Discriminator(_objective_kind),
]
