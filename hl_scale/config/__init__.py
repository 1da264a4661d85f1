"""The whole configuration of a run: typed, strict, and free of torch."""

from hl_scale.config.data import DataConfig, DialectDataConfig, PairSource, SentenceSource, TaskDataConfig, TaskSource
from hl_scale.config.labelled import LabelledConfig, LabelledDataConfig, TaskAdapterConfig, load_labelled_config
from hl_scale.config.learning import (
    AlignmentConfig,
    ConditionsConfig,
    GatedLoraConfig,
    HypernetworkConfig,
    ReconstructionConfig,
    SupervisedConfig,
    TextToLoraConfig,
)
from hl_scale.config.loading import ConfigError, dump_config, load_config, parse_config
from hl_scale.config.sections import (
    BaseModelConfig,
    ClusterConfig,
    Config,
    EvaluationConfig,
    LoraConfig,
    RunConfig,
    TrainingConfig,
    Zero3Config,
)
from hl_scale.config.suites import SuiteRecipe, load_suite

__all__ = [
    "AlignmentConfig",
    "BaseModelConfig",
    "ClusterConfig",
    "ConditionsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DialectDataConfig",
    "PairSource",
    "EvaluationConfig",
    "GatedLoraConfig",
    "HypernetworkConfig",
    "LabelledConfig",
    "LabelledDataConfig",
    "LoraConfig",
    "ReconstructionConfig",
    "RunConfig",
    "SentenceSource",
    "SuiteRecipe",
    "SupervisedConfig",
    "TaskAdapterConfig",
    "TaskDataConfig",
    "TaskSource",
    "TextToLoraConfig",
    "TrainingConfig",
    "Zero3Config",
    "dump_config",
    "load_config",
    "load_labelled_config",
    "load_suite",
    "parse_config",
]
