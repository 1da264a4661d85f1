"""The whole configuration of a run: typed, strict, and free of torch."""

from hl_scale.config.loading import ConfigError, dump_config, load_config, parse_config
from hl_scale.config.sections import (
    BaseModelConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    HypernetworkConfig,
    LoraConfig,
    ObjectiveConfig,
    RunConfig,
    SentenceSource,
    TrainingConfig,
    Zero3Config,
)

__all__ = [
    "BaseModelConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "HypernetworkConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "RunConfig",
    "SentenceSource",
    "TrainingConfig",
    "Zero3Config",
    "dump_config",
    "load_config",
    "parse_config",
]
