"""The `data` section: parallel sentences in dialects, or tasks with descriptions and examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hl_scale.config.section import Section


class SentenceSource(Section):
    kind: Literal["vader", "text", "jsonl", "parquet", "hub"]
    """`vader`: the sentences shipped in the source distribution of vaderSentiment 3.3.2; else files or a hub id."""
    path: str | None = None
    """File or glob (text, jsonl, parquet), hub id (hub), or a copy of the vaderSentiment archive (vader, optional)."""
    name: str | None = None
    """Hub configuration name, or for `vader` the subset: movie, news, product or tweets."""
    split: str = "train"
    """Hub split."""
    revision: str | None = None
    """Hub revision."""
    column: str = "text"
    """Column that holds the sentence (jsonl, parquet, hub)."""
    limit: int | None = Field(default=None, ge=1)
    """Keep at most this many sentences of the source, drawn with the data seed."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> SentenceSource:
        if self.kind != "vader" and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path (file, glob or hub id)")
        if self.kind == "vader" and self.name not in ("movie", "news", "product", "tweets"):
            raise ValueError("a vader source needs name: one of movie, news, product, tweets")
        return self


class PairSource(Section):
    kind: Literal["jsonl", "gettext"]
    """`jsonl`: an object a line with a Standard English sentence, its form in another variety, and that variety;
    `gettext`: compiled message catalogues, LANGUAGE/LC_MESSAGES/*.mo, English messages with their translations."""
    path: str
    """File or glob."""
    standard: str = "standard"
    """`jsonl`: column of the Standard English sentence."""
    dialect: str = "dialect"
    """`jsonl`: column of its form in the variety."""
    variety: str = "variety"
    """`jsonl`: column of the variety's name."""


class DataConfig(Section):
    """What both kinds of training data have."""

    directory: str
    """Where `hl-scale prepare` writes Parquet shards and manifest.json."""
    maximum_tokens: int = Field(default=128, ge=2)
    """A text with more tokens than this, or than the model's context, is refused in training."""
    seed: int = Field(default=0, ge=0)
    """Seed of the splits and of all that is drawn in preparation."""
    rows_per_shard: int = Field(default=4096, ge=1)
    """Rows per Parquet file."""


class DialectDataConfig(DataConfig):
    kind: Literal["dialects"] = "dialects"
    """Parallel sentences, Standard English beside a dialect form."""
    sources: tuple[SentenceSource, ...] = ()
    """Sentence sources, pooled."""
    pairs: tuple[PairSource, ...] = ()
    """`parallel`: sources of pairs, pooled."""
    mode: Literal["virtual", "named", "parallel"] = "virtual"
    """`virtual`: each sentence gets random feature mixtures of its own; `named`: those of `training_varieties`;
    `parallel`: nothing is transformed, `pairs` hold both sides."""
    vectors: Literal["ewave", "lang2vec"] = "ewave"
    """`ewave`: varieties of English; `lang2vec`: languages, by ISO 639 codes (`parallel`)."""
    training_varieties: tuple[str, ...] = ()
    """Varieties trained on in `named` mode; their vectors and texts are the only ones seen. In `parallel` mode all that
    are not in `evaluation_varieties`, unless given."""
    evaluation_varieties: tuple[str, ...] = ()
    """Varieties whose held-out sentences are kept for evaluation (seen or unseen)."""
    training_sentences: int = Field(default=1000, ge=1)
    """Standard English sentences used for training."""
    heldout_sentences: int = Field(default=200, ge=1)
    """Standard English sentences set apart, before anything else, for evaluation."""
    variants_per_sentence: int = Field(default=6, ge=1)
    """`virtual`: random mixtures drawn per training sentence."""
    identity_per_sentence: int = Field(default=1, ge=0)
    """Copies of each training sentence paired with itself under the zero vector."""
    minimum_density: float = Field(default=0.08, gt=0, le=1)
    """`virtual`: smallest share of implementable features present in a mixture."""
    maximum_density: float = Field(default=0.6, gt=0, le=1)
    """`virtual`: largest share of implementable features present in a mixture."""
    minimum_words: int = Field(default=8, ge=1)
    """Shorter sentences are left out."""
    maximum_words: int = Field(default=30, ge=1)
    """Longer sentences are left out."""
    num_workers: int = Field(default=2, ge=1)
    """Ray Data actors that run the dialect engine."""

    @model_validator(mode="after")
    def _modes_agree(self) -> DialectDataConfig:
        if self.mode == "named" and not self.training_varieties:
            raise ValueError("mode 'named' needs data.training_varieties")
        if self.mode == "parallel" and not (self.pairs and not self.sources):
            raise ValueError("mode 'parallel' needs data.pairs, and no data.sources")
        if self.mode != "parallel" and not self.sources:
            raise ValueError(f"mode {self.mode!r} needs data.sources")
        if self.mode != "parallel" and (self.pairs or self.vectors != "ewave"):
            raise ValueError(f"data.pairs and data.vectors belong to mode 'parallel', not to {self.mode!r}")
        if self.minimum_density > self.maximum_density:
            raise ValueError("minimum_density is larger than maximum_density")
        if self.minimum_words > self.maximum_words:
            raise ValueError("minimum_words is larger than maximum_words")
        return self


class TaskSource(Section):
    kind: Literal["builtin", "grid", "jsonl", "hub"]
    """`builtin`: tasks made here from sentences, lists and puzzles; `grid`: hundreds of procedural tasks, cells of
    operation x position x label form x input; `jsonl`: files of your own; `hub`: datasets of instruction tasks."""
    path: str | None = None
    """`jsonl`: file or glob; `hub`: ids separated by spaces, for example `Lots-of-LoRAs/task639_multi_woz`."""
    split: str = "train"
    """Hub split."""
    revision: str | None = None
    """Hub revision."""
    limit: int | None = Field(default=None, ge=1)
    """Keep at most this many tasks of the source, drawn with the data seed."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> TaskSource:
        if self.kind in ("jsonl", "hub") and not self.path:
            raise ValueError(f"a source of kind {self.kind!r} needs a path (file, glob or hub ids)")
        return self


class TaskDataConfig(DataConfig):
    kind: Literal["tasks"]
    """Tasks: descriptions in plain words, and examples of input and answer."""
    sources: tuple[TaskSource, ...] = Field(min_length=1)
    """Task sources, pooled."""
    tasks: tuple[str, ...] = ()
    """Names or globs of the tasks to keep; all unless given."""
    excluded_tasks: tuple[str, ...] = ()
    """Names or globs of tasks to leave out of those."""
    heldout_tasks: tuple[str, ...] = ()
    """Names or globs of tasks that are never trained on, beside those that a source itself sets apart."""
    only_task: str | None = None
    """Train on this task of the prepared set alone, also where the set holds it out; `hl-scale library` sets it."""
    training_examples: int = Field(default=256, ge=1)
    """Examples per task for training."""
    test_examples: int = Field(default=24, ge=1)
    """Examples per task for evaluation, none of which is a training example."""
    heldout_descriptions: int = Field(default=2, ge=0)
    """Descriptions per task that are set apart where a source does not say which."""
    examples_per_condition: int = Field(default=1, ge=1)
    """Examples of a task in one batch, under one of its descriptions; tasks come up equally often."""
    prompt: str = "{input} =>"
    """What the model reads before the answer; `{input}` is the example's input."""
    description_in_prompt: bool = False
    """Put the description, and a new line, before the prompt: the control that reads its task."""
    answer_prefix: str = " "
    """Between prompt and answer; what the tokenizer expects before a word."""
    answer_end: str = "\n"
    """Ends an answer; empty: the tokenizer's end-of-sequence token."""
    chat_template: bool = False
    """Wrap the prompt as a user's turn in the tokenizer's chat template (instruction-tuned bases)."""

    @model_validator(mode="after")
    def _prompt_has_input(self) -> TaskDataConfig:
        if self.prompt.count("{input}") != 1:
            raise ValueError("data.prompt must hold {input} once")
        return self


def _data_kind(value: Any) -> str:
    return str(value.get("kind", "dialects") if isinstance(value, dict) else value.kind)


AnyDataConfig = Annotated[
    Annotated[DialectDataConfig, Tag("dialects")] | Annotated[TaskDataConfig, Tag("tasks")], Discriminator(_data_kind)
]
